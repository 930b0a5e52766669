"""The `Example`: one image with prompts and targets, in the same format for all data sets and tasks."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One text prompt.

    texts: wordings with the same meaning (synonyms of a class); training draws one each time the image is used.
    is_region: True if the prompt owns one region (semantic, referring, foreground), False if it may own several
        segments (instances). It is an input of the model (`Batch.is_region`). Exception: an expression that labels
        several segments has a target for each of them.
    exhaustive: whether everything in the image that fits the prompt is labeled. If so, the prompt is a negative for
        unmatched queries. If not, unmatched queries have no loss for it.
    weight: relative probability that the prompt is drawn as a negative if there are too many (`choose_prompts`).
    """

    texts: tuple[str, ...]
    is_region: bool
    exhaustive: bool = True
    weight: float = 1.0


@dataclasses.dataclass
class Target:
    """One segment to predict.

    prompts: indices into `Example.prompts` of all prompts that the segment fits (its class, its expressions).
    box: float32 [4], x0, y0, x1, y1 in pixels of the image.
    mask: bool [h, w], or None if only the box is known. It is a crop of the mask of the whole image, which saves time
        because most segments are small. No pixel outside the crop belongs to the target.
    at: row and column in the image of the mask's first pixel.
    """

    prompts: tuple[int, ...]
    box: np.ndarray
    mask: np.ndarray | None = None
    at: tuple[int, int] = (0, 0)


@dataclasses.dataclass
class Example:
    """One image with its prompts and targets.

    key: "dataset/image", for messages. image: uint8 [h, w, 3] RGB.
    ignore: bool [h, w], unlabeled pixels and crowds. They have no loss.
    """

    key: str
    image: np.ndarray
    prompts: list[Prompt]
    targets: list[Target]
    ignore: np.ndarray
