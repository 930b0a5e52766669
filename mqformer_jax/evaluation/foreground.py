"""Salient-object metrics: compare a predicted soft mask of the foreground with the true mask or matte."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from mqformer_jax.evaluation import worst

BETA2 = 0.3  # beta squared of the F-measure; below 1, it favors precision over recall (Achanta et al., CVPR 2009)
EPS = np.spacing(1)
Mask = Float[np.ndarray, "h w"]


class ForegroundEvaluator:
    """Salient-object metrics, averaged over images.

    mae, mse: mean absolute and mean squared error of the pixels. s_measure: Fan et al., "Structure-measure", ICCV 2017.
    max_f: the F-measure is averaged over images at each of 256 thresholds; max_f is its maximum over the thresholds.
    mean_e, max_e: the same for the E-measure (Fan et al., "Enhanced-alignment Measure", IJCAI 2018), with the mean and
    the maximum over the thresholds. Some toolboxes rescale predictions to 0 to 1; this evaluator does not.
    """

    def __init__(self):
        self.keys: list[str] = []
        self.values: list[tuple[float, float, float]] = []  # mae, mse, s_measure of each image
        self.curves: list[np.ndarray] = []  # F- and E-measure of each image at all thresholds, [2, 256]

    def update(self, prediction: Mask, target: Mask | Bool[np.ndarray, "h w"], key: str = "") -> None:
        """Add one image. prediction: `soft_mask`. target: the true mask or matte. The values of both are 0 to 1."""
        if prediction.shape != target.shape:
            raise ValueError(
                f"{key or 'image'}: the prediction has shape {prediction.shape}, but the target has {target.shape}; "
                "resize the prediction to the image."
            )
        prediction, hard = prediction.astype(np.float64), target > 0.5
        error = prediction - target
        self.keys.append(key)
        self.values.append((float(np.abs(error).mean()), float((error**2).mean()), s_measure(prediction, hard)))
        self.curves.append(_curves(prediction, hard))

    def merge(self, other: ForegroundEvaluator) -> None:
        """Add the state of another process."""
        self.keys += other.keys
        self.values += other.values
        self.curves += other.curves

    def result(self) -> dict[str, float]:
        """Return the metrics in percent: an `mae` or `mse` of 3 is 0.03 in the papers."""
        if not self.values:
            return {}
        (mae, mse, s), (f, e) = np.mean(self.values, axis=0), np.mean(self.curves, axis=0)
        values = {"mae": mae, "mse": mse, "max_f": f.max(), "s_measure": s, "mean_e": e.mean(), "max_e": e.max()}
        return {k: 100.0 * float(v) for k, v in values.items()}

    def details(self) -> dict:
        """Return the images with the lowest S-measure."""
        return {
            "worst_images": worst("s_measure", [(key, 100.0 * s) for key, (_, _, s) in zip(self.keys, self.values)])
        }


def s_measure(prediction: Mask, target: Bool[np.ndarray, "h w"]) -> float:
    """Return the structure measure: the mean of an object-aware and a region-aware similarity.

    The object-aware similarity compares prediction and target separately in the target's object and in its background.
    The region-aware similarity compares them in each of the four quadrants that meet at the centroid of that object.
    """
    share = float(target.mean())
    if share in (0.0, 1.0):
        return float(prediction.mean()) if share else 1 - float(prediction.mean())
    object_score = share * _object_score(prediction[target]) + (1 - share) * _object_score(1 - prediction[~target])
    h, w = target.shape
    # The upper left quadrant includes the center, as in the authors' Matlab code.
    y, x = (int(c) + 1 for c in np.argwhere(target).mean(0).round())
    region_score = 0.0
    for rows in (slice(0, y), slice(y, h)):
        for columns in (slice(0, x), slice(x, w)):
            part = target[rows, columns]
            if part.size:
                region_score += part.size / target.size * _similarity(prediction[rows, columns], part)
    return max(0.0, 0.5 * object_score + 0.5 * region_score)


def _object_score(values: Float[np.ndarray, " n"]) -> float:
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(2 * values.mean() / (values.mean() ** 2 + 1 + spread + EPS))


def _similarity(prediction: Mask, target: Bool[np.ndarray, "h w"]) -> float:
    """Return the SSIM of a quadrant, without the constants that avoid a division by zero."""
    x, y, n = prediction.mean(), target.mean(), target.size - 1 + EPS
    covariance = ((prediction - x) * (target - y)).sum() / n
    variances = ((prediction - x) ** 2).sum() / n + ((target - y) ** 2).sum() / n
    above, below = 4 * x * y * covariance, (x**2 + y**2) * variances
    return float(above / (below + EPS)) if above else float(below == 0)


def _curves(prediction: Mask, target: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "2 256"]:
    """Return the F- and E-measure at the thresholds 255 to 0, for the prediction rounded to 8 bits."""
    levels = np.round(np.clip(prediction, 0, 1) * 255).astype(np.uint8)
    hits = np.bincount(levels[target], minlength=256)[::-1].cumsum()
    chosen = np.bincount(levels.ravel(), minlength=256)[::-1].cumsum()
    precision = hits / np.maximum(chosen, 1)
    recall = hits / max(int(target.sum()), 1)
    f = (1 + BETA2) * precision * recall / np.maximum(BETA2 * precision + recall, 1e-12)
    return np.stack([f, _e_curve(hits, chosen, int(target.sum()), target.size)])


def _e_curve(hits: np.ndarray, chosen: np.ndarray, owned: int, size: int) -> Float[np.ndarray, " 256"]:
    """Return the E-measure at 256 thresholds, computed from numbers of pixels.

    hits: true positives. chosen: predicted pixels. owned: pixels of the object. size: pixels of the image.
    """
    if owned in (0, size):
        return (chosen if owned else size - chosen) / (size - 1 + EPS)
    counts = {(1, 1): hits, (1, 0): chosen - hits, (0, 1): owned - hits, (0, 0): size - chosen - owned + hits}
    total = 0.0
    for (predicted, true), count in counts.items():  # all pixels of each of these four sets have the same value
        a, b = predicted - chosen / size, true - owned / size
        total = total + count * (2 * a * b / (a**2 + b**2 + EPS) + 1) ** 2 / 4
    return total / (size - 1 + EPS)
