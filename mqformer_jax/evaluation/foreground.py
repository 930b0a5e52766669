"""Foreground (salient object, matte): a soft mask against a soft or hard one."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

BETA2 = 0.3  # precision weighs more than recall: Achanta et al., CVPR 2009


class ForegroundEvaluator:
    """Means over images. mae, mse: of all pixels. max_f: the F-measure of the mean curve at its best of 255 thresholds."""

    def __init__(self):
        self.mae: list[float] = []
        self.mse: list[float] = []
        self.curves: list[np.ndarray] = []

    def update(self, prediction: Float[np.ndarray, "h w"], target: Float[np.ndarray, "h w"] | Bool[np.ndarray, "h w"]) -> None:
        """One image: mask probability (`soft_mask`) and the truth, both 0 to 1; an 8-bit matte is divided by 255 first."""
        if prediction.shape != target.shape:
            raise ValueError(f"the predicted mask is {prediction.shape}, the target {target.shape}.")
        error = prediction.astype(np.float64) - target
        self.mae.append(float(np.abs(error).mean()))
        self.mse.append(float((error**2).mean()))
        self.curves.append(_f_curve(prediction, target > 0.5))

    def merge(self, other: ForegroundEvaluator) -> None:
        """Adds what another process saw."""
        self.mae += other.mae
        self.mse += other.mse
        self.curves += other.curves

    def result(self) -> dict[str, float]:
        """In percent: an `mae` or `mse` of 3 is the 0.03 of the papers."""
        if not self.mae:
            return {}
        values = {"mae": np.mean(self.mae), "mse": np.mean(self.mse), "max_f": np.mean(self.curves, axis=0).max()}
        return {k: 100.0 * float(v) for k, v in values.items()}


def _f_curve(prediction: np.ndarray, target: np.ndarray) -> Float[np.ndarray, "255"]:
    """F-measure of prediction >= t / 255 for t = 255 down to 1, on the prediction rounded to 8 bits."""
    levels = np.round(np.clip(prediction, 0, 1) * 255).astype(np.uint8)
    hits = np.bincount(levels[target], minlength=256)[:0:-1].cumsum()
    chosen = np.bincount(levels.ravel(), minlength=256)[:0:-1].cumsum()
    precision = hits / np.maximum(chosen, 1)
    recall = hits / max(int(target.sum()), 1)
    return (1 + BETA2) * precision * recall / np.maximum(BETA2 * precision + recall, 1e-12)
