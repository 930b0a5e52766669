"""Many processes as one run: who starts it, what they tell each other, and how it ends when one of them is gone."""

from __future__ import annotations

import atexit
import contextlib
import glob
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT = 60  # seconds without a sign of life after which a process counts as gone, and the others end


def initialize() -> None:
    """Joins the other processes where the environment speaks of any; before anything touches a device.

    That is: JAX_COORDINATOR_ADDRESS (host:port) with JAX_NUM_PROCESSES and JAX_PROCESS_ID, set by hand or by a launcher; SLURM or Open MPI
    with several tasks; a TPU VM. Raises ValueError in one line where the three variables do not agree.
    """
    if jax.distributed.is_initialized() or not is_asked_for(os.environ):
        return
    announce_death(
        "mqformer_jax: this process ended without a word: it was killed, or another one of the run is gone (its log says more); the same "
        "command goes on from the last checkpoint."
    )
    jax.distributed.initialize(**settings(os.environ), heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT)


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
    if len(given) != 2 or not all(value.isdigit() for value in given.values()) or int(given["process_id"]) >= int(given["num_processes"]):
        raise ValueError(
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID go together with JAX_COORDINATOR_ADDRESS: the number of processes, and this one's, from 0 on."
        )
    return {argument: int(value) for argument, value in given.items()}


def is_first() -> bool:
    """Whether this is the process that prints and writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """`value` of every process, in their order, on every process. Pickled: it comes from no one but this run's own processes."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size]))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


class Notice:
    """Whether this run was told to end (SIGTERM): what clouds send some seconds before they take a machine.

    One process that is told tells the others, and all of them hear of it at the same step.
    """

    def __init__(self):
        self._told = False
        self._alone = jax.process_count() == 1  # of several, JAX's coordination service takes the signal

    def __enter__(self) -> Notice:
        if self._alone:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, *_: object) -> None:
        self._told = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In it, a process that is alone ends as soon as it is told: for work with which nothing is lost. Several hear of it after it."""
        if self._told:
            sys.exit(0)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)) if self._alone else None
        try:
            yield
        finally:
            if self._alone:
                signal.signal(signal.SIGTERM, before)

    def heeded(self, step: int) -> bool:
        """Whether the run should end after this step. Every process asks at every step."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)


def leave(status: int, message: str) -> None:
    """Ends this process at once, with a message: an orderly end would wait for processes that are gone."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    _last_words()
    os._exit(status)


_watch: subprocess.Popen | None = None
_WATCH = "import sys; sys.stdin.read(1) or print(sys.argv[1], file=sys.stderr)"


def announce_death(message: str) -> None:
    """Has a message printed where this process ends without a word: killed, or aborted by JAX because another process is gone.

    A child waits for the end of a pipe that only this process holds.
    """
    global _watch
    _watch = subprocess.Popen([sys.executable, "-c", _WATCH, message], stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(_last_words)


def _last_words() -> None:
    if _watch is not None and _watch.poll() is None:
        _watch.stdin.write(b"x")
        _watch.stdin.close()
        _watch.wait()
