"""Masks in boxes: a teacher draws them, and what fails any of the usual tests is not taken.

The tests are those that people put masks of SAM through before they train on them: the teacher's own estimate,
stability (here under small moves of the box, which is what the annotator's hand would do), and agreement with the box
that was given.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from jaxtyping import Bool, Float

from mqformer_jax.input.record import DatasetInfo, Record, box_of, encode_rle
from mqformer_jax.synthesize.teachers import Drawn, MaskTeacher, Picture
from mqformer_jax.synthesize.verdicts import Verdict


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a mask must reach to be taken. The defaults are loose: a mixture may ask for more (`least_mask`), never for
    less.

    score: the least estimate of the teacher. stability: the least mean IoU with the masks of `copies` boxes, the sides
    of which were moved by up to `jitter` of the box. agreement: the least IoU of the mask's tight box with the given
    one. area: the least share of the box that the mask fills. clean: holes and islands below this share of the mask are
    filled and left out.
    """

    score: float = 0.5
    stability: float = 0.7
    agreement: float = 0.6
    area: float = 0.05
    copies: int = 2
    jitter: float = 0.05
    clean: float = 0.02


class Masks:
    """Asks a teacher for the masks of all boxes that have none; see `makers.Maker`."""

    kind, unique = "masks", True

    def __init__(self, teacher: MaskTeacher, quality: Quality):
        self.name, self._teacher, self._quality = teacher.name, teacher, quality
        self.settings = f"masks by {teacher.name}, {quality}"

    def wanted(self, record: Record, info: DatasetInfo) -> list[int]:
        """The segments without a mask. Crowds are many objects in one box, which no teacher is trained to draw."""
        return [i for i, s in enumerate(record.segments) if s.mask is None and s.alpha is None and not s.crowd]

    def __call__(self, pictures: Sequence[Picture]) -> list[list[Verdict]]:
        boxes = [
            np.concatenate([p.boxes, *(self._moved(p, copy) for copy in range(self._quality.copies))]) for p in pictures
        ]
        drawn = self._teacher(pictures, boxes)
        with ThreadPoolExecutor() as pool:  # OpenCV and numpy work outside the interpreter's lock
            return list(pool.map(lambda p, d: [self._verdict(p, d, j) for j in range(len(p.boxes))], pictures, drawn))

    def _moved(self, picture: Picture, copy: int) -> Float[np.ndarray, "n 4"]:
        """The boxes with their sides moved; alike on every run, whatever else is asked beside them."""
        rng = np.random.default_rng((copy, zlib.crc32(picture.record.key.encode())))
        sides = np.tile(picture.boxes[:, 2:] - picture.boxes[:, :2], 2)
        moved = picture.boxes + sides * rng.uniform(-1, 1, sides.shape).astype(np.float32) * self._quality.jitter
        height, width = picture.image.shape[:2]
        return np.clip(moved, 0, np.array([width, height] * 2, np.float32))

    def _verdict(self, picture: Picture, drawn: Drawn, j: int) -> Verdict:
        quality, box, score = self._quality, picture.boxes[j], float(drawn.scores[j])
        mask = cleaned(drawn.masks[[j]][0] > 0, quality.clean)
        tight = box_of(mask)
        inside = clipped(mask, box)
        if tight is None or not inside.any():
            return Verdict(picture.segments[j], "nothing drawn in the box", score)
        copies = drawn.masks.logits[j :: len(picture.boxes)] > 0
        tests = {
            "agrees with its box too little": box_iou(np.array(tight, np.float32), box) < quality.agreement,
            "fills its box too little": inside.sum() < quality.area * np.prod(box[2:] - box[:2]),
            "changes when the box moves": stability(copies) < quality.stability,
            "the teacher doubts it": score < quality.score,
        }
        return Verdict(
            picture.segments[j],
            next((reason for reason, failed in tests.items() if failed), ""),
            score,
            encode_rle(inside),
        )


def stability(masks: Bool[np.ndarray, "k h w"]) -> float:
    """The mean IoU of the first of k masks with the others; 1 where there are no others."""
    first, others = masks[0], masks[1:]
    union = (first | others).sum((1, 2))
    return float(((first & others).sum((1, 2)) / np.maximum(union, 1)).mean()) if len(others) else 1.0


def box_iou(a: Float[np.ndarray, "*#n 4"], b: Float[np.ndarray, "*#n 4"]) -> Float[np.ndarray, "*n"] | np.floating:
    """IoU of x0, y0, x1, y1 boxes that broadcast together."""
    area = lambda box: np.prod(np.maximum(box[..., 2:] - box[..., :2], 0), -1)
    common = area(np.concatenate([np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])], -1))
    return common / np.maximum(area(a) + area(b) - common, 1e-9)


def clipped(mask: Bool[np.ndarray, "h w"], box: Float[np.ndarray, " 4"]) -> Bool[np.ndarray, "h w"]:
    """The part of a mask that lies in its box: people drew boxes around whole objects, so what sticks out is none of
    them.
    """
    (x0, y0), (x1, y1) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    inside = np.zeros_like(mask)
    inside[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
    return inside


def cleaned(mask: Bool[np.ndarray, "h w"], share: float) -> Bool[np.ndarray, "h w"]:
    """A mask without islands and holes that are smaller than `share` of it; its largest part stays in any case."""
    least = share * mask.sum()
    if not least:
        return mask
    islands = _small_parts(mask, least)
    return (mask & ~islands) | _small_parts(~mask | islands, least)


def _small_parts(mask: Bool[np.ndarray, "h w"], least: float) -> Bool[np.ndarray, "h w"]:
    """The connected parts (by sides and corners) that have fewer pixels than `least`."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    small = stats[:, cv2.CC_STAT_AREA] < least
    small[0] = False  # what is no part
    if len(small) > 1:
        small[1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])] = False
    return small[labels]
