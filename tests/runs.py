"""Runs of `python -m mqformer_jax.main` on the tiny recipe, in one process or in several on loopback."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest
from tiny import CACHE, COMPILATION, REPOSITORY


def losses(workdir: os.PathLike) -> dict[int, float]:
    """The whole loss of each step that metrics.jsonl knows."""
    path = pathlib.Path(workdir, "metrics.jsonl")
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


def environment(processes: int, devices: int) -> list[dict[str, str]]:
    """Variables for each of several processes on loopback, which have `devices` virtual devices each."""
    shared = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {COMPILATION}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests",
    }
    if processes == 1:
        return [shared]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    return [shared | {"JAX_PROCESS_ID": str(i)} for i in range(processes)]


class Run:
    """Processes that train together in a workdir; what each of them prints lies in `logs`."""

    def __init__(self, workdir: pathlib.Path, root: str, processes: int, devices: int, *options: str):
        config = f"--config={REPOSITORY}/tests/tiny.py:process"
        command = [
            sys.executable,
            "-m",
            "mqformer_jax.main",
            config,
            f"--config.data.root={root}",
            f"--workdir={workdir}",
        ]
        self.workdir = workdir
        self.logs = [workdir.with_name(f"{workdir.name}_{time.time_ns()}_{i}.log") for i in range(processes)]
        self.processes = []
        for log, own in zip(self.logs, environment(processes, devices)):
            with open(log, "w") as out:
                self.processes.append(
                    subprocess.Popen([*command, *options], env=own, stdout=out, stderr=subprocess.STDOUT)
                )

    def until_it_trains(self, steps: int = 1) -> None:
        """Returns when it has written so many more steps than there were."""
        wanted = max(losses(self.workdir), default=0) + steps
        while max(losses(self.workdir), default=0) < wanted:
            assert self.running, f"it came to its end before: {self.said()}"
            time.sleep(0.01)

    def until_it_says(self, text: str) -> None:
        """Returns when the first process has printed `text`; for "", while it imports JAX."""
        if not text:
            time.sleep(0.5)
        while text not in self.said():
            assert self.running, f"it came to its end before: {self.said()}"
            time.sleep(0.001)

    @property
    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def end(self, within: float = 600) -> list[int]:
        """Exit statuses, of all; fails where one is still there after so many seconds."""
        last = time.monotonic() + within
        try:
            return [process.wait(max(0.1, last - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {within} s: {self.said()}")
        finally:
            for process in self.processes:
                process.kill()

    def said(self, process: int = 0) -> str:
        return self.logs[process].read_text()
