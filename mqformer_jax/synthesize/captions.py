"""Caption boxes with a captioner, and drop malformed or ambiguous captions (paper sec. 3.4)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mqformer_jax.input.record import DatasetInfo, Record, box_iou
from mqformer_jax.synthesize import caption_filter
from mqformer_jax.synthesize.annotations import Annotation
from mqformer_jax.synthesize.teachers import Caption, Captioner, CaptionScorer, Picture

MAX_CAPTIONS = 5  # per box (paper); training draws one of them each time it reads the box
SAME_OBJECT_IOU = 0.5  # boxes with at least this IoU may be the same object


class Captions:
    """An `annotators.Annotator` that captions the boxes of objects."""

    kind = "captions"

    def __init__(self, captioner: Captioner, verifier: CaptionScorer | None = None):
        """Make the annotator. verifier: scores captions, so that captions that fit another box better are dropped."""
        self.name = captioner.name + (f", verified by {verifier.name}" if verifier else "")
        self.settings, self.unique = f"captions by {self.name}", captioner.unique
        self._captioner, self._verifier = captioner, verifier

    def wanted(self, record: Record, info: DatasetInfo) -> list[int]:
        """Return the indices of the segments to caption.

        Instances of a class and segments with only expressions are captioned. Regions, crowds and foregrounds are not.
        """
        return [
            i
            for i, s in enumerate(record.segments)
            if (s.class_id is None or not info.classes[s.class_id].is_region) and not (s.crowd or s.foreground)
        ]

    def __call__(self, pictures: Sequence[Picture]) -> list[list[Annotation]]:
        rejected = [[collections.Counter() for _ in p.boxes] for p in pictures]
        kept = []
        for picture, boxes, counts in zip(pictures, self._captioner(pictures), rejected):
            boxes = [_well_formed(captions, count) for captions, count in zip(boxes, counts)]
            kept.append(_drop_shared(picture, boxes, counts))
        if self._verifier is not None:
            kept = self._verified(pictures, kept, rejected)
        return [
            [_annotation(segment, captions[:MAX_CAPTIONS], count) for segment, captions, count in rows]
            for rows in (zip(p.segments, boxes, counts) for p, boxes, counts in zip(pictures, kept, rejected))
        ]

    def _verified(
        self, pictures: Sequence[Picture], found: list[list[list[Caption]]], rejected: list[list[collections.Counter]]
    ) -> list[list[list[Caption]]]:
        """Return the captions that fit their own box best (`_fit_own_box`). Count the dropped ones in `rejected`."""
        scores = self._verifier(pictures, [[[c.text for c in captions] for captions in boxes] for boxes in found])
        kept = []
        for picture, boxes, rows, counts in zip(pictures, found, scores, rejected):
            right = [_fit_own_box(picture.boxes, j, row) for j, row in enumerate(rows)]
            for count, fits in zip(counts, right):
                count["does not fit its own box best"] += fits.count(False)
            kept.append([[c for c, ok in zip(captions, fits) if ok] for captions, fits in zip(boxes, right)])
        return kept


def _well_formed(captions: Sequence[Caption], count: collections.Counter) -> list[Caption]:
    """Return the cleaned captions that pass `caption_filter`, without duplicates. Count the dropped ones in `count`."""
    kept = []
    for caption in captions:
        caption = dataclasses.replace(caption, text=caption_filter.clean(caption.text))
        if reason := caption_filter.rejection_reason(caption.text):
            count[reason] += 1
        else:
            kept.append(caption)
    distinct = caption_filter.distinct(kept, len(kept))
    count["duplicate"] += len(kept) - len(distinct)
    return distinct


def _drop_shared(
    picture: Picture, boxes: list[list[Caption]], counts: list[collections.Counter]
) -> list[list[Caption]]:
    """Return each box's captions without those that another object of the image also has.

    Such captions do not identify an object. counts: the counter of dropped captions of each box, which is updated.
    """
    owners = collections.defaultdict(list)
    for j, captions in enumerate(boxes):
        for caption in captions:
            owners[caption.text].append(j)
    shared = {text for text, ids in owners.items() if _are_several_objects(picture.boxes[ids])}
    for captions, count in zip(boxes, counts):
        count["given to several boxes"] += sum(c.text in shared for c in captions)
    return [[c for c in captions if c.text not in shared] for captions in boxes]


def _are_several_objects(boxes: Float[np.ndarray, "n 4"]) -> bool:
    return bool((box_iou(boxes[0], boxes) < SAME_OBJECT_IOU).any())


def _fit_own_box(boxes: Float[np.ndarray, "n 4"], own: int, scores: Float[np.ndarray, "c n"]) -> list[bool]:
    """Return for each caption of the box `own` whether the caption fits this box best.

    It does if its score is highest for this box, or for a box that may be the same object (an IoU of at least
    `SAME_OBJECT_IOU`). A caption without a score above 0 fits no box. scores: of each caption for each box.
    """
    best = scores.argmax(1) if len(scores) else np.zeros(0, int)
    return [
        bool(row[k] > 0) and float(box_iou(boxes[k], boxes[own])) >= (0 if k == own else SAME_OBJECT_IOU)
        for k, row in zip(best, scores)
    ]


def _annotation(segment: int, captions: Sequence[Caption], count: collections.Counter) -> Annotation:
    accepted = tuple((c.text, float(c.score)) for c in captions)
    rejected = tuple((+count).items())
    reason = "" if accepted else (+count).most_common(1)[0][0] if rejected else "no caption"
    score = max((score for _, score in accepted), default=0.0)
    return Annotation(segment, reason, score, captions=accepted, rejected=rejected)
