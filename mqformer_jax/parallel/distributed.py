"""Training runs with several processes: start, communication, preemption and crashes."""

from __future__ import annotations

import atexit
import contextlib
import glob
import importlib.util
import itertools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mqformer_jax import interrupts

HEARTBEAT = 60  # seconds without a heartbeat after which a process counts as dead and the other ones exit
# Longest wait, in seconds, for another process, which may compile while this one loads the program from a cache.
BARRIER = 3600
_barriers = itertools.count()  # each barrier needs a new name


def initialize() -> None:
    """Connect to the other processes of the run, if any. Call this before using a device.

    A run has several processes on a TPU VM, under SLURM or Open MPI with several tasks, or if JAX_COORDINATOR_ADDRESS
    (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set. Raises ValueError if these variables are inconsistent.
    """
    if jax.distributed.is_initialized() or not is_requested(os.environ):
        return
    watch_for_crash(
        "mqformer_jax: a process died unexpectedly: it was killed, or it lost the connection to another process of the "
        "run. See the logs of all processes. Run the same command to resume from the last checkpoint."
    )
    jax.distributed.initialize(
        **settings(os.environ), heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT
    )


def is_requested(environment: Mapping[str, str]) -> bool:
    """Return whether the run may have several processes: environment variables define them, or this is a TPU VM.

    On a TPU VM, JAX reads the number of processes from the VM's metadata.
    """
    several = lambda name: environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1
    if "JAX_COORDINATOR_ADDRESS" in environment or several("SLURM_NTASKS") or several("OMPI_COMM_WORLD_SIZE"):
        return True
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = environment.get("JAX_PLATFORMS") or "tpu"
    return bool(chips) and importlib.util.find_spec("libtpu") is not None and wanted.startswith("tpu")


def settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of `jax.distributed.initialize`, or {} if JAX detects them itself.

    Raises ValueError if the variables of the environment are incomplete or inconsistent.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {argument: environment[name] for argument, name in names.items() if name in environment}
    if not given:
        return {}
    if (
        len(given) != 2
        or not all(value.isdigit() for value in given.values())
        or int(given["process_id"]) >= int(given["num_processes"])
    ):
        raise ValueError(
            f"{', '.join(f'{names[argument]}={value}' for argument, value in given.items())}: "
            "these settings are incomplete or inconsistent. Set JAX_NUM_PROCESSES, the number of processes, and "
            "JAX_PROCESS_ID, the index of this one, counted from 0, together with JAX_COORDINATOR_ADDRESS."
        )
    return {argument: int(value) for argument, value in given.items()}


def is_first() -> bool:
    """Return whether this is the process that prints messages and writes shared files."""
    return jax.process_index() == 0


def barrier(name: str, timeout: int = BARRIER) -> None:
    """Wait at most `timeout` seconds until every process has called this function.

    The wait uses JAX's coordination service, because collective operations on devices have other time limits.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint.multihost import get_barrier_sync_fn  # slow import that a single process does not need

    get_barrier_sync_fn()(key=f"mqformer_jax {next(_barriers)}: {name}", timeout_ms=1000 * timeout)


def connect(mesh: Mesh) -> None:
    """Wait until every process is ready, then open the connections of all collectives over axes of `mesh`.

    On CPUs, collectives use Gloo. It connects a group of devices at the group's first collective, and a process fails
    if another process arrives more than 30 seconds later, e.g. because it compiles longer. TPUs and GPUs have no such
    limit.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    groups = [group for size in range(1, len(axes) + 1) for group in itertools.combinations(axes, size)]
    sums = jax.shard_map(
        lambda x: [jax.lax.psum(x, group) for group in groups], mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    zero = jax.make_array_from_callback((), NamedSharding(mesh, P()), lambda _: np.zeros((), np.float32))
    compiled = jax.jit(sums).lower(zero).compile()
    barrier("connect")
    jax.block_until_ready(compiled(zero))
    gather(None)  # which communicates over a mesh of its own


def gather(value: Any) -> list[Any]:
    """Return a list with the `value` of each process, ordered by process index. Every process must call this.

    Values are pickled, which is safe because only processes of this run send them.
    """
    if jax.process_count() == 1:
        return [value]
    barrier("gather")  # see `connect`
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size]))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


class Preemption:
    """Tell the training loop to save and stop after SIGTERM or Ctrl-C. Use it as a context manager.

    Clouds send SIGTERM before they take a machine away. If one of several processes receives it, all processes stop at
    the same step. If the run is a single process with unsaved steps, Ctrl-C stops it after the current step is saved.
    In all other cases, and at a second Ctrl-C, the process ends at once without saving.
    """

    def __init__(self):
        self._stops = False
        self._unsaved = False  # whether some steps may not be in a checkpoint yet
        self._alone = jax.process_count() == 1  # otherwise JAX's coordination service handles SIGTERM

    def __enter__(self) -> Preemption:
        self._stack = contextlib.ExitStack()
        if self._alone:
            before = signal.signal(signal.SIGTERM, self._on_sigterm)
            self._stack.callback(signal.signal, signal.SIGTERM, before)
            self._stack.enter_context(interrupts.postponed(self._on_ctrl_c))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _on_sigterm(self, *_: object) -> None:
        self._stops = True

    def _on_ctrl_c(self) -> bool:
        if self._stops or not self._unsaved:
            return False
        self._stops = True
        os.write(2, b"\nstopping after saving this step; press Ctrl-C again to stop without saving\n")
        return True

    @contextlib.contextmanager
    def exit_on_signals(self) -> Generator[None]:
        """Let SIGTERM and Ctrl-C end the process at once inside this context, for work that can be repeated.

        Save all steps before entering the context. If a signal has already arrived, the process ends on entry. With
        several processes, SIGTERM does not end a process inside the context: the next `should_stop` reports it.
        """
        if self._stops and interrupts.was_postponed():
            interrupts.exit_now(interrupts.STATUS, "stopped; checkpoint saved. Run the same command to resume.")
        if self._stops:
            print("Received SIGTERM; checkpoint saved. Run the same command to resume.", flush=True)
            sys.exit(interrupts.PREEMPTED)
        self._unsaved = False
        with interrupts.exit_on_sigterm() if self._alone else contextlib.nullcontext():
            yield

    def should_stop(self, step: int) -> bool:
        """Return whether the run should end after this step. Every process must call this at every step."""
        self._unsaved = True
        return self._stops if self._alone else multihost_utils.reached_preemption_sync_point(step)


_watch: subprocess.Popen | None = None
_WATCH = "import sys; sys.stdin.read(1) or print(sys.argv[1], file=sys.stderr)"


def watch_for_crash(message: str) -> None:
    """Print `message` if this process is killed, or if JAX aborts it because another process died.

    A child process waits on a pipe that only this process holds open, and prints the message when the pipe closes.
    """
    global _watch
    _watch = subprocess.Popen([sys.executable, "-c", _WATCH, message], stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(_end_watch)
    interrupts.before_exit(_end_watch)


def _end_watch() -> None:
    if _watch is not None and _watch.stdin is not None and _watch.poll() is None:
        _watch.stdin.write(b"x")
        _watch.stdin.close()
        _watch.wait()
