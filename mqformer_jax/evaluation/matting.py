"""Mattes: alphas against the true ones, in the units of the matting papers, and a refiner against the masks it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from mqformer_jax.input.mattes import Matte

Mask = Float[np.ndarray, "h w"]
ROW = 200  # height of a picture sheet's row, pixels


class MattingEvaluator:
    """Means over images, of whole images. sad: summed absolute difference in thousands of pixels. mse: mean squared difference."""

    def __init__(self):
        self.sad: list[float] = []
        self.mse: list[float] = []

    def update(self, prediction: Mask, target: Mask) -> None:
        """One image: its alpha and the true one, both 0 to 1."""
        if prediction.shape != target.shape:
            raise ValueError(f"the predicted alpha is {prediction.shape}, the target {target.shape}.")
        error = prediction.astype(np.float64) - target
        self.sad.append(float(np.abs(error).sum()) / 1000)
        self.mse.append(float((error**2).mean()))

    def result(self) -> dict[str, float]:
        return {"sad": float(np.mean(self.sad)), "mse": float(np.mean(self.mse))} if self.sad else {}


def compare(
    refine: Callable[[np.ndarray, np.ndarray], np.ndarray], mattes: Iterable[Matte], guide: Callable[[Matte], Mask | None], pictures: int
) -> tuple[dict[str, dict[str, float]], list[UInt8[np.ndarray, "h w 3"]]]:
    """{"mask", "refined": result} of a `Refiner` on masks that `guide` makes (None: leave this one out), and a sheet's first rows.

    A row shows the image, the mask, the refined alpha and the true one.
    """
    evaluators, rows = {"mask": MattingEvaluator(), "refined": MattingEvaluator()}, []
    for matte in mattes:
        mask = guide(matte)
        if mask is None:
            continue
        refined = refine(matte.image, mask[None])[0]
        evaluators["mask"].update(mask, matte.alpha)
        evaluators["refined"].update(refined, matte.alpha)
        if len(rows) < pictures:
            rows.append(_row(matte.image, mask, refined, matte.alpha))
    return {name: evaluator.result() for name, evaluator in evaluators.items()}, rows


def _row(image: UInt8[np.ndarray, "h w 3"], *alphas: Mask) -> UInt8[np.ndarray, "h2 w2 3"]:
    grey = [np.repeat(np.round(alpha * 255).astype(np.uint8)[..., None], 3, 2) for alpha in alphas]
    return _sized(np.concatenate([image, *grey], 1))


def _sized(row: np.ndarray) -> np.ndarray:
    return cv2.resize(row, (round(row.shape[1] * ROW / row.shape[0]), ROW), interpolation=cv2.INTER_AREA)


def save_sheet(path: str, rows: list[UInt8[np.ndarray, "h w 3"]]) -> None:
    """Rows below each other as one picture, the narrower ones filled up on the right."""
    width = max(row.shape[1] for row in rows)
    sheet = np.concatenate([np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=128) for row in rows])
    cv2.imwrite(path, cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
