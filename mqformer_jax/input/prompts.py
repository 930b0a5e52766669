"""Choose the prompts of a training image and their wordings, and adapt prompts to a mirrored image."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np

from mqformer_jax.input.example import Example, Prompt

# Wordings around a class name, for text encoders that were trained on captions of photos (CLIP, OpenSeeD).
PHOTO_TEMPLATES = (
    "{}.", "a photo of {}.", "a photo of a {}.", "a photo of the {}.", "a photo of many {}.", "a photo of one {}.",
    "a photo of a small {}.", "a photo of a large {}.", "a close-up photo of a {}.", "a photo of a {} far away.",
    "a dark photo of a {}.", "a bright photo of a {}.", "a blurry photo of a {}.", "a photo of part of a {}.",
    "a photo of a {} indoors.", "a photo of a {} outdoors.", "there is a {} in the scene.", "a {} in the background.",
)  # fmt: skip

# RefCOCO's annotators also write "rightmost", "topleft" and "lft". "bright", "upright" and "leftover" must not change.
_SWAP = {"left": "right", "right": "left", "lft": "rgt", "rgt": "lft"}
_SIDE_WORD = re.compile(
    r"\b((?:top|bottom|upper|lower|far|front|back|mid|middle|center|centre)?)(left|right|lft|rgt)"
    r"((?:most|hand|ward|wards|side)?)\b",
    re.IGNORECASE,
)
# Words that cannot be mirrored reliably: clock directions, "l" and "r" (left and right, or letters), "lt" (left or
# light), "rt", misspellings of left and right, and "right" in another sense ("right behind").
_UNKNOWN = re.compile(
    r"\b(?:l|r|lt|rt|lhs|rhs|lef|righ|rigth|rihgt|irght|rite|lefy"
    r"|(?:counter)?clockwise|(?:\d+\s?)?o'?\s?clock|all right|right "
    r"(?:above|at|before|behind|below|beneath|beside|by|in|inside|near|next|now|on top|over|there|under|underneath))\b",
    re.IGNORECASE,
)
_SIDE = re.compile(r"\w*(?:left|right)\w*", re.IGNORECASE)
_NO_SIDE = re.compile(r"\w*(?:bright|upright|fright|outright|forthright|copyright|cleft|leftover)\w*", re.IGNORECASE)


def choose_prompts(example: Example, budget: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Draw at most `budget` of the example's prompts, in random order, and one wording of each.

    Prompts with a target come first (a random subset if there are too many). Known negatives, drawn by weight, fill the
    rest of the budget. Other prompts are left out because they have no loss. A negative is also left out if its wording
    is that of a positive: an expression without a target may be equal to a class name.

    Returns the wordings, and the indices of their prompts in `example.prompts`, int [n].
    """
    present = {p for target in example.targets for p in target.prompts}
    absent = [i for i, prompt in enumerate(example.prompts) if prompt.exhaustive and i not in present]
    positives = rng.permutation(np.array(sorted(present), np.int64))[:budget]
    # A weighted draw without replacement: the smallest of exponential variables whose rates are the weights.
    times = rng.exponential(size=len(absent)) / np.array([example.prompts[i].weight for i in absent])
    negatives = np.array(absent, np.int64)[np.argsort(times)[: budget - len(positives)]]
    indices = rng.permutation(np.concatenate([positives, negatives]))
    draws = rng.random(len(indices))
    choices = [example.prompts[i].texts for i in indices]
    texts = [texts[int(u * len(texts))] for texts, u in zip(choices, draws)]
    positive_texts = {(text, example.prompts[i].is_region) for text, i in zip(texts, indices) if i in present}
    kept = [
        k
        for k, (text, i) in enumerate(zip(texts, indices))
        if i in present or (text, example.prompts[i].is_region) not in positive_texts
    ]
    return [texts[k] for k in kept], indices[np.array(kept, np.int64)]


@functools.lru_cache(maxsize=1 << 16)
def mirror(prompt: Prompt) -> Prompt | None:
    """Return the prompt for the mirrored image ("left" becomes "right"), or None if it cannot be mirrored."""
    if any(_UNKNOWN.search(text) or _has_unknown_form(text) for text in prompt.texts):
        return None
    return dataclasses.replace(prompt, texts=tuple(_SIDE_WORD.sub(_swap, text) for text in prompt.texts))


def _has_unknown_form(text: str) -> bool:
    """Return whether the text has a form of left or right that `mirror` cannot swap, e.g. "leftish" or "rightfront"."""
    return any(not _SIDE_WORD.fullmatch(word) and not _NO_SIDE.fullmatch(word) for word in _SIDE.findall(text))


def _swap(match: re.Match) -> str:
    before, side, after = match.groups()
    other = _SWAP[side.lower()]
    if side.isupper():
        other = other.upper()
    elif side[0].isupper():
        other = other.capitalize()
    return before + other + after
