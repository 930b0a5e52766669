"""Annotations, the generated mask or captions of each box, and the functions that add them to records."""

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
    reason: why the box gets no mask or caption; "" if it gets one.
    score: 0 to 1, of the mask or the best caption.
    mask: COCO run-length code of the image's size. A rejected mask is kept for the report.
    captions: (text, score) pairs, best first.
    rejected: (reason, number of captions) pairs.
    """

    segment: int
    reason: str = ""
    score: float = 0.0
    mask: bytes | None = None
    captions: tuple[tuple[str, float], ...] = ()
    rejected: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, fields: dict) -> Annotation:
        """Return the Annotation of a dictionary that msgpack decoded."""
        pairs: dict[str, Any] = {name: tuple(map(tuple, fields[name])) for name in ("captions", "rejected")}
        return cls(**fields | pairs)


def with_annotations(record: Record, annotations: Iterable[Annotation], teacher: str) -> Record:
    """Return the record with the accepted masks and captions, marked with the name of the teacher."""
    segments = list(record.segments)
    for annotation in annotations:
        if annotation.reason:
            continue
        new: dict[str, Any] = dict(captions=annotation.captions, captions_by=teacher) if annotation.captions else {}
        new |= dict(mask=annotation.mask, mask_by=teacher, mask_score=annotation.score) if annotation.mask else {}
        segments[annotation.segment] = dataclasses.replace(segments[annotation.segment], **new)
    return dataclasses.replace(record, segments=tuple(segments))


def usable_box(record: Record, index: int) -> Float[np.ndarray, " 4"] | str:
    """Return the box of a segment, clipped to the image, or the reason why the segment has no usable box."""
    segment = record.segments[index]
    box = segment.box if segment.box is not None else _of_its_mask(record, segment)
    if box is None or not np.isfinite(box).all() or box[2] - box[0] < 1 or box[3] - box[1] < 1:
        return "the box is empty"
    cut = np.clip(np.array(box, np.float32), 0, [record.width, record.height] * 2)
    return cut if cut[2] - cut[0] >= 1 and cut[3] - cut[1] >= 1 else "the box is outside the image"


def _of_its_mask(record: Record, segment: Segment) -> tuple[float, ...] | None:
    if segment.mask is None and segment.alpha is None:
        raise BadRecord(f"{record.key}: a segment has neither box nor mask")
    return box_of(
        record.decode_mask(segment.mask) if segment.mask is not None else record.decode_alpha(segment.alpha) > 127
    )
