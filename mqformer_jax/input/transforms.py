"""Augmentations that transform an image and its labels together: crop, resize, mirror, color jitter.

All randomness comes from the `rng` argument.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import Num, UInt8

from mqformer_jax.input.batch import PAD
from mqformer_jax.input.example import Example, Target
from mqformer_jax.input.prompts import mirror

MIN_AREA = 4.0  # pixels; smaller targets are dropped


def resize_crop(
    example: Example, canvas: tuple[int, int], rng: np.random.Generator, scale_range: tuple[float, float]
) -> Example:
    """Resize by a random factor and crop to a random window that fits the canvas (large-scale jitter).

    scale_range: range of the factor. A factor of 1 fits the whole image into the canvas; Mask DINO draws factors from
    0.1 to 2.0 for a canvas of 1024 x 1024. The image is cropped before it is resized, so that only pixels of the result
    are computed. canvas: height, width. The result may be smaller than the canvas; `collate` pads it.
    """
    h, w = example.image.shape[:2]
    ratio = _fill_ratio(h, w, canvas) * rng.uniform(*scale_range)
    ch, cw = (min(side, max(1, round(room / ratio))) for side, room in zip((h, w), canvas))
    y, x = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1))
    return _place(example, (y, x, ch, cw), _scaled(ch, cw, ratio, canvas))


def fit(example: Example, canvas: tuple[int, int]) -> Example:
    """Resize the image to the largest size that fits the canvas (height, width)."""
    h, w = example.image.shape[:2]
    return _place(example, (0, 0, h, w), _scaled(h, w, _fill_ratio(h, w, canvas), canvas))


def fit_image(
    image: UInt8[np.ndarray, "h w 3"], canvas: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[int, int]]:
    """Resize an image as `fit` does. Return it padded to the canvas, and its (height, width) without the padding."""
    size = _scaled(*image.shape[:2], _fill_ratio(*image.shape[:2], canvas), canvas)
    padded = np.full((*canvas, 3), PAD, np.uint8)
    padded[: size[0], : size[1]] = resize_image(image, size)
    return padded, size


def random_flip(example: Example, rng: np.random.Generator, probability: float) -> Example:
    """Mirror the image with the given probability, and swap "left" and "right" in its prompts.

    An image with a prompt that cannot be mirrored is never mirrored.
    """
    if rng.random() >= probability:
        return example
    prompts = [mirror(prompt) for prompt in example.prompts]
    if None in prompts:
        return example
    width = example.image.shape[1]
    targets = [_flip_target(t, width) for t in example.targets]
    return dataclasses.replace(
        example, image=cv2.flip(example.image, 1), prompts=prompts, targets=targets, ignore=_flipped(example.ignore)
    )


def color_jitter(example: Example, rng: np.random.Generator, strength: float) -> Example:
    """Change brightness, contrast and saturation, each by a random factor of 1 - strength to 1 + strength."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    gray = cv2.cvtColor(example.image, cv2.COLOR_RGB2GRAY)
    levels = np.arange(256, dtype=np.float32)
    table = brightness * (contrast * levels + (1 - contrast) * float(gray.mean()))
    image = cv2.addWeighted(example.image, saturation, cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), 1 - saturation, 0)
    return dataclasses.replace(example, image=cv2.LUT(image, np.clip(np.rint(table), 0, 255).astype(np.uint8)))


