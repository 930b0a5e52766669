"""Which of an image's prompts are asked this time, in which words, and how the words turn when the image is
mirrored.
"""

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

# RefCOCO's annotators write "rightmost", "topleft" and "lft"; "bright", "upright" and "leftover" must stay.
_SWAP = {"left": "right", "right": "left", "lft": "rgt", "rgt": "lft"}
_SIDE_WORD = re.compile(
    r"\b((?:top|bottom|upper|lower|far|front|back|mid|middle|center|centre)?)(left|right|lft|rgt)"
    r"((?:most|hand|ward|wards|side)?)\b",
    re.IGNORECASE,
)
# Words whose mirror image is not known: clock directions, "l" and "r" (sides or letters), "lt" (left or light), "rt",
# sides that are misspelled, and "right" that is no side.
_UNKNOWN = re.compile(
    r"\b(?:l|r|lt|rt|lhs|rhs|lef|righ|rigth|rihgt|irght|rite|lefy"
    r"|(?:counter)?clockwise|(?:\d+\s?)?o'?\s?clock|all right|right "
    r"(?:above|at|before|behind|below|beneath|beside|by|in|inside|near|next|now|on top|over|there|under|underneath))\b",
    re.IGNORECASE,
)
_SIDE = re.compile(r"\w*(?:left|right)\w*", re.IGNORECASE)
_NO_SIDE = re.compile(r"\w*(?:bright|upright|fright|outright|forthright|copyright|cleft|leftover)\w*", re.IGNORECASE)


def choose_prompts(example: Example, budget: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """At most `budget` of the example's prompts, in random order, each in one of its wordings.

    Prompts that own a target come first (a random subset if they are too many), then known negatives, drawn by their
    weights. A prompt that is neither teaches nothing and is left out, and so is a negative in the words of a positive:
    an expression that names nothing may be the name of a class.

    Returns: the wordings, and int [n], their indices into `example.prompts`.
    """
    owned = {p for target in example.targets for p in target.prompts}
    absent = [i for i, prompt in enumerate(example.prompts) if prompt.exhaustive and i not in owned]
    positives = rng.permutation(np.array(sorted(owned), np.int64))[:budget]
    # The first arrivals of independent clocks are a draw without replacement, each in proportion to its weight.
    clocks = rng.exponential(size=len(absent)) / np.array([example.prompts[i].weight for i in absent])
    negatives = np.array(absent, np.int64)[np.argsort(clocks)[: budget - len(positives)]]
    indices = rng.permutation(np.concatenate([positives, negatives]))
    draws = rng.random(len(indices))
    choices = [example.prompts[i].texts for i in indices]
    texts = [texts[int(u * len(texts))] for texts, u in zip(choices, draws)]
    said = {(text, example.prompts[i].is_region) for text, i in zip(texts, indices) if i in owned}
    kept = [
        k
        for k, (text, i) in enumerate(zip(texts, indices))
        if i in owned or (text, example.prompts[i].is_region) not in said
    ]
    return [texts[k] for k in kept], indices[np.array(kept, np.int64)]


@functools.lru_cache(maxsize=1 << 16)
def mirror(prompt: Prompt) -> Prompt | None:
    """The prompt as it reads of the mirrored image: "left" is "right"; None where that cannot be told."""
    if any(_UNKNOWN.search(text) or _odd_side(text) for text in prompt.texts):
        return None
    return dataclasses.replace(prompt, texts=tuple(_SIDE_WORD.sub(_swap, text) for text in prompt.texts))


def _odd_side(text: str) -> bool:
    """Whether a side hides in a word that would not be swapped: "leftish", "rightfront"."""
    return any(not _SIDE_WORD.fullmatch(word) and not _NO_SIDE.fullmatch(word) for word in _SIDE.findall(text))


def _swap(match: re.Match) -> str:
    before, side, after = match.groups()
    other = _SWAP[side.lower()]
    if side.isupper():
        other = other.upper()
    elif side[0].isupper():
        other = other.capitalize()
    return before + other + after
