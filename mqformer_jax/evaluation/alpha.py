"""Alpha mattes against the true ones: the four errors of Rhemann et al., "A Perceptually Motivated Online Benchmark",
CVPR 2009.
"""

from __future__ import annotations

from collections import defaultdict

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from mqformer_jax.evaluation import worst

SIGMA = 1.4  # of the Gaussian whose derivative `grad` compares
# of `conn`: thresholds are k / STEP; up to TOLERANCE above its connected level a pixel is connected
STEP, TOLERANCE = (
    10,
    0.15,
)
BAND = 10  # pixels around those covered in part that count as unknown where a record has no trimap
Mask = Float[np.ndarray, "h w"]


class AlphaEvaluator:
    """Means over images, of the whole image and (`unknown_`) of the part that the trimap leaves open.

    In the units of the papers: sad, grad and conn in thousands (summed over pixels), mse and mad in thousandths (means
        of pixels).
    A prediction is taken as it is: nothing is set to what the trimap knows, and nothing stretched to 0 to 1.
    """

    def __init__(self):
        self.errors: dict[str, list[tuple[str, dict[str, float]]]] = defaultdict(list)  # prefix → (image, its errors)

    def update(
        self,
        prediction: Mask,
        target: Mask,
        trimap: UInt8[np.ndarray, "h w"] | None = None,
        key: str = "",
        prefix: str = "",
    ) -> None:
        """One image: its alpha and the true one, both 0 to 1. prefix: of the metrics' names, where several predictions
        are compared.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"the predicted alpha is {prediction.shape}, the target {target.shape}.")
        prediction, target = prediction.astype(np.float64), target.astype(np.float64)
        self.errors[prefix].append((key, matting_errors(prediction, target, unknown_of(target, trimap))))

    def merge(self, other: AlphaEvaluator) -> None:
        """Adds what another process saw."""
        for prefix, errors in other.errors.items():
            self.errors[prefix] += errors

    def result(self) -> dict[str, float]:
        """sad, mse, mad, grad, conn, and the same with unknown_ in front, after the prefixes."""
        results = {}
        for prefix, images in self.errors.items():
            for name in dict.fromkeys(name for _, errors in images for name in errors):
                results[prefix + name] = float(np.mean([errors[name] for _, errors in images if name in errors]))
        return results

    def details(self) -> dict:
        """The images whose mean absolute difference is largest, by the first of the predictions compared."""
        images = next(iter(self.errors.values()), [])
        return {"worst_images": worst("mad", [(key, errors["mad"]) for key, errors in images], error=True)}


def unknown_of(target: Mask, trimap: UInt8[np.ndarray, "h w"] | None) -> Bool[np.ndarray, "h w"]:
    """The trimap's unknown region; without one, all pixels less than `BAND` away from one that is covered in part."""
    if trimap is not None:
        return (trimap > 0) & (trimap < 255)
    partly = ((target > 0) & (target < 1)).astype(np.uint8)
    return cv2.dilate(partly, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * BAND + 1,) * 2)) > 0


def matting_errors(prediction: Mask, target: Mask, unknown: Bool[np.ndarray, "h w"]) -> dict[str, float]:
    """The errors of one image, of all its pixels and of the unknown ones, if there are any."""
    difference = np.abs(prediction - target)
    gradient = (_gradient(prediction) - _gradient(target)) ** 2
    connectivity = _connectivity(prediction, target)
    errors = {}
    for prefix, where in (("", np.ones_like(unknown)), ("unknown_", unknown)):
        if where.any():
            own = difference[where]
            errors[f"{prefix}sad"], errors[f"{prefix}mse"] = own.sum() / 1000, 1000 * (own**2).mean()
            errors[f"{prefix}mad"] = 1000 * own.mean()
            errors[f"{prefix}grad"], errors[f"{prefix}conn"] = (
                gradient[where].sum() / 1000,
                connectivity[where].sum() / 1000,
            )
    return {name: float(value) for name, value in errors.items()}


def _gradient(alpha: Mask) -> Mask:
    """Its length, by derivatives of a Gaussian that reach to where it falls below 0.01 and whose kernel has norm 1."""
    reach = int(np.ceil(SIGMA * np.sqrt(-2 * np.log(np.sqrt(2 * np.pi) * SIGMA * 0.01))))
    x = np.arange(-reach, reach + 1.0)
    smooth = np.exp(-(x**2) / (2 * SIGMA**2))
    slope = -x * smooth
    smooth, slope = smooth / np.linalg.norm(smooth), slope / np.linalg.norm(slope)
    across = cv2.sepFilter2D(alpha, cv2.CV_64F, slope, smooth, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(alpha, cv2.CV_64F, smooth, slope, borderType=cv2.BORDER_REPLICATE)
    return np.hypot(across, down)


def _connectivity(prediction: Mask, target: Mask) -> Mask:
    """By how much the two differ in how far each pixel rises above the level up to which it is connected.

    That level is the last threshold before the pixel leaves the largest piece (4 neighbors) of what both have at or
    above it.
    """
    level = np.full(prediction.shape, -1.0)
    for k in range(1, STEP + 1):
        _, pieces, stats, _ = cv2.connectedComponentsWithStats(
            ((prediction >= k / STEP) & (target >= k / STEP)).astype(np.uint8), connectivity=4
        )
        inside = pieces == 1 + stats[1:, cv2.CC_STAT_AREA].argmax() if len(stats) > 1 else np.zeros(level.shape, bool)
        level[(level < 0) & ~inside] = (k - 1) / STEP
    level[level < 0] = 1.0
    above = lambda alpha: np.where(alpha - level >= TOLERANCE, alpha - level, 0.0)
    return np.abs(above(prediction) - above(target))
