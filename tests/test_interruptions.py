"""A run that is killed, told to end, or loses a process, and goes on: with the losses of the one nobody disturbed."""

import random
import signal
import time

import jax
import numpy as np
import pytest
from runs import Run, losses

from mqformer_jax.checkpoint import load_weights

STEPS = "--config.steps=60"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(sample_root, tmp_path_factory, cache):
    """The workdir of a run of one process."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run = Run(workdir, sample_root, cache, 1, 1, STEPS)
    assert run.end() == [0], run.said()
    return workdir


def test_killed_at_random_and_told_to_end_it_ends_where_the_undisturbed_run_ends(
    undisturbed, sample_root, tmp_path, cache
):
    workdir, rng = tmp_path / "disturbed", random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        run = Run(workdir, sample_root, cache, 1, 1, STEPS)
        run.until_it_trains()
        time.sleep(rng.uniform(0, 0.4))
        assert run.running, "it came to its end before it could be disturbed"
        run.processes[0].send_signal(number)
        told = time.monotonic()
        (status,) = run.end(within=60)
        if number == signal.SIGTERM:
            assert (
                status == 0
                and "saved; the same command goes on from the last checkpoint" in run.said()
                and time.monotonic() - told < 30
            )
            steps = max(losses(workdir))
            assert (workdir / "checkpoints" / str(steps)).is_dir(), (
                "the step it stopped at is saved, not the last interval"
            )
        else:
            assert status == -signal.SIGKILL
    assert Run(workdir, sample_root, cache, 1, 1, STEPS).end() == [0]
    assert losses(workdir) == losses(undisturbed)
    ours, theirs = (jax.tree.leaves(load_weights(str(folder)).params) for folder in (workdir, undisturbed))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))


def test_two_processes_lose_one_and_go_on_and_end_as_one(undisturbed, sample_root, tmp_path, cache):
    """Killed, told to end, and then taken over by a single process: always the losses of one process with the same
    global batch.
    """
    workdir = tmp_path / "pair"
    pair = Run(workdir, sample_root, cache, 2, 2, STEPS, "--config.mesh=(2,2,1)")
    pair.until_it_trains(3)
    pair.processes[1].kill()
    statuses = pair.end(within=90)  # the word of JAX's heartbeat is 60 s; a lost connection tells at once
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, -signal.SIGKILL)
    *_, last = pair.said().strip().splitlines()
    assert "the same command goes on from the last checkpoint" in last

    pair = Run(workdir, sample_root, cache, 2, 2, STEPS, "--config.mesh=(2,2,1)")
    pair.until_it_trains()
    pair.processes[1].send_signal(signal.SIGTERM)  # one of them is told, both hear of it
    assert pair.end(within=60) == [0, 0]
    assert "saved; the same command goes on from the last checkpoint" in pair.said(0) and "saved" not in pair.said(1)

    assert Run(workdir, sample_root, cache, 1, 1, STEPS).end() == [0]
    found, expected = losses(workdir), losses(undisturbed)
    assert list(found) == list(expected)
    np.testing.assert_allclose([found[i] for i in range(1, 11)], [expected[i] for i in range(1, 11)], rtol=1e-4)
    np.testing.assert_allclose(
        list(found.values()), list(expected.values()), rtol=0.03
    )  # rounding grows from step to step


def test_four_processes_have_the_losses_of_one(undisturbed, sample_root, tmp_path, cache):
    four = Run(tmp_path / "four", sample_root, cache, 4, 1, STEPS)
    four.until_it_trains(5)
    for process in four.processes:
        process.kill()
    four.end()
    found, expected = losses(four.workdir), losses(undisturbed)
    np.testing.assert_allclose([found[i] for i in range(1, 6)], [expected[i] for i in range(1, 6)], rtol=1e-4)


@pytest.mark.parametrize(
    "lines, names", [("JAX_NUM_PROCESSES=2", "go together"), ("JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=2", "from 0 on")]
)
def test_half_an_environment_is_one_line(lines, names):
    from mqformer_jax.parallel.distributed import settings

    with pytest.raises(ValueError, match=names):
        settings(dict(line.split("=") for line in lines.split()))


def test_one_process_asks_for_no_others():
    from mqformer_jax.parallel.distributed import is_asked_for, settings

    assert settings({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}) == {"num_processes": 4, "process_id": 3}
    assert is_asked_for({"JAX_COORDINATOR_ADDRESS": "host:1"}) and is_asked_for({"SLURM_NTASKS": "2"})
    assert not is_asked_for({"SLURM_NTASKS": "1", "JAX_PLATFORMS": "cpu"})
