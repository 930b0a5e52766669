"""Foreground (salient object): a soft mask against a soft or hard one, with the measures that papers on salient objects
report.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from mqformer_jax.evaluation import worst

BETA2 = 0.3  # precision weighs more than recall: Achanta et al., CVPR 2009
EPS = np.spacing(1)
Mask = Float[np.ndarray, "h w"]


class ForegroundEvaluator:
    """Means over images. mae, mse: of all pixels. s_measure: Fan et al., "Structure-measure", ICCV 2017.

    max_f; mean_e, max_e: the F-measure, and the E-measure (Fan et al., "Enhanced-alignment Measure", IJCAI 2018), of
    the mean curve over 256 thresholds at its best, or in the mean. Predictions are taken as they are, not stretched to
    0 to 1 as some toolboxes do.
    """

    def __init__(self):
        self.keys: list[str] = []
        self.values: list[tuple[float, float, float]] = []  # mae, mse, s_measure of each image
        self.curves: list[np.ndarray] = []  # F and E, [2, 256]

    def update(self, prediction: Mask, target: Mask | Bool[np.ndarray, "h w"], key: str = "") -> None:
        """One image: mask probability (`soft_mask`) and the truth, both 0 to 1; an 8-bit matte is divided by 255
        first.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"the predicted mask is {prediction.shape}, the target {target.shape}.")
        prediction, hard = prediction.astype(np.float64), target > 0.5
        error = prediction - target
        self.keys.append(key)
        self.values.append((float(np.abs(error).mean()), float((error**2).mean()), s_measure(prediction, hard)))
        self.curves.append(_curves(prediction, hard))

    def merge(self, other: ForegroundEvaluator) -> None:
        """Adds what another process saw."""
        self.keys += other.keys
        self.values += other.values
        self.curves += other.curves

    def result(self) -> dict[str, float]:
        """In percent: an `mae` or `mse` of 3 is the 0.03 of the papers."""
        if not self.values:
            return {}
        (mae, mse, s), (f, e) = np.mean(self.values, axis=0), np.mean(self.curves, axis=0)
        values = {"mae": mae, "mse": mse, "max_f": f.max(), "s_measure": s, "mean_e": e.mean(), "max_e": e.max()}
        return {k: 100.0 * float(v) for k, v in values.items()}

    def details(self) -> dict:
        """The images whose S-measure is lowest."""
        return {
            "worst_images": worst("s_measure", [(key, 100.0 * s) for key, (_, _, s) in zip(self.keys, self.values)])
        }


def s_measure(prediction: Mask, target: Bool[np.ndarray, "h w"]) -> float:
    """How alike the structure is: half that of object and background, half that of the four parts around the object's
    center.
    """
    share = float(target.mean())
    if share in (0.0, 1.0):
        return float(prediction.mean()) if share else 1 - float(prediction.mean())
    of_object = share * _object_score(prediction[target]) + (1 - share) * _object_score(1 - prediction[~target])
    h, w = target.shape
    # the part above and left has the center, as in the authors' Matlab
    y, x = (int(c) + 1 for c in np.argwhere(target).mean(0).round())
    of_parts = 0.0
    for rows in (slice(0, y), slice(y, h)):
        for columns in (slice(0, x), slice(x, w)):
            part = target[rows, columns]
            if part.size:
                of_parts += part.size / target.size * _similarity(prediction[rows, columns], part)
    return max(0.0, 0.5 * of_object + 0.5 * of_parts)


def _object_score(values: Float[np.ndarray, " n"]) -> float:
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(2 * values.mean() / (values.mean() ** 2 + 1 + spread + EPS))


def _similarity(prediction: Mask, target: Bool[np.ndarray, "h w"]) -> float:
    """SSIM of the whole part, without the constants that keep it from a division by zero."""
    x, y, n = prediction.mean(), target.mean(), target.size - 1 + EPS
    covariance = ((prediction - x) * (target - y)).sum() / n
    variances = ((prediction - x) ** 2).sum() / n + ((target - y) ** 2).sum() / n
    above, below = 4 * x * y * covariance, (x**2 + y**2) * variances
    return float(above / (below + EPS)) if above else float(below == 0)


def _curves(prediction: Mask, target: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "2 256"]:
    """F- and E-measure of prediction >= t / 255 for t = 255 down to 0, on the prediction rounded to 8 bits."""
    levels = np.round(np.clip(prediction, 0, 1) * 255).astype(np.uint8)
    hits = np.bincount(levels[target], minlength=256)[::-1].cumsum()
    chosen = np.bincount(levels.ravel(), minlength=256)[::-1].cumsum()
    precision = hits / np.maximum(chosen, 1)
    recall = hits / max(int(target.sum()), 1)
    f = (1 + BETA2) * precision * recall / np.maximum(BETA2 * precision + recall, 1e-12)
    return np.stack([f, _e_curve(hits, chosen, int(target.sum()), target.size)])


def _e_curve(hits: np.ndarray, chosen: np.ndarray, owned: int, size: int) -> Float[np.ndarray, " 256"]:
    """E-measure from counts of pixels: chosen, rightly chosen (`hits`), of the object (`owned`), of the image
    (`size`).
    """
    if owned in (0, size):
        return (chosen if owned else size - chosen) / (size - 1 + EPS)
    counts = {(1, 1): hits, (1, 0): chosen - hits, (0, 1): owned - hits, (0, 0): size - chosen - owned + hits}
    total = 0.0
    for (predicted, true), count in counts.items():  # in each of the four sets all pixels are alike
        a, b = predicted - chosen / size, true - owned / size
        total = total + count * (2 * a * b / (a**2 + b**2 + EPS) + 1) ** 2 / 4
    return total / (size - 1 + EPS)
