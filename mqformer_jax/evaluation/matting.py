"""Measure how much a matting refiner improves masks: metrics and images before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from mqformer_jax.evaluation.alpha import AlphaEvaluator
from mqformer_jax.matting.data import Matte

Mask = Float[np.ndarray, "h w"]
ROW = 200  # height of a row of the grid, pixels


def compare(
    refine: Callable[[np.ndarray, np.ndarray], np.ndarray],
    mattes: Iterable[Matte],
    guide: Callable[[Matte], Mask | None],
    num_visualizations: int,
) -> tuple[dict[str, dict[str, float]], list[UInt8[np.ndarray, "_h _w 3"]]]:
    """Return the metrics of masks and of the alphas that a refiner makes from them, and rows of images.

    The metrics are {"mask": metrics, "refined": metrics} (see `AlphaEvaluator.result`). refine: a `Refiner`.
    guide: returns the mask to refine for a matte, or None to leave the matte out. Each of the first
    `num_visualizations` mattes has a row: image, mask, refined alpha and true alpha.
    """
    evaluators, rows = {"mask": AlphaEvaluator(), "refined": AlphaEvaluator()}, []
    for matte in mattes:
        mask = guide(matte)
        if mask is None:
            continue
        refined = refine(matte.image, mask[None])[0]
        evaluators["mask"].update(mask, matte.alpha, matte.trimap)
        evaluators["refined"].update(refined, matte.alpha, matte.trimap)
        if len(rows) < num_visualizations:
            rows.append(_row(matte.image, mask, refined, matte.alpha))
    return {name: evaluator.result() for name, evaluator in evaluators.items()}, rows


def _row(image: UInt8[np.ndarray, "h w 3"], *alphas: Mask) -> UInt8[np.ndarray, "h2 w2 3"]:
    gray = [np.repeat(np.round(alpha * 255).astype(np.uint8)[..., None], 3, 2) for alpha in alphas]
    return _sized(np.concatenate([image, *gray], 1))


def _sized(row: np.ndarray) -> np.ndarray:
    return cv2.resize(row, (round(row.shape[1] * ROW / row.shape[0]), ROW), interpolation=cv2.INTER_AREA)


def save_grid(path: str, rows: list[UInt8[np.ndarray, "_h _w 3"]]) -> None:
    """Write the rows as one image file, one below the other, padded on the right to the same width."""
    width = max(row.shape[1] for row in rows)
    grid = np.concatenate(
        [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=128) for row in rows]
    )
    cv2.imwrite(path, cv2.cvtColor(grid, cv2.COLOR_RGB2BGR))