def resize_image(image: Num[np.ndarray, "h w *c"], size: tuple[int, int]) -> Num[np.ndarray, "H W *c"]:
    """Resize an image bilinearly, or by averaging areas if it shrinks to less than half its height.

    Bilinear interpolation would then skip pixels.
    """
    if image.shape[:2] == size:
        return image
    shrinks = size[0] * 2 < image.shape[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _fill_ratio(h: int, w: int, canvas: tuple[int, int]) -> float:
    return min(canvas[0] / h, canvas[1] / w)


def _scaled(h: int, w: int, ratio: float, canvas: tuple[int, int]) -> tuple[int, int]:
    return min(canvas[0], max(1, round(h * ratio))), min(canvas[1], max(1, round(w * ratio)))


def _place(example: Example, window: tuple[int, int, int, int], size: tuple[int, int]) -> Example:
    """Crop the window (top, left, height, width) of the image and resize it to `size`.

    A prompt whose targets are all outside the window becomes a negative. A prompt is no longer exhaustive if some of
    its targets are partly inside but none is large enough to be kept.
    """
    y, x, h, w = window
    cut = np.s_[y : y + h, x : x + w]
    sources = _nearest(y, h, size[0]), _nearest(x, w, size[1])
    targets, seen = [], set()
    for target in example.targets:
        moved, visible = _move_box(target, window, size) if target.mask is None else _move_mask(target, window, sources)
        if moved is not None:
            targets.append(moved)
        elif visible:
            seen.update(target.prompts)
    unsure = seen.difference(*(t.prompts for t in targets))
    prompts = [dataclasses.replace(p, exhaustive=False) if i in unsure else p for i, p in enumerate(example.prompts)]
    image = resize_image(example.image[cut], size)
    ignore = _resample(example.ignore, *sources) if example.ignore[cut].any() else np.zeros(size, bool)
    return Example(example.key, image, prompts, targets, ignore)


def _move_box(target: Target, window: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[Target | None, bool]:
    """Return the target with its box moved to the window, and whether any part of it is visible.

    The target is None if its box is too small. window, size: as in `_place`.
    """
    y, x, h, w = window
    box = (target.box - np.array([x, y, x, y])) * np.array([size[1] / w, size[0] / h] * 2)
    box = np.clip(box, 0, [size[1], size[0]] * 2).astype(np.float32)
    area = float((box[2] - box[0]) * (box[3] - box[1]))
    return (dataclasses.replace(target, box=box) if area >= MIN_AREA else None), area > 0


def _move_mask(
    target: Target, window: tuple[int, int, int, int], sources: tuple[np.ndarray, np.ndarray]
) -> tuple[Target | None, bool]:
    """Return the same as `_move_box`, but for a target with a mask.

    sources: the row of the image from which each new row is taken, and the column for each new column.
    """
    y, x, h, w = window
    top, left = target.at
    inside = np.s_[max(y - top, 0) : max(y + h - top, 0), max(x - left, 0) : max(x + w - left, 0)]
    rows, columns = (
        np.searchsorted(source, (at, at + side)) for source, at, side in zip(sources, target.at, target.mask.shape)
    )
    ys, xs = sources[0][slice(*rows)] - top, sources[1][slice(*columns)] - left
    mask = _resample(target.mask, ys, xs) if len(ys) * len(xs) >= MIN_AREA else np.zeros((1, 1), bool)
    bx, by, bw, bh = cv2.boundingRect(mask.view(np.uint8))
    if bw * bh < MIN_AREA or np.count_nonzero(mask) < MIN_AREA:
        return None, bool(target.mask[inside].any())
    top, left = int(rows[0]), int(columns[0])
    box = np.array([left + bx, top + by, left + bx + bw, top + by + bh], np.float32)
    # Crop the mask again: the crop of the image can remove all pixels at an edge of the mask.
    return dataclasses.replace(target, box=box, mask=mask[by : by + bh, bx : bx + bw], at=(top + by, left + bx)), True


def _nearest(start: int, length: int, size: int) -> np.ndarray:
    """Return the source pixel of each of `size` new pixels in nearest-neighbor resizing.

    The source pixels are start to start + length - 1. A new pixel takes the source pixel that contains its center.
    """
    return start + ((2 * np.arange(size) + 1) * length) // (2 * size)


def _resample(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return mask[rows][:, columns]. To select columns as rows of the transpose is three times as fast."""
    transposed = cv2.transpose(np.ascontiguousarray(mask).view(np.uint8)).take(columns, 0)
    return cv2.transpose(transposed).take(rows, 0).view(bool)


def _flip_target(target: Target, width: int) -> Target:
    x0, y0, x1, y1 = target.box
    box = np.array([width - x1, y0, width - x0, y1], np.float32)
    if target.mask is None:
        return dataclasses.replace(target, box=box)
    (top, left), mask = target.at, target.mask
    return dataclasses.replace(target, box=box, mask=_flipped(mask), at=(top, width - left - mask.shape[1]))


def _flipped(mask: np.ndarray) -> np.ndarray:
    return cv2.flip(np.ascontiguousarray(mask).view(np.uint8), 1).view(bool)
