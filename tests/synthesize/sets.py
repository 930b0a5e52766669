"""A small prepared set with boxes, and teachers that need no model."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, Segment
from mqformer_jax.prepare.shard_writer import Built, Problems, write_shard
from mqformer_jax.segments import CanvasMasks
from mqformer_jax.synthesize.teachers import BoxMasks, Caption

H, W = 48, 64
CLASSES = (ClassInfo(("cat", "kitty")), ClassInfo(("dog",)), ClassInfo(("sky",), is_region=True))


def picture(seed: int) -> bytes:
    image = np.random.default_rng(seed).integers(0, 255, (H, W, 3), np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


def record(i: int, *segments: Segment, image: bytes | None = None, **fields) -> Record:
    return Record(f"image {i:03d}", picture(i) if image is None else image, H, W, segments, **fields)


def write_set(root, name: str, records: list[Record], shards: int = 3, **fields) -> DatasetInfo:
    folder = root / name
    folder.mkdir(parents=True)
    cuts = np.linspace(0, len(records), shards + 1).astype(int)
    for k, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        path = folder / f"train-{k:05d}-of-{shards:05d}"
        write_shard((Built.of(r, Problems()) for r in records[start:stop]), str(path))
        (folder / f"{path.name}.json").unlink()
    info = DatasetInfo(name, CLASSES, {"train": len(records)}, **fields)
    info.save(str(folder))
    return info


def two_boxes(count: int) -> list[Record]:
    """Each image has a cat on the left and a dog on the right, in boxes alone."""
    boxes = (4.0, 8.0, 28.0, 40.0), (36.0, 10.0, 60.0, 30.0)
    return [record(i, Segment(0, box=boxes[0]), Segment(1, box=boxes[1]), origin=f"here/{i}") for i in range(count)]


@dataclasses.dataclass
class Ellipses:
    """A teacher that draws an ellipse in each box, and counts the images it saw. scores: what it says of the
    classes.
    """

    scores: tuple[float, ...] = (0.9, 0.8, 0.7)
    seen: int = 0
    dies_at: int | None = None
    name: str = "ellipses 1"

    def __call__(self, pictures, boxes):
        if self.dies_at is not None and self.seen >= self.dies_at:
            raise KeyboardInterrupt
        self.seen += len(pictures)
        return [self._drawn(p, b) for p, b in zip(pictures, boxes)]

    def _drawn(self, p, boxes):
        h, w = p.image.shape[:2]
        y, x = np.mgrid[:h, :w] + 0.5
        logits = []
        for x0, y0, x1, y1 in boxes:
            far = ((x - (x0 + x1) / 2) / ((x1 - x0) / 2)) ** 2 + ((y - (y0 + y1) / 2) / ((y1 - y0) / 2)) ** 2
            logits.append(4 * (1 - far))
        scores = [self.scores[p.record.segments[p.segments[j % len(p.segments)]].class_id] for j in range(len(boxes))]
        return BoxMasks(CanvasMasks(np.array(logits, np.float32), (h, w), (h, w), (h, w)), np.array(scores, np.float32))


@dataclasses.dataclass
class Says:
    """A captioner with the captions of each class."""

    said: dict[int, tuple[str, ...]]
    name: str = "says 1"
    unique: bool = False

    def __call__(self, pictures):
        of = lambda p, i: [
            Caption(text, 0.9 - 0.1 * k) for k, text in enumerate(self.said[p.record.segments[i].class_id])
        ]
        return [[of(p, i) for i in p.segments] for p in pictures]
