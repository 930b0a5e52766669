"""The progress bar of training."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator

import jax
from tqdm import tqdm

from mqformer_jax.arrays import Number

ESTIMATE_AFTER = 5  # number of steps, including the first one, which compiles


class Progress:
    """A progress bar that also shows the compilation of the first step and prints the estimated remaining time once.

    total: the step at which training ends. initial: the step at which it starts. shown: whether to print anything. If a
    run has several processes, only the first should.
    """

    def __init__(self, total: int, initial: int, shown: bool):
        looks = dict(desc="train", unit="step", dynamic_ncols=True, smoothing=0.05)
        self.bar = tqdm(total=total, initial=initial, disable=not shown, **looks)
        self.first, self.started = initial, time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    @contextlib.contextmanager
    def compiling(self, step: int) -> Generator[None]:
        """Show the elapsed seconds while the first step compiles. Do nothing for other steps."""
        if step != self.first or self.bar.disable:
            yield
            return
        done, started = threading.Event(), time.perf_counter()

        def show() -> None:
            while not done.wait(1):
                seconds = time.perf_counter() - started
                self.bar.set_description_str(f"train: compiling the first step, {seconds:.0f} s")

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self.bar.set_description_str("train")
        # Exclude the compilation from the bar's time per step.
        self.bar.start_t = self.bar.last_print_t = time.time()
        self.bar.initial = self.bar.n + 1

    def update(self, step: int, last: dict[str, jax.Array]) -> None:
        """Advance the bar by one step.

        Waits for the results of the first and the fifth step of this process, to measure the time between them.

        step: number of finished steps of the run. last: metrics of the last step.
        """
        self.bar.update()
        if self.bar.disable:
            return
        done = step - self.first
        if done == 1:
            jax.block_until_ready(last)
            self.started = time.perf_counter()
        if done == ESTIMATE_AFTER and self.bar.total - step > ESTIMATE_AFTER:
            jax.block_until_ready(last)
            seconds = (time.perf_counter() - self.started) / (done - 1)
            rest = (self.bar.total - step) * seconds
            self.bar.write(f"{seconds:.2g} s a step: about {duration(rest)} for {self.bar.total - step} more steps")


def duration(seconds: Number) -> str:
    """Format a duration: "40 s", "7 min", "3.5 h", "2.1 days"."""
    for name, unit, below in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 48 * 3600)):
        if seconds < below:
            return f"{seconds / unit:.{1 if name == 'h' else 0}f} {name}"
    return f"{seconds / 86400:.1f} days"
