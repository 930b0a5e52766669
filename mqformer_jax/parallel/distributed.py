"""Many processes as one run: who starts it, what they tell each other, and how it ends when one of them is gone."""

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

HEARTBEAT = 60  # seconds without a sign of life after which a process counts as gone, and the others end
# Seconds that processes wait for each other: one may compile while the others find the program in their cache.
BARRIER = 3600
_barriers = itertools.count()  # barriers need names that were not used before


def initialize() -> None:
    """Joins the other processes where the environment speaks of any; before anything touches a device.

    That is: JAX_COORDINATOR_ADDRESS (host:port) with JAX_NUM_PROCESSES and JAX_PROCESS_ID, set by hand or by a
    launcher; SLURM or Open MPI with several tasks; a TPU VM. Raises ValueError in one line where the three variables do
    not agree.
    """
    if jax.distributed.is_initialized() or not is_asked_for(os.environ):
        return
    watch_for_crash(
        "mqformer_jax: a process died unexpectedly: it was killed, or it lost another process of the run, whose log "
        "says more. Run the same command to resume from the last checkpoint."
    )
    jax.distributed.initialize(
        **settings(os.environ), heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT
    )


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the environment speaks of several processes, or this is a TPU VM (whose metadata tells of the others)."""
    several = lambda name: environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1
    if "JAX_COORDINATOR_ADDRESS" in environment or several("SLURM_NTASKS") or several("OMPI_COMM_WORLD_SIZE"):
        return True
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = environment.get("JAX_PLATFORMS") or "tpu"
    return bool(chips) and importlib.util.find_spec("libtpu") is not None and wanted.startswith("tpu")


def settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """What JAX is told; empty where it finds everything out by itself."""
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
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID go together with JAX_COORDINATOR_ADDRESS: "
            "the number of processes, and this one's, from 0 on."
        )
    return {argument: int(value) for argument, value in given.items()}


def is_first() -> bool:
    """Whether this is the process that prints and writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str, timeout: int = BARRIER) -> None:
    """Wait, at most `timeout` seconds, until every process has called this.

    The coordination service counts the processes: unlike a collective of devices, it has no limit of its own on how
    long one may wait.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint.multihost import get_barrier_sync_fn  # its import takes a second, which one process can save

    get_barrier_sync_fn()(key=f"mqformer_jax {next(_barriers)}: {name}", timeout_ms=1000 * timeout)


def connect(mesh: Mesh) -> None:
    """Open the connections of all collectives over axes of `mesh`, at a moment when every process is here.

    On CPUs, Gloo opens the connections of a group of devices at the first collective of the group, and a process then
    fails if another comes more than 30 seconds later. That happens whenever one process compiles longer than another.
    TPUs and GPUs have no such limit.
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
    gather(None)  # this one uses a mesh of its own, of all processes


def gather(value: Any) -> list[Any]:
    """`value` of every process, in their order, on every process. Pickled: it comes from no one but this run's own
    processes.
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
    """Whether this run should save and stop: SIGTERM (clouds send it before they take a machine) or Ctrl-C came.

    A SIGTERM to one process of several stops all of them at the same step. Ctrl-C saves if this process is alone and
    has trained a step since it started. The second Ctrl-C stops without saving.
    """

    def __init__(self):
        self._stops = False
        self._unsaved = False  # whether there may be steps that no checkpoint has
        self._alone = jax.process_count() == 1  # of several, JAX's coordination service takes SIGTERM

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
        os.write(2, b"\nstopping: this step is being saved; Ctrl-C again stops without saving\n")
        return True

    @contextlib.contextmanager
    def exit_on_signals(self) -> Generator[None]:
        """Let SIGTERM and Ctrl-C end a process that is alone at once, for work that can be repeated.

        Every step must be saved before. Several processes end after the context.
        """
        if self._stops and interrupts.was_postponed():
            interrupts.exit_now(interrupts.STATUS, "stopped; checkpoint saved. Run the same command to resume.")
        if self._stops:
            sys.exit(0)
        self._unsaved = False
        with interrupts.exit_on_sigterm() if self._alone else contextlib.nullcontext():
            yield

    def should_stop(self, step: int) -> bool:
        """Whether the run should end after this step. Every process must call this at every step."""
        self._unsaved = True
        return self._stops if self._alone else multihost_utils.reached_preemption_sync_point(step)


_watch: subprocess.Popen | None = None
_WATCH = "import sys; sys.stdin.read(1) or print(sys.argv[1], file=sys.stderr)"


def watch_for_crash(message: str) -> None:
    """Have `message` printed if this process dies without one: killed, or aborted by JAX because another process is
    gone.

    A child waits for the end of a pipe that only this process holds.
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
