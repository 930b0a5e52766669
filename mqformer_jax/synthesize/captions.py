"""Words for boxes: a captioner says them, and what is no good expression, or means another box, is not taken (paper
sec. 3.4).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.synthesize import words
from mqformer_jax.synthesize.masks import box_iou
from mqformer_jax.synthesize.teachers import Caption, Captioner, Picker, Picture
from mqformer_jax.synthesize.verdicts import Verdict

MOST = 5  # captions a box (paper); training draws one of them each time it sees the box
SAME = 0.5  # IoU from which two boxes may be one object


class Captions:
    """Asks a captioner for words for the boxes of things; see `makers.Maker`."""

    kind = "captions"

    def __init__(self, captioner: Captioner, picker: Picker | None = None):
        """picker: takes part where captions are to be tried: one that fits another box better is not taken."""
        self.name = captioner.name + (f", picked by {picker.name}" if picker else "")
        self.settings, self.unique = f"captions by {self.name}", captioner.unique
        self._captioner, self._picker = captioner, picker

    def wanted(self, record: Record, info: DatasetInfo) -> list[int]:
        """Single things, and what only expressions name. Stuff and foregrounds have no single object to tell from
        others.
        """
        single = lambda s: s.class_id is None or info.classes[s.class_id].thing
        return [i for i, s in enumerate(record.segments) if single(s) and not (s.crowd or s.foreground)]

    def __call__(self, pictures: Sequence[Picture]) -> list[list[Verdict]]:
        refused = [[collections.Counter() for _ in p.boxes] for p in pictures]
        said = []
        for picture, boxes, why in zip(pictures, self._captioner(pictures), refused):
            said.append(_told_apart(picture, [_readable(captions, w) for captions, w in zip(boxes, why)], why))
        if self._picker is not None:
            said = self._picked(pictures, said, refused)
        return [
            [_verdict(segment, captions[:MOST], w) for segment, captions, w in zip(p.segments, boxes, why)]
            for p, boxes, why in zip(pictures, said, refused)
        ]

    def _picked(
        self, pictures: Sequence[Picture], said: list[list[list[Caption]]], refused: list[list[collections.Counter]]
    ) -> list[list[list[Caption]]]:
        """The captions that fit their own box best of all boxes of the image."""
        fits = self._picker(pictures, [[[c.text for c in captions] for captions in boxes] for boxes in said])
        kept = []
        for picture, boxes, rows, why in zip(pictures, said, fits, refused):
            right = [_means(picture.boxes, j, row) for j, row in enumerate(rows)]
            for w, r in zip(why, right):
                w["means another box"] += r.count(False)
            kept.append([[c for c, ok in zip(captions, r) if ok] for captions, r in zip(boxes, right)])
        return kept


def _readable(captions: Sequence[Caption], why: collections.Counter) -> list[Caption]:
    """The captions that any expression may be, cleaned and each once; counts what the others are."""
    kept = []
    for caption in captions:
        caption = dataclasses.replace(caption, text=words.clean(caption.text))
        if reason := words.refusal(caption.text):
            why[reason] += 1
        else:
            kept.append(caption)
    distinct = words.distinct(kept, len(kept))
    why["said before"] += len(kept) - len(distinct)
    return distinct


def _told_apart(picture: Picture, boxes: list[list[Caption]], why: list[collections.Counter]) -> list[list[Caption]]:
    """The captions without those that several objects of the image were given: they tell none of them from the
    others.
    """
    owners = collections.defaultdict(list)
    for j, captions in enumerate(boxes):
        for caption in captions:
            owners[caption.text].append(j)
    several = lambda ids: bool((box_iou(picture.boxes[ids[0]], picture.boxes[ids]) < SAME).any())
    shared = {text for text, ids in owners.items() if several(ids)}
    for captions, w in zip(boxes, why):
        w["said of several boxes"] += sum(c.text in shared for c in captions)
    return [[c for c in captions if c.text not in shared] for captions in boxes]


def _means(boxes: Float[np.ndarray, "n 4"], own: int, fits: Float[np.ndarray, "c n"]) -> list[bool]:
    """Whether each caption of a box means that box, or one that may be the same object."""
    best = fits.argmax(1) if len(fits) else np.zeros(0, int)
    return [
        bool(row[k] > 0) and float(box_iou(boxes[k], boxes[own])) >= (0 if k == own else SAME)
        for k, row in zip(best, fits)
    ]


def _verdict(segment: int, captions: Sequence[Caption], why: collections.Counter) -> Verdict:
    taken = tuple((c.text, float(c.score)) for c in captions)
    refused = tuple((+why).items())
    reason = "" if taken else (+why).most_common(1)[0][0] if refused else "nothing was said"
    return Verdict(segment, reason, max((score for _, score in taken), default=0.0), captions=taken, refused=refused)
