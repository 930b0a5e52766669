"""Predict masks from boxes with a teacher, and reject masks that fail a quality test.

The tests are those commonly applied to SAM's masks before training on them: the score that the teacher predicts, the
stability under small changes of the box, and the agreement with the given box.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from jaxtyping import Bool, Float

from mqformer_jax.input.record import DatasetInfo, Record, box_iou, box_of, encode_rle
from mqformer_jax.synthesize.annotations import Annotation
from mqformer_jax.synthesize.teachers import BoxMasks, MaskTeacher, Picture


@dataclasses.dataclass(frozen=True)
class Quality:
    """The limits of the quality tests of masks.

    The defaults are loose. A training mixture can require a higher score with `min_mask_score`.

    min_score: lowest score of the teacher.
    min_stability: lowest mean IoU of the mask with the masks of the jittered boxes.
    min_box_iou: lowest IoU of the mask's tight box with the given box.
    min_box_area: lowest fraction of the box that the mask covers.
    num_jittered_boxes: number of jittered copies of each box.
    box_jitter: largest shift of the edges of a jittered box, as a fraction of the box's width or height.
    min_component_area: a fraction of the mask's area. Smaller islands are removed, and smaller holes are filled.
    """

    min_score: float = 0.5
    min_stability: float = 0.7
    min_box_iou: float = 0.6
    min_box_area: float = 0.05
    num_jittered_boxes: int = 2
    box_jitter: float = 0.05
    min_component_area: float = 0.02


class Masks:
    """An `annotators.Annotator` that predicts masks for the boxes without a mask."""

    kind, unique = "masks", True

    def __init__(self, teacher: MaskTeacher, quality: Quality):
        self.name, self._teacher, self._quality = teacher.name, teacher, quality
        self.settings = f"masks by {teacher.name}, {quality}"

    def wanted(self, record: Record, info: DatasetInfo) -> list[int]:
        """Return the indices of the segments without a mask or matte, except crowds.

        No teacher is trained to segment many objects at once.
        """
        return [i for i, s in enumerate(record.segments) if s.mask is None and s.alpha is None and not s.crowd]

    def __call__(self, pictures: Sequence[Picture]) -> list[list[Annotation]]:
        boxes = [
            np.concatenate([p.boxes, *(self._jittered(p, copy) for copy in range(self._quality.num_jittered_boxes))])
            for p in pictures
        ]
        drawn = self._teacher(pictures, boxes)
        with ThreadPoolExecutor() as pool:  # OpenCV and NumPy release the GIL
            return list(
                pool.map(lambda p, d: [self._annotation(p, d, j) for j in range(len(p.boxes))], pictures, drawn)
            )

    def _jittered(self, picture: Picture, copy: int) -> Float[np.ndarray, "n 4"]:
        """Return the boxes with randomly moved sides. The result depends on the record's key and `copy` alone."""
        rng = np.random.default_rng((copy, zlib.crc32(picture.record.key.encode())))
        sides = np.tile(picture.boxes[:, 2:] - picture.boxes[:, :2], 2)
        moved = picture.boxes + sides * rng.uniform(-1, 1, sides.shape).astype(np.float32) * self._quality.box_jitter
        height, width = picture.image.shape[:2]
        return np.clip(moved, 0, np.array([width, height] * 2, np.float32))

    def _annotation(self, picture: Picture, drawn: BoxMasks, j: int) -> Annotation:
        quality, box, score = self._quality, picture.boxes[j], float(drawn.scores[j])
        mask = cleaned(drawn.masks[[j]][0] > 0, quality.min_component_area)
        tight = box_of(mask)
        inside = clipped(mask, box)
        if tight is None or not inside.any():
            return Annotation(picture.segments[j], "no mask in the box", score)
        copies = drawn.masks.logits[j :: len(picture.boxes)] > 0
        tests = {
            "low IoU with its box": box_iou(np.array(tight, np.float32), box) < quality.min_box_iou,
            "covers too little of its box": inside.sum() < quality.min_box_area * np.prod(box[2:] - box[:2]),
            "unstable under box jitter": stability(copies) < quality.min_stability,
            "low score of the teacher": score < quality.min_score,
        }
        return Annotation(
            picture.segments[j],
            next((reason for reason, failed in tests.items() if failed), ""),
            score,
            encode_rle(inside),
        )


def stability(masks: Bool[np.ndarray, "k h w"]) -> float:
    """Return the mean IoU of the first mask with the others, or 1 if there are no others."""
    first, others = masks[0], masks[1:]
    union = (first | others).sum((1, 2))
    return float(((first & others).sum((1, 2)) / np.maximum(union, 1)).mean()) if len(others) else 1.0


def clipped(mask: Bool[np.ndarray, "h w"], box: Float[np.ndarray, " 4"]) -> Bool[np.ndarray, "h w"]:
    """Return the part of a mask inside its box. Boxes contain whole objects, so the rest belongs to other objects."""
    (x0, y0), (x1, y1) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    inside = np.zeros_like(mask)
    inside[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
    return inside


def cleaned(mask: Bool[np.ndarray, "h w"], share: float) -> Bool[np.ndarray, "h w"]:
    """Remove islands and fill holes smaller than the fraction `share` of the mask's area. Keep the largest island."""
    least = share * mask.sum()
    if not least:
        return mask
    islands = _small_parts(mask, least)
    return (mask & ~islands) | _small_parts(~mask | islands, least)


def _small_parts(mask: Bool[np.ndarray, "h w"], least: float) -> Bool[np.ndarray, "h w"]:
    """Return the connected parts (8-connectivity) with fewer pixels than `least`, except the largest part."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    small = stats[:, cv2.CC_STAT_AREA] < least
    small[0] = False  # the background
    if len(small) > 1:
        small[1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])] = False
    return small[labels]
