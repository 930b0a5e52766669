"""`Annotation`, the generated mask or captions of one box, and functions that add annotations to records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from mqformer_jax.input.record import BadRecord, Record, Segment, box_of


@dataclasses.dataclass(frozen=True)
class Annotation:
    """The generated mask or captions of one box.

    segment: index into `Record.segments`.
    reason: why the annotation is rejected, e.g. "the box is empty"; "" if it is accepted.
    score: the score of the mask or of the best accepted caption, 0 to 1.
    mask: COCO run-length code at the image's size, or None. A rejected mask is kept for the report.
    captions: the accepted captions as (text, score) pairs, best first.
    rejected: (reason, number of captions rejected for it) pairs.
    """

    segment: int
    reason: str = ""
    score: float = 0.0
    mask: bytes | None = None
    captions: tuple[tuple[str, float], ...] = ()
    rejected: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, fields: dict) -> Annotation:
        """Make an Annotation from its fields as msgpack decodes them, with lists instead of tuples."""
        pairs: dict[str, Any] = {name: tuple(map(tuple, fields[name])) for name in ("captions", "rejected")}
        return cls(**fields | pairs)


def with_annotations(record: Record, annotations: Iterable[Annotation], teacher: str) -> Record:
    """Return a copy of the record with the accepted masks and captions.

    teacher: the teacher's name, which each annotated segment stores.
    """
    segments = list(record.segments)
    for annotation in annotations:
        if annotation.reason:
            continue
        new: dict[str, Any] = dict(captions=annotation.captions, captions_by=teacher) if annotation.captions else {}
        new |= dict(mask=annotation.mask, mask_by=teacher, mask_score=annotation.score) if annotation.mask else {}
        segments[annotation.segment] = dataclasses.replace(segments[annotation.segment], **new)
    return dataclasses.replace(record, segments=tuple(segments))


def usable_box(record: Record, index: int) -> Float[np.ndarray, " 4"] | str:
    """Return the box of a segment, clipped to the image, or the reason why the segment has no usable box.

    A segment without a box gets the tight box of its mask or matte. Raises BadRecord if it has none of these.
    """
    segment = record.segments[index]
    box = segment.box if segment.box is not None else _of_its_mask(record, segment)
    if box is None or not np.isfinite(box).all() or box[2] - box[0] < 1 or box[3] - box[1] < 1:
        return "the box is empty"
    cut = np.clip(np.array(box, np.float32), 0, [record.width, record.height] * 2)
    return cut if cut[2] - cut[0] >= 1 and cut[3] - cut[1] >= 1 else "the box is outside the image"


def _of_its_mask(record: Record, segment: Segment) -> tuple[float, ...] | None:
    if segment.mask is None and segment.alpha is None:
        raise BadRecord(f"{record.key}: a segment has neither a box nor a mask; prepare the data set again")
    return box_of(
        record.decode_mask(segment.mask) if segment.mask is not None else record.decode_alpha(segment.alpha) > 127
    )
