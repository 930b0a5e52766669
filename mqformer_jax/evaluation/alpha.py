"""Errors of alpha mattes (Rhemann et al., "A Perceptually Motivated Online Benchmark", CVPR 2009)."""

from __future__ import annotations

from collections import defaultdict

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from mqformer_jax.evaluation import worst

SIGMA = 1.4  # standard deviation of the Gaussian derivatives in `grad`
STEP = 10  # `conn` has thresholds k / STEP
TOLERANCE = 0.15  # in `conn`, an alpha that exceeds the level of its pixel by less than this counts as equal to it
BAND = 10  # pixels; without a trimap, the unknown region reaches this far around pixels with 0 < alpha < 1
Mask = Float[np.ndarray, "h w"]


class AlphaEvaluator:
    """Errors of alpha mattes, averaged over images.

    Each error is measured on the whole image and, with the prefix `unknown_`, on the unknown region of the trimap. As
    in the papers, sad, grad and conn (sums over pixels) are in thousands, mse and mad (means over pixels) in
    thousandths. The prediction is used as it is: pixels in the known region do not get the values of the trimap, and
    values are not rescaled to 0 to 1.
    """

    def __init__(self):
        # prefix → (record key, errors) of each image
        self.errors: dict[str, list[tuple[str, dict[str, float]]]] = defaultdict(list)

    def update(
        self,
        prediction: Mask,
        target: Mask,
        trimap: UInt8[np.ndarray, "h w"] | None = None,
        key: str = "",
        prefix: str = "",
    ) -> None:
        """Add one image: predicted and true alpha, 0 to 1.

        trimap: 0 outside, 255 inside, other values unknown. key: of the record. prefix: precedes the names of the
        metrics, so that several predictions can be compared, e.g. "refined_".
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"{key or 'image'}: the prediction has shape {prediction.shape}, but the target has {target.shape}; "
                "resize the prediction to the image."
            )
        prediction, target = prediction.astype(np.float64), target.astype(np.float64)
        self.errors[prefix].append((key, matting_errors(prediction, target, unknown_of(target, trimap))))

    def merge(self, other: AlphaEvaluator) -> None:
        """Add the state of another process."""
        for prefix, errors in other.errors.items():
            self.errors[prefix] += errors

    def result(self) -> dict[str, float]:
        """Return {prefix + name: mean error over images}, for each `prefix` that was passed to `update`.

        Names are sad, mse, mad, grad and conn for the whole image, and unknown_sad to unknown_conn for the unknown
        region. The latter are means over the images that have an unknown region.
        """
        results = {}
        for prefix, images in self.errors.items():
            for name in dict.fromkeys(name for _, errors in images for name in errors):
                results[prefix + name] = float(np.mean([errors[name] for _, errors in images if name in errors]))
        return results

    def details(self) -> dict:
        """Return the images with the largest mad (mean absolute difference), for the first prefix that `update` got."""
        images = next(iter(self.errors.values()), [])
        return {"worst_images": worst("mad", [(key, errors["mad"]) for key, errors in images], error=True)}


def unknown_of(target: Mask, trimap: UInt8[np.ndarray, "h w"] | None) -> Bool[np.ndarray, "h w"]:
    """Return the unknown region of the trimap.

    Without a trimap, it consists of all pixels at most `BAND` pixels away from a pixel with 0 < alpha < 1.
    """
    if trimap is not None:
        return (trimap > 0) & (trimap < 255)
    partial = ((target > 0) & (target < 1)).astype(np.uint8)
    return cv2.dilate(partial, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * BAND + 1,) * 2)) > 0


def matting_errors(prediction: Mask, target: Mask, unknown: Bool[np.ndarray, "h w"]) -> dict[str, float]:
    """Return the errors of one image over all pixels and, with the prefix `unknown_`, over unknown pixels, if any."""
    difference = np.abs(prediction - target)
    gradient = (_gradient(prediction) - _gradient(target)) ** 2
    connectivity = _connectivity(prediction, target)
    errors = {}
    for prefix, where in (("", np.ones_like(unknown)), ("unknown_", unknown)):
        if where.any():
            selected = difference[where]
            errors[f"{prefix}sad"] = selected.sum() / 1000
            errors[f"{prefix}mse"] = 1000 * (selected**2).mean()
            errors[f"{prefix}mad"] = 1000 * selected.mean()
            errors[f"{prefix}grad"] = gradient[where].sum() / 1000
            errors[f"{prefix}conn"] = connectivity[where].sum() / 1000
    return {name: float(value) for name, value in errors.items()}


def _gradient(alpha: Mask) -> Mask:
    """Return the magnitude of the gradient at each pixel, computed with derivatives of a Gaussian.

    The kernels are cut off where the Gaussian falls below 0.01, and have an L2 norm of 1.
    """
    reach = int(np.ceil(SIGMA * np.sqrt(-2 * np.log(np.sqrt(2 * np.pi) * SIGMA * 0.01))))
    x = np.arange(-reach, reach + 1.0)
    smooth = np.exp(-(x**2) / (2 * SIGMA**2))
    slope = -x * smooth
    smooth, slope = smooth / np.linalg.norm(smooth), slope / np.linalg.norm(slope)
    across = cv2.sepFilter2D(alpha, cv2.CV_64F, slope, smooth, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(alpha, cv2.CV_64F, smooth, slope, borderType=cv2.BORDER_REPLICATE)
    return np.hypot(across, down)


def _connectivity(prediction: Mask, target: Mask) -> Mask:
    """Return the connectivity error of each pixel.

    Each pixel has a level: the highest threshold at which it is in the largest connected component (4 neighbors) of the
    pixels where both alphas reach the threshold. For both alphas, the excess is alpha - level, or 0 if that is below
    TOLERANCE. The error is the absolute difference of the two excesses.
    """
    level = np.full(prediction.shape, -1.0)
    for k in range(1, STEP + 1):
        _, components, stats, _ = cv2.connectedComponentsWithStats(
            ((prediction >= k / STEP) & (target >= k / STEP)).astype(np.uint8), connectivity=4
        )
        largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax() if len(stats) > 1 else -1  # label 0 is the background
        inside = components == largest
        level[(level < 0) & ~inside] = (k - 1) / STEP
    level[level < 0] = 1.0
    above = lambda alpha: np.where(alpha - level >= TOLERANCE, alpha - level, 0.0)
    return np.abs(above(prediction) - above(target))
