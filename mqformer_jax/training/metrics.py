"""Write training metrics to metrics.jsonl and TensorBoard, and summarize them for the progress bar."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from mqformer_jax.files import write_text
from mqformer_jax.parallel.distributed import is_first
from mqformer_jax.training.optimizer import schedule


class Metrics:
    """A writer of mean metrics to metrics.jsonl and TensorBoard. Only the first process writes.

    Metrics stay on the device until `write`, so that `add` never waits for a step.

    sources: names of the data sets, which `Batch.source` indexes. step: the step at which the run starts; lines of
    later steps are dropped from an existing file.
    """

    def __init__(self, workdir: str, config: ConfigDict, sources: list[str], step: int):
        self.sources, self.batch_size = sources, config.batch_size
        self.rate = schedule(config.optimizer, config.steps)
        self.pending: list[dict[str, Any]] = []
        self.images = dict.fromkeys(sources, 0)  # number of images used from each data set since step 0
        self.started = time.perf_counter()
        self.writes = is_first()
        if self.writes:
            self.path = os.path.join(workdir, "metrics.jsonl")
            before = _forget_after(self.path, step)
            self.images = {name: before.get(f"images/{name}", 0) for name in sources}
            self.board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=step + 1)

    def add(self, measured: dict[str, Any]) -> None:
        """Store the metrics of a step until the next `write`."""
        self.pending.append(measured)

    def write(self, step: int) -> str:
        """Write the means of the metrics stored since the last `write`; return a summary for the progress bar."""
        pending, self.pending = jax.device_get(self.pending), []
        now, finite = time.perf_counter(), [m for m in pending if m["finite"]]
        terms = [k for k in pending[0] if np.ndim(pending[0][k]) == 0 and k not in ("finite", "alive")]
        values: dict[str, float] = {f"loss/{k}": float(np.mean([m[k] for m in finite or pending])) for k in terms}
        values["gradient_norm"] = values.pop("loss/gradient_norm")
        values |= {"skipped": len(pending) - len(finite)} if len(finite) < len(pending) else {}
        by_source = defaultdict(list)
        for m in pending:
            for source, loss in zip(m["source"], m["per_image"]):
                by_source[self.sources[source]].append(loss)
        values.update({f"source/{name}": float(np.mean(losses)) for name, losses in sorted(by_source.items())})
        for name, losses in by_source.items():
            self.images[name] += len(losses)
        values.update({f"images/{name}": count for name, count in self.images.items()})
        for kind, (learnable, targets) in zip(("instances", "regions"), np.sum([m["taken"] for m in pending], 0)):
            values[f"learnable_share/{kind}"] = float(learnable / max(targets, 1))
        values["learning_rate"] = float(self.rate(step - 1))
        values["images_per_second"] = len(pending) * self.batch_size / (now - self.started)
        self.started = now
        self._emit(step, values)
        return f"loss {values['loss/total']:.3f}, {values['images_per_second']:.1f} images/s"

    def write_evaluation(self, step: int, results: dict[str, float]) -> None:
        """Write evaluation results. The time since the last write is not included in images_per_second."""
        self._emit(step, {f"eval/{k}": v for k, v in results.items()})
        self.started = time.perf_counter()

    def close(self) -> None:
        if self.writes:
            self.board.close()

    def _emit(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        # Close the file after each line, since a mounted bucket stores a file only when it is closed.
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def _forget_after(path: str, step: int) -> dict[str, int | float]:
    """Drop lines after `step` and a truncated last line from a metrics file; return the last value of each metric."""
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        lines = [json.loads(line) for line in f if line.endswith("\n")]
    known = [line for line in lines if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in known))
    return {key: value for line in known for key, value in line.items()}
