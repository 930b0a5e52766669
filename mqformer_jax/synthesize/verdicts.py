"""What became of each box that a teacher was asked about, and how that enters the records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from mqformer_jax.input.record import BadRecord, Record, Segment, box_of


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One box. segment: index into `Record.segments`. reason: why nothing was taken, "" where something was.

    score: of the mask, or of the best caption. mask: COCO run-length code of the image's size; also of a mask that was
        not taken, to be
    looked at. captions: best first, each with its score. refused: how many captions were not taken for which reason.
    """

    segment: int
    reason: str = ""
    score: float = 0.0
    mask: bytes | None = None
    captions: tuple[tuple[str, float], ...] = ()
    refused: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, fields: dict) -> Verdict:
        """From what msgpack made of one."""
        pairs: dict[str, Any] = {name: tuple(map(tuple, fields[name])) for name in ("captions", "refused")}
        return cls(**fields | pairs)


def with_verdicts(record: Record, verdicts: Iterable[Verdict], teacher: str) -> Record:
    """The record with all that was taken, marked as the teacher's."""
    segments = list(record.segments)
    for verdict in verdicts:
        if verdict.reason:
            continue
        new: dict[str, Any] = dict(captions=verdict.captions, captions_by=teacher) if verdict.captions else {}
        new |= dict(mask=verdict.mask, mask_by=teacher, mask_score=verdict.score) if verdict.mask else {}
        segments[verdict.segment] = dataclasses.replace(segments[verdict.segment], **new)
    return dataclasses.replace(record, segments=tuple(segments))


def usable_box(record: Record, index: int) -> Float[np.ndarray, " 4"] | str:
    """The box of a segment, cut at the image's borders; or why there is none to ask about, in words."""
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
