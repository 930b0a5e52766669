"""Report on the annotations of a split: acceptance by class and size, reasons for rejection, and sample images."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from mqformer_jax.files import write_text
from mqformer_jax.input.record import DatasetInfo, Record, decode_rle
from mqformer_jax.synthesize.annotations import Annotation, usable_box
from mqformer_jax.visualization.overlays import grid

SHOWN = 24  # largest number of accepted boxes on the grid, and of rejected boxes
COLUMNS, SIDE = 6, 260  # columns of the grid; side of a panel in pixels
SIZES = {"small": 32**2, "medium": 96**2, "large": float("inf")}  # upper limits of the box's area in pixels, from COCO
SEGMENT, BOX = (255, 221, 51), (64, 156, 255)


@dataclasses.dataclass
class Tally:
    """Statistics of the annotations of a shard or a split. `update` adds up the tallies of shards.

    kind, teacher: the kind and the name of the `Annotator`. images: number of images.
    boxes, accepted: number of all boxes and of the accepted ones, by class name. boxes_by_size, accepted_by_size: the
        same by size (`SIZES`).
    reasons: number of rejected boxes by reason. examples: the key of one record for each reason.
    rejected_captions: number of rejected captions by reason. captions: number of accepted captions.
    score: sum of the scores of the accepted annotations.
    samples: the boxes shown on the grid, chosen by a hash of record and segment.
    """

    kind: str
    teacher: str
    images: int = 0
    boxes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    accepted: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    boxes_by_size: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    accepted_by_size: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rejected_captions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    captions: int = 0
    score: float = 0.0
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, record: Record, info: DatasetInfo, place: tuple[int, int], annotations: Sequence[Annotation]) -> None:
        """Count the annotations of a record. place: the number of the shard, and of the record in the shard."""
        self.images += 1
        for annotation in annotations:
            class_id, box = record.segments[annotation.segment].class_id, usable_box(record, annotation.segment)
            name = "(expressions only)" if class_id is None else info.classes[class_id].name
            area = 0 if isinstance(box, str) else float(np.prod(box[2:] - box[:2]))
            size = next(size for size, end in SIZES.items() if area < end)
            self.boxes[name] += 1
            self.boxes_by_size[size] += 1
            self.captions += len(annotation.captions)
            self.rejected_captions.update(dict(annotation.rejected))
            if annotation.reason:
                self.reasons[annotation.reason] += 1
                self.examples.setdefault(annotation.reason, record.key)
            else:
                self.accepted[name] += 1
                self.accepted_by_size[size] += 1
                self.score += annotation.score
            if not isinstance(box, str) and (annotation.mask or self.kind == "captions"):
                fields = dataclasses.asdict(annotation) | {"mask": annotation.mask and annotation.mask.decode("ascii")}
                draw = zlib.crc32(f"{record.key}/{annotation.segment}".encode())
                self.samples.append(
                    fields | {"draw": draw, "place": place, "key": record.key, "class": name, "box": box.tolist()}
                )
        self._thin()

    def update(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for name, value in vars(other).items():
            if isinstance(value, collections.Counter):
                getattr(self, name).update(value)
        self.examples = other.examples | self.examples
        self.images += other.images
        self.captions += other.captions
        self.score += other.score
        self.samples += other.samples
        self._thin()

    def _thin(self) -> None:
        """Keep at most `SHOWN` random samples of accepted boxes, and at most `SHOWN` of rejected ones."""
        kinds = ([s for s in self.samples if bool(s["reason"]) == rejected] for rejected in (False, True))
        self.samples = [s for kind in kinds for s in heapq.nsmallest(SHOWN, kind, key=lambda s: s["draw"])]

    def save(self, path: str) -> None:
        write_text(path, json.dumps(vars(self), indent=1))

    @classmethod
    def load(cls, path: str) -> Tally:
        with open(path) as f:
            fields: dict[str, Any] = json.load(f)
        counters = {f.name for f in dataclasses.fields(cls) if f.default_factory is collections.Counter}
        fields |= {name: collections.Counter(fields[name]) for name in counters & fields.keys()}
        return cls(**fields)

    def __str__(self) -> str:
        boxes, accepted = self.boxes.total(), self.accepted.total()
        share = lambda part, whole: f"{100 * part / max(whole, 1):.1f} %"
        if not boxes:
            return f"none of the {self.images} images has a box to annotate with {self.kind}"
        lines = [
            f"{accepted} of {boxes} boxes ({share(accepted, boxes)}) in {self.images} images "
            f"have {self.kind} by {self.teacher}"
        ]
        if accepted:
            lines[0] += f", mean score {self.score / accepted:.2f}"
        if self.captions:
            lines[0] += f", {self.captions / accepted:.1f} captions each"
        sizes = [
            f"{size} {share(self.accepted_by_size[size], self.boxes_by_size[size])} of {self.boxes_by_size[size]}"
            for size in SIZES
        ]
        lines.append(f"  accepted by size: {', '.join(sizes)}")
        classes = sorted(self.boxes, key=lambda name: (self.accepted[name] / self.boxes[name], name))
        shown = [*classes[:5], *classes[5:][-5:]]
        by_class = [f"{name} {share(self.accepted[name], self.boxes[name])} of {self.boxes[name]}" for name in shown]
        lines.append(f"  accepted by class{', worst and best' if len(classes) > 10 else ''}: {', '.join(by_class)}")
        lines += [
            f"  rejected boxes: {count} x {reason} ({self.examples[reason]}{', …' * (count > 1)})"
            for reason, count in self.reasons.most_common()
        ]
        lines += [f"  rejected captions: {count} x {reason}" for reason, count in self.rejected_captions.most_common()]
        return "\n".join(lines)


def sample_grid(tally: Tally, image_of: Callable[[int, int], np.ndarray], path: str) -> bool:
    """Write a PNG grid of the tally's samples: accepted boxes, then rejected boxes with the reasons.

    Return whether the file was written: there may be no samples. image_of: returns the RGB image for the numbers of a
    shard and a record.
    """
    cells = [(_label(sample), _picture(sample, image_of(*sample["place"]))) for sample in tally.samples]
    if not cells:
        return False
    accepted = sum(not sample["reason"] for sample in tally.samples)
    groups = [cells[:accepted], cells[accepted:]]
    grid([group[i : i + COLUMNS] for group in groups for i in range(0, len(group), COLUMNS)], path)
    return True


def _label(sample: dict[str, Any]) -> str:
    captions = " · ".join(text for text, _ in sample["captions"])
    text = captions or (f"REJECTED: {sample['reason']}" if sample["reason"] else "")
    return f"{sample['class']} {sample['score']:.2f}" + (f": {text}" if text else "")


def _picture(sample: dict[str, Any], image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """Return a square picture of a sample: its box and the filled outline of its mask, drawn on the image.

    The picture shows a crop around the box, or the whole image if the sample has captions.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box = np.array(sample["box"])
    side = max(height, width) if sample["captions"] else 1.4 * max(x1 - x0, y1 - y0, 16)
    left, top = ((box[:2] + box[2:]) / 2 if not sample["captions"] else np.array([width, height]) / 2) - side / 2
    scale = SIDE / side
    matrix = np.array([[scale, 0, -scale * left], [0, scale, -scale * top]])
    page = np.full((SIDE, SIDE, 3), 235, np.uint8)
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    page = cv2.warpAffine(
        image, matrix, (SIDE, SIDE), page, smooth, borderMode=cv2.BORDER_CONSTANT, borderValue=(235, 235, 235)
    )
    if sample["mask"]:
        mask = decode_rle(sample["mask"].encode("ascii"), height, width).astype(np.uint8)
        shown = cv2.warpAffine(mask, matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
        page = np.where(shown[..., None] > 0, (0.6 * page + 0.4 * np.array(SEGMENT)).astype(np.uint8), page)
        outlines, _ = cv2.findContours(shown, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(page, outlines, -1, SEGMENT, 2, cv2.LINE_AA)
    corners = ((box.reshape(2, 2) - [left, top]) * scale).round().astype(int)
    return cv2.rectangle(
        np.ascontiguousarray(page), corners[0].tolist(), (corners[1] - 1).tolist(), BOX, 1, cv2.LINE_AA
    )
