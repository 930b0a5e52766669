"""The work as a Beam pipeline, in its direct runner."""

import subprocess
import sys

import pytest
from sets import two_boxes, write_set

from mqformer_jax.input.sources import ShardSource


def command(root, *more: str) -> subprocess.CompletedProcess:
    args = ("captions", "--data=toy", f"--root={root}", "--teacher=rules", *more)
    return subprocess.run([sys.executable, "-m", "mqformer_jax", "synthesize", *args], capture_output=True, text=True)


def test_beam_direct_runner_gives_the_same_records(tmp_path):
    pytest.importorskip("apache_beam")
    pytest.importorskip("better_profanity")
    write_set(tmp_path, "toy", two_boxes(10))
    for more in (("--output=a_syn",), ("--output=b_syn", "--beam=--runner=DirectRunner")):
        done = command(tmp_path, *more)
        assert done.returncode == 0 and "20 of 20 boxes" in done.stdout, done.stderr
    plain, beam = (ShardSource(str(tmp_path), name, "train") for name in ("a_syn", "b_syn"))
    assert [plain[i] for i in range(10)] == [beam[i] for i in range(10)]


def test_missing_beam_is_reported_without_a_traceback(tmp_path):
    try:
        import apache_beam  # noqa: F401
    except ImportError:
        write_set(tmp_path, "toy", two_boxes(3))
        done = command(tmp_path, "--beam=--runner=DirectRunner")
        assert (
            done.returncode == 1
            and "--beam: apache_beam is not installed: pip install 'mqformer_jax[beam]'." in done.stderr
        )
        assert "Traceback" not in done.stderr
    else:
        pytest.skip("Apache Beam is installed")
