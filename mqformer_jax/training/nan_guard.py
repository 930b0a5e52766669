"""Handle a NaN or infinite loss or gradient: stop the run or skip the step, and save the batch to reproduce it."""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mqformer_jax.checkpoint import Weights, save_weights
from mqformer_jax.input.mixture import Loader
from mqformer_jax.parallel.mesh import gather_to_host
from mqformer_jax.training.step import TrainState

IN_A_ROW = 20  # largest number of consecutive skipped steps; one more stops the run
KEPT = 5  # number of skipped batches that a run saves


class NotFinite:
    """A check that the loss and the gradient of each step are finite.

    If they are not, the run stops (`config.not_finite` is "stop") or the step is skipped ("skip").
    """

    def __init__(self, config: ConfigDict, workdir: str, loader: Loader):
        self.config, self.workdir, self.loader = config, workdir, loader
        self.skipped = self.in_a_row = 0
        self.checked = -1

    def check(self, step: int, measured: dict[str, Any], state: TrainState) -> None:
        """Wait for a step to finish and check its metrics.

        step: counted from 0. measured: the step's metrics. state: the state after this or a later step. With "stop",
        its weights are those that caused the failure, because no step changes them afterwards.

        If the run must stop, this saves the batch, the names of its images and the weights in WORKDIR/not_finite_STEP
        and raises FloatingPointError with a message of one line. With "skip", it saves the first few failed batches.
        """
        if step <= self.checked:
            return
        self.checked = step
        if bool(measured["finite"]):
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        stops = self.config.not_finite == "stop" or self.in_a_row > IN_A_ROW
        folder = os.path.join(self.workdir, f"not_finite_{step}")
        images = self._keep_batch(step, folder, measured) if stops or self.skipped <= KEPT else "the batch is not saved"
        loss, norm = float(measured["total"]), float(measured["gradient_norm"])
        what = f"step {step}: the loss is {loss} and the gradient norm is {norm}; {images}"
        if not stops:
            logging.warning("%s; the step is skipped (%d so far)", what, self.skipped)
            return
        params, frozen = (gather_to_host(tree, _mesh(state)) for tree in (state.params, state.frozen))
        weights = Weights(self.config, params, frozen)
        save_weights(folder, weights, {"step": step})
        raise FloatingPointError(
            f"{what}; {folder} contains the batch and the weights. Check these images, lower the learning rate, or set "
            f"config.not_finite='skip', which skips up to {IN_A_ROW} such steps in a row."
        )

    def _keep_batch(self, step: int, folder: str, measured: dict[str, Any]) -> str:
        """Load this host's part of a step's batch again and save it as FOLDER/HOST.npz and FOLDER/HOST.json.

        Returns a text that names the images whose loss is not finite (or all images, if every loss is finite).
        """
        host, hosts = jax.process_index(), jax.process_count()
        batch, notes = next(self.loader.stream(step, host, hosts))
        os.makedirs(folder, exist_ok=True)
        np.savez_compressed(
            os.path.join(folder, f"{host}.npz"), **{name: getattr(batch, name) for name in batch.__dataclass_fields__}
        )
        rows: list[dict[str, Any]] = [
            {"data": self.loader.names[s], "image": note.key, "prompts": note.texts}
            for s, note in zip(batch.source, notes)
        ]
        losses = np.asarray(measured["per_image"], np.float64)[len(rows) * host : len(rows) * (host + 1)]
        for row, loss in zip(rows, losses):
            row["loss"] = float(loss) if np.isfinite(loss) else str(loss)
        with open(os.path.join(folder, f"{host}.json"), "w") as f:
            json.dump({"step": step, "rows": rows}, f, indent=1)
        broken = [row for row in rows if isinstance(row["loss"], str)] or rows
        return f"affected images {', '.join(row['image'] for row in broken[:4])}{' ...' if len(broken) > 4 else ''}"


def _mesh(state: TrainState) -> jax.sharding.Mesh:
    return state.step.sharding.mesh
