"""What came of a split: how many boxes got something, of which class and size, why others did not, and pictures of
both.
"""

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

from mqformer_jax.input.record import DatasetInfo, Record, decode_rle
from mqformer_jax.prepare.shard_writer import write_text
from mqformer_jax.synthesize.verdicts import Verdict, usable_box
from mqformer_jax.visualization.overlays import sheet

SHOWN = 24  # boxes of either kind on the contact sheet
COLUMNS, SIDE = 6, 260  # of the sheet; pixels of one of its pictures
SIZES = {"small": 32**2, "medium": 96**2, "large": float("inf")}  # COCO's, by the area of the box in pixels
SEGMENT, BOX = (255, 221, 51), (64, 156, 255)


@dataclasses.dataclass
class Tally:
    """Counts over boxes, which add up over shards.

    asked, taken: by class; of_size, taken_of_size: by size. reasons: why a box got nothing. refused: why captions were
        not taken.
    score: the sum over the boxes that got something. samples: the boxes of the contact sheet, drawn by a hash of what
        they are.
    """

    kind: str
    teacher: str
    images: int = 0
    asked: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    taken: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    of_size: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    taken_of_size: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    captions: int = 0
    score: float = 0.0
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, record: Record, info: DatasetInfo, place: tuple[int, int], verdicts: Sequence[Verdict]) -> None:
        """place: shard and record."""
        self.images += 1
        for verdict in verdicts:
            class_id, box = record.segments[verdict.segment].class_id, usable_box(record, verdict.segment)
            name = "(words only)" if class_id is None else info.classes[class_id].name
            area = 0 if isinstance(box, str) else float(np.prod(box[2:] - box[:2]))
            size = next(size for size, end in SIZES.items() if area < end)
            self.asked[name] += 1
            self.of_size[size] += 1
            self.captions += len(verdict.captions)
            self.refused.update(dict(verdict.refused))
            if verdict.reason:
                self.reasons[verdict.reason] += 1
                self.examples.setdefault(verdict.reason, record.key)
            else:
                self.taken[name] += 1
                self.taken_of_size[size] += 1
                self.score += verdict.score
            if not isinstance(box, str) and (verdict.mask or self.kind == "captions"):
                fields = dataclasses.asdict(verdict) | {"mask": verdict.mask and verdict.mask.decode("ascii")}
                draw = zlib.crc32(f"{record.key}/{verdict.segment}".encode())
                self.samples.append(
                    fields | {"draw": draw, "place": place, "key": record.key, "class": name, "box": box.tolist()}
                )
        self._thin()

    def update(self, other: Tally) -> None:
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
        kinds = ([s for s in self.samples if bool(s["reason"]) == refused] for refused in (False, True))
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
        asked, taken = self.asked.total(), self.taken.total()
        share = lambda part, whole: f"{100 * part / max(whole, 1):.1f} %"
        if not asked:
            return f"nothing was asked of {self.teacher}: no box of the {self.images} images lacks {self.kind}"
        lines = [
            f"{taken} of {asked} boxes ({share(taken, asked)}) in {self.images} images "
            f"have {self.kind} by {self.teacher}"
        ]
        if taken:
            lines[0] += f", mean score {self.score / taken:.3f}"
        if self.captions:
            lines[0] += f", {self.captions / taken:.1f} a box"
        sizes = [
            f"{size} {share(self.taken_of_size[size], self.of_size[size])} of {self.of_size[size]}" for size in SIZES
        ]
        lines.append(f"  by size: {', '.join(sizes)}")
        classes = sorted(self.asked, key=lambda name: (self.taken[name] / self.asked[name], name))
        shown = [*classes[:5], *classes[5:][-5:]]
        by_class = [f"{name} {share(self.taken[name], self.asked[name])} of {self.asked[name]}" for name in shown]
        lines.append(f"  by class{', worst and best' if len(classes) > 10 else ''}: {', '.join(by_class)}")
        lines += [
            f"  {count} x {reason} ({self.examples[reason]}{', …' * (count > 1)})"
            for reason, count in self.reasons.most_common()
        ]
        lines += [f"  {count} x caption: {reason}" for reason, count in self.refused.most_common()]
        return "\n".join(lines)


def contact_sheet(tally: Tally, image_of: Callable[[int, int], np.ndarray], path: str) -> bool:
    """A PNG of boxes that got something, then of boxes that did not and why. False where there is nothing to show.

    image_of: (shard, record) to the RGB image.
    """
    cells = [(_label(sample), _picture(sample, image_of(*sample["place"]))) for sample in tally.samples]
    if not cells:
        return False
    taken = sum(not sample["reason"] for sample in tally.samples)
    groups = [cells[:taken], cells[taken:]]
    sheet([group[i : i + COLUMNS] for group in groups for i in range(0, len(group), COLUMNS)], path)
    return True


def _label(sample: dict[str, Any]) -> str:
    words = " · ".join(text for text, _ in sample["captions"])
    said = words or sample["reason"] and f"NOT TAKEN: {sample['reason']}"
    return f"{sample['class']} {100 * sample['score']:.0f}" + (f": {said}" if said else "")


def _picture(sample: dict[str, Any], image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """The surroundings of a box (of a caption: all of the image), square, with the box and the mask's outline."""
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
