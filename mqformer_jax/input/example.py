"""The Example: every data set of every task becomes this, and nothing downstream asks where it came from."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One text the model is asked for.

    texts: words for the same thing (synonyms, several captions); training draws one each time the image is seen.
    is_region: True if the text owns exactly one region (semantic, referring, foreground), False if it may own several
        segments (instances). The model is told (`is_region` in the Batch).
    exhaustive: all that this text names in the image is labeled, so whatever is not matched to it may be taught
        "absent". Where it is False, a query that matched nothing is left in peace about this text.
    weight: how readily the prompt is drawn as a negative where not all of them can be asked (`choose_prompts`).
    """

    texts: tuple[str, ...]
    is_region: bool
    exhaustive: bool = True
    weight: float = 1.0


@dataclasses.dataclass
class Target:
    """One segment to be found.

    prompts: indices into `Example.prompts` of all the texts that name it (its class, the expressions that refer to it).
    box: float32 [4], x0, y0, x1, y1 in pixels of the image.
    mask: bool [h, w], or None where only the box is known. A window of the image: pixel (0, 0) lies at `at` (top,
        left), and nothing outside belongs to the target. Most segments are small, and time goes with area.
    """

    prompts: tuple[int, ...]
    box: np.ndarray
    mask: np.ndarray | None = None
    at: tuple[int, int] = (0, 0)


@dataclasses.dataclass
class Example:
    """One image and all that is asked of it.

    key: "dataset/image", for messages. image: uint8 [h, w, 3] RGB.
    ignore: bool [h, w], pixels where nothing is known (unlabeled, crowd): no loss is taken there.
    """

    key: str
    image: np.ndarray
    prompts: list[Prompt]
    targets: list[Target]
    ignore: np.ndarray
