"""Phrases that name a thing of a picture, and how surely each thing is what they say.

A belief is a number: above 0, up to 1, it is certain that the phrase fits the thing, and how clearly; 0, unclear; -1,
it does not fit. A phrase names a thing beyond doubt where it fits this one for certain and all others not (`sole`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mqformer_jax.input.record import ClassInfo
from mqformer_jax.synthesize import nouns
from mqformer_jax.synthesize.colour_names import TERMS

# The axis of the centres that a word compares (0: x, 1: y), and the sign of "further on".
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
OF_TWO = {"left": (0, -1), "right": (0, 1), "upper": (1, -1), "lower": (1, 1)}
OF_MORE = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
_EXTREMES = {**OF_TWO, **OF_MORE}

# Fractions of the picture's width or height. Beyond CLEAR a relation holds for anyone who looks, below DENIED for
# nobody. LEAD is how far an extreme thing stands before the next.
CLEAR, DENIED, LEAD = 0.1, -0.03, 0.07
REACH = 0.3  # of the picture's diagonal, between the boxes: who stands further away is not "left of" it, but might be
# Of lengths (areas are the squares): from here on a thing is small beside another, and up to here two are of the same
# size.
SMALLER, SAME = 1.5, 1.2


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """All things of a picture, those that nobody asks about too.

    segments: index of each in the record. nouns: the words that captions may use for it (see `Nouns`). boxes: x0, y0,
        x1, y1 in
    pixels. lengths: the root of its area in pixels, at least and at most: more may be hidden. colours: beliefs in each
        of `TERMS`.
    width, height: of the picture in pixels.
    """

    segments: Sequence[int]
    classes: Sequence[ClassInfo]
    nouns: Sequence[tuple[str, ...]]
    boxes: Float[np.ndarray, "n 4"]
    lengths: Float[np.ndarray, "n 2"]
    colours: Float[np.ndarray, "n 11"]
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Phrase:
    """'the [extreme] [size] [colour] noun [relation anchor]'. anchor: index of a thing, with a phrase that names it
    beyond doubt.
    """

    noun: str
    colour: str | None = None
    size: str | None = None
    extreme: str | None = None
    relation: str | None = None
    anchor: tuple[int, Phrase] | None = None

    def __str__(self) -> str:
        words = [
            "the",
            self.extreme,
            self.size,
            self.colour,
            self.noun,
            self.relation,
            self.anchor and str(self.anchor[1]),
        ]
        return " ".join(word for word in words if word)


def sole(phrase: Phrase, thing: int, scene: Scene) -> float:
    """The belief that `phrase` fits the thing if it fits no other, else 0 or -1: above 0 it names the thing beyond
    doubt.
    """
    held = beliefs(phrase, scene)
    return float(held[thing]) if (np.delete(held, thing) < 0).all() else min(float(held[thing]), 0.0)


def beliefs(phrase: Phrase, scene: Scene) -> Float[np.ndarray, " n"]:
    """How surely each thing is what `phrase` says: its least certain part counts."""
    found = np.array([nouns.belief(phrase.noun, of) for of in scene.classes])
    if phrase.size is not None:
        found = np.minimum(found, _sized(phrase.size, found, scene.lengths))
    if phrase.colour is not None:
        found = np.minimum(found, scene.colours[:, TERMS.index(phrase.colour)])
    if phrase.extreme is not None:
        found = _extreme(found, *_EXTREMES[phrase.extreme], scene)
    if phrase.relation is not None:
        found = np.minimum(found, _related(phrase.anchor[0], *RELATIONS[phrase.relation], scene))
    return found


def _sized(size: str, noun: Float[np.ndarray, " n"], lengths: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """ "large" are the largest of a noun if others are beyond doubt smaller, and these are not; "small" the other way
    round.
    """
    least, most = lengths.T if size == "large" else 1 / lengths.T[::-1]
    ratio = least[:, None] / most  # [i, j]: at least how much further i goes than j
    np.fill_diagonal(ratio, 1)
    surpassed = (ratio[noun > 0] >= SMALLER).any(0)
    surpasses = (ratio[:, noun > 0]).max(1, initial=0)
    foremost = (ratio[:, noun >= 0] >= 1 / SAME).all(1)
    clear = (surpasses >= SMALLER) & foremost
    return np.where(surpassed, -1.0, np.where(clear, np.clip(surpasses / (2 * SMALLER), 0, 1), 0.0))


def _extreme(head: Float[np.ndarray, " n"], axis: int, sign: int, scene: Scene) -> Float[np.ndarray, " n"]:
    """The foremost of all that `head` may mean, if it is foremost with its centre and with both of its edges."""
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
    """How surely each thing stands on one side of the anchor: clearly on that side more than on another, apart and
    near.
    """
    low, high = scene.boxes[:, :2], scene.boxes[:, 2:]
    away = (low + high - low[anchor] - high[anchor]) / 2
    along = sign * away[:, axis] / (scene.height if axis else scene.width)
    gap = np.maximum(low, low[anchor]) - np.minimum(high, high[anchor])  # below 0 where they overlap
    apart = gap[:, axis] > -0.25 * np.minimum(high - low, high[anchor] - low[anchor])[:, axis]
    near = np.hypot(*np.maximum(gap, 0).T) < REACH * np.hypot(scene.width, scene.height)
    clear = (along > CLEAR) & (abs(away[:, axis]) >= abs(away[:, 1 - axis])) & apart & near
    found = np.where(clear, np.clip(0.5 + along, 0, 1), np.where(along > DENIED, 0.0, -1.0))
    found[anchor] = -1
    return found
