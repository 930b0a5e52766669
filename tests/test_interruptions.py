"""A run that is killed, stopped, or loses a process, and is started again, has the losses of one that nobody disturbed.

Here a step does not depend on the length of the run (tests/tiny.py: "process"). Disturbed runs are therefore long, so
that they are disturbed before they end, however fast the machine is.
"""

import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from runs import Run, environment, losses

from mqformer_jax.checkpoint import load_weights
from mqformer_jax.interrupts import PREEMPTED

FOREVER = "--config.steps=100000"
RESUME = "Run the same command to resume"


@pytest.fixture(scope="module")
def undisturbed(sample_root, tmp_path_factory):
    """Call it with a number of steps for the workdir of a run that nobody disturbed and that has at least so many."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"

    def until(steps: int):
        if max(losses(workdir), default=0) < steps:
            run = Run(workdir, sample_root, 1, 1, f"--config.steps={steps}")
            assert run.end() == [0], run.said()
        return workdir

    return until


@pytest.mark.process
@pytest.mark.slow
def test_run_resumed_after_kill_sigterm_and_ctrl_c_matches_uninterrupted(sample_root, undisturbed, tmp_path):
    workdir = tmp_path / "disturbed"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        run = Run(workdir, sample_root, 1, 1, FOREVER)
        run.until_it_trains()
        run.processes[0].send_signal(number)
        (status,) = run.end()
        assert status == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: PREEMPTED, signal.SIGINT: 130}[number], (
            run.said()
        )
        assert "Traceback" not in run.said()
        if number != signal.SIGKILL:
            assert f"checkpoint saved. {RESUME}" in run.said().splitlines()[-1]
            steps = max(losses(workdir))
            assert (workdir / "checkpoints" / str(steps)).is_dir(), (
                "the step it stopped at is saved, not the last interval"
            )

    steps = max(losses(workdir)) + 3
    assert Run(workdir, sample_root, 1, 1, f"--config.steps={steps}").end() == [0]
    assert losses(workdir) == losses(undisturbed(steps))
    ours, theirs = (jax.tree.leaves(load_weights(str(folder)).params) for folder in (workdir, undisturbed(steps)))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.process
@pytest.mark.slow
def test_ctrl_c_during_startup_exits_with_one_line(sample_root, tmp_path):
    """While JAX starts, compiles, or reads a checkpoint. `seen`: what the run has printed by then."""
    saved = Run(tmp_path / "run", sample_root, 1, 1, "--config.steps=2")
    assert saved.end() == [0], saved.said()
    for seen, folder in (
        ("", "run"),
        ("parameters on 1 cpu device", "new"),
        ("", "run"),
        ("images, 10.0% of the training examples", "new"),
    ):
        run = Run(
            tmp_path / folder, sample_root, 1, 1, FOREVER, "--config.seed=1" if folder == "new" else "--config.seed=0"
        )
        run.until_it_says(seen)
        run.processes[0].send_signal(signal.SIGINT)
        assert run.end() == [130], run.said()
        *_, last = run.said().splitlines()
        assert "Traceback" not in run.said() and RESUME in last or "mqformer_jax: stopped." in last, run.said()
    assert Run(tmp_path / "run", sample_root, 1, 1, "--config.steps=4").end() == [0]
    assert max(losses(tmp_path / "run")) == 4 and not list((tmp_path / "run").glob("damaged*"))


@pytest.mark.process
@pytest.mark.slow
def test_two_process_run_resumes_after_losing_one_and_matches_one_process(sample_root, undisturbed, tmp_path):
    """Killed, stopped, and then taken over by a single process: always the losses of one process with the same global
    batch.
    """
    workdir = tmp_path / "pair"
    pair = Run(workdir, sample_root, 2, 2, FOREVER, "--config.mesh=(2,2,1)")
    pair.until_it_trains(3)
    pair.processes[1].kill()
    statuses = pair.end()  # JAX's heartbeat takes 60 s; a lost connection tells at once
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, -signal.SIGKILL)
    *_, last = pair.said().strip().splitlines()
    assert RESUME in last

    pair = Run(workdir, sample_root, 2, 2, FOREVER, "--config.mesh=(2,2,1)")
    pair.until_it_trains()
    pair.processes[1].send_signal(signal.SIGTERM)  # one of them is told, both hear of it
    assert pair.end() == [PREEMPTED, PREEMPTED], pair.said()
    assert f"checkpoint saved. {RESUME}" in pair.said(0) and "saved" not in pair.said(1)

    steps = f"--config.steps={max(losses(workdir)) + 3}"
    assert Run(workdir, sample_root, 1, 1, steps).end() == [0]
    found, expected = losses(workdir), losses(undisturbed(max(losses(workdir))))
    expected = {step: loss for step, loss in expected.items() if step in found}
    assert list(found) == list(expected)
    first = [step for step in expected if step <= 8]
    np.testing.assert_allclose([found[i] for i in first], [expected[i] for i in first], rtol=1e-4)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=0.05)  # rounding grows with steps


LATE = """
import sys, time
import numpy as np
from mqformer_jax.parallel import distributed
distributed.initialize()
import jax
from jax.sharding import NamedSharding
from mqformer_jax.parallel.mesh import BATCH, make_mesh, replicated
mesh = make_mesh((2, 2, 1))
distributed.connect(mesh)
if jax.process_index() == 1:
    time.sleep(float(sys.argv[1]))
ones = jax.make_array_from_callback((4,), NamedSharding(mesh, BATCH), lambda _: np.ones(1))
total = jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))(ones)
print(float(total.addressable_data(0)), distributed.gather(jax.process_index()))
"""


@pytest.mark.process
@pytest.mark.slow
def test_collective_waits_for_a_process_beyond_the_gloo_timeout(tmp_path):
    """Gloo opens a connection within 30 seconds or fails. One process is 33 seconds late, as if it had compiled."""
    (tmp_path / "late.py").write_text(textwrap.dedent(LATE))
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "late.py"), "33"],
            env=own,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for own in environment(processes=2, devices=2)
    ]
    for process in started:
        assert process.communicate(timeout=500)[0].splitlines()[-1] == "4.0 [0, 1]" and process.returncode == 0


@pytest.mark.parametrize(
    "lines, names",
    [("JAX_NUM_PROCESSES=2", "together with"), ("JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=2", "counted from 0")],
)
def test_incomplete_or_invalid_process_variables_are_rejected(lines, names):
    from mqformer_jax.parallel.distributed import settings

    with pytest.raises(ValueError, match=names):
        settings(dict(line.split("=") for line in lines.split()))


def test_distributed_settings_are_read_from_the_environment():
    from mqformer_jax.parallel.distributed import is_requested, settings

    assert settings({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}) == {"num_processes": 4, "process_id": 3}
    assert is_requested({"JAX_COORDINATOR_ADDRESS": "host:1"}) and is_requested({"SLURM_NTASKS": "2"})
    assert not is_requested({"SLURM_NTASKS": "1", "JAX_PLATFORMS": "cpu"})
