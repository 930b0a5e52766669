"""Referring phrases, and how certainly each object of an image fits them.

A certainty is a number. If it is above 0 (up to 1), the phrase certainly fits the object, and higher values mean a
clearer case. If it is 0, the phrase may fit; if it is -1, the phrase does not fit. A phrase identifies an object if it
certainly fits this object and does not fit any other (`identifies`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mqformer_jax.input.record import ClassInfo
from mqformer_jax.synthesize import nouns
from mqformer_jax.synthesize.color_names import TERMS

# The axis along which each word compares objects (0: x, 1: y), and the direction along this axis.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
OF_TWO = {"left": (0, -1), "right": (0, 1), "upper": (1, -1), "lower": (1, 1)}
OF_MORE = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
_EXTREMES = {**OF_TWO, **OF_MORE}

# Distances of centers, as fractions of the image's width or height. A relation may certainly hold beyond CLEAR, and it
# does not hold below DENIED. An extreme object must be more than LEAD ahead of the next one.
CLEAR, DENIED, LEAD = 0.1, -0.03, 0.07
REACH = 0.3  # fraction of the image's diagonal; beyond this gap between two boxes, a relation is uncertain
# Ratios of the lengths of two objects, where a length is the square root of an area. From SMALLER on, one object is
# clearly smaller than the other. Up to SAME, the two count as equally large.
SMALLER, SAME = 1.5, 1.2


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """All objects of an image, including those without a caption.

    segments: the index of each object in `Record.segments`.
    nouns: the words that captions may use for each object (see `Nouns`).
    boxes: x0, y0, x1, y1 in pixels.
    lengths: lower and upper bound of the square root of the area in pixels. They differ if parts may be hidden.
    colors: the certainty of each of `TERMS`.
    width, height: of the image in pixels.
    """

    segments: Sequence[int]
    classes: Sequence[ClassInfo]
    nouns: Sequence[tuple[str, ...]]
    boxes: Float[np.ndarray, "n 4"]
    lengths: Float[np.ndarray, "n 2"]
    colors: Float[np.ndarray, "n 11"]
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Phrase:
    """The phrase 'the [extreme] [size] [color] noun [relation anchor]'.

    anchor: the object that `relation` refers to, as its index in the scene and a phrase that identifies it.
    """

    noun: str
    color: str | None = None
    size: str | None = None
    extreme: str | None = None
    relation: str | None = None
    anchor: tuple[int, Phrase] | None = None

    def __str__(self) -> str:
        words = [
            "the",
            self.extreme,
            self.size,
            self.color,
            self.noun,
            self.relation,
            self.anchor and str(self.anchor[1]),
        ]
        return " ".join(word for word in words if word)


def identifies(phrase: Phrase, target: int, scene: Scene) -> float:
    """Return the certainty that `phrase` fits the target, or at most 0 if the phrase may fit another object."""
    held = certainties(phrase, scene)
    return float(held[target]) if (np.delete(held, target) < 0).all() else min(float(held[target]), 0.0)


def certainties(phrase: Phrase, scene: Scene) -> Float[np.ndarray, " n"]:
    """Return how certainly `phrase` fits each object: the minimum over the noun, size, color, position and relation."""
    found = np.array([nouns.certainty(phrase.noun, of) for of in scene.classes])
    if phrase.size is not None:
        found = np.minimum(found, _sized(phrase.size, found, scene.lengths))
    if phrase.color is not None:
        found = np.minimum(found, scene.colors[:, TERMS.index(phrase.color)])
    if phrase.extreme is not None:
        found = _extreme(found, *_EXTREMES[phrase.extreme], scene)
    if phrase.relation is not None:
        found = np.minimum(found, _related(phrase.anchor[0], *RELATIONS[phrase.relation], scene))
    return found


def _sized(size: str, noun: Float[np.ndarray, " n"], lengths: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """Return how certainly each object is "large" or "small" among the objects that the noun fits.

    noun: the certainty of the noun for each object. An object is certainly "large" if another one is clearly smaller
    (`SMALLER`) and none may be more than `SAME` times as large. It is not "large" if another one is clearly larger.
    "small" has the same rules with the ratios inverted.
    """
    least, most = lengths.T if size == "large" else 1 / lengths.T[::-1]
    ratio = least[:, None] / most  # [i, j]: lower bound of the ratio of i to j
    np.fill_diagonal(ratio, 1)
    surpassed = (ratio[noun > 0] >= SMALLER).any(0)
    surpasses = (ratio[:, noun > 0]).max(1, initial=0)
    foremost = (ratio[:, noun >= 0] >= 1 / SAME).all(1)
    clear = (surpasses >= SMALLER) & foremost
    return np.where(surpassed, -1.0, np.where(clear, np.clip(surpasses / (2 * SMALLER), 0, 1), 0.0))


def _extreme(head: Float[np.ndarray, " n"], axis: int, sign: int, scene: Scene) -> Float[np.ndarray, " n"]:
    """Return how certainly each object is the outermost one in a direction, judged by its center and both edges.

    head: how certainly each object fits the rest of the phrase. Only objects that may fit it are compared.
    """
    low, high = sign * scene.boxes[:, axis], sign * scene.boxes[:, axis + 2]
    middle = (low + high) / 2 / (scene.height if axis else scene.width)
    first, *others = sorted(np.flatnonzero(head >= 0), key=lambda i: -middle[i])
    lead = middle[first] - max(middle[others], default=-np.inf)
    if lead > LEAD and (low[others] <= low[first]).all() and (high[others] <= high[first]).all():
        clear = np.full(len(head), -1.0)
        clear[first] = min(head[first], 0.5 + lead)
        return clear
    return np.minimum(head, 0.0)


def _related(anchor: int, axis: int, sign: int, scene: Scene) -> Float[np.ndarray, " n"]:
    """Return how certainly each object is on one side of the object `anchor`.

    The relation is certain if the object's center lies mainly in that direction, and if the object is near the anchor
    and hardly overlaps it.
    """
    low, high = scene.boxes[:, :2], scene.boxes[:, 2:]
    away = (low + high - low[anchor] - high[anchor]) / 2
    along = sign * away[:, axis] / (scene.height if axis else scene.width)
    gap = np.maximum(low, low[anchor]) - np.minimum(high, high[anchor])  # negative if the boxes overlap
    apart = gap[:, axis] > -0.25 * np.minimum(high - low, high[anchor] - low[anchor])[:, axis]
    near = np.hypot(*np.maximum(gap, 0).T) < REACH * np.hypot(scene.width, scene.height)
    clear = (along > CLEAR) & (abs(away[:, axis]) >= abs(away[:, 1 - axis])) & apart & near
    found = np.where(clear, np.clip(0.5 + along, 0, 1), np.where(along > DENIED, 0.0, -1.0))
    found[anchor] = -1
    return found
