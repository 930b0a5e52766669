"""Write the predictions for a data set in the file formats of benchmarks and their evaluation servers."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict

import cv2
import numpy as np
from jaxtyping import Float, Int

from mqformer_jax.input.coco_classes import THING_IDS
from mqformer_jax.input.record import DatasetInfo, Record, encode_rle
from mqformer_jax.segments import Segments

# The category ids of COCO's stuff classes. The ids between them are unused.
COCO_STUFF = [
    92,
    93,
    95,
    100,
    107,
    109,
    112,
    118,
    119,
    122,
    125,
    128,
    130,
    133,
    138,
    141,
    144,
    145,
    147,
    148,
    149,
    151,
    154,
    155,
    156,
    159,
]
COCO_STUFF += [161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201)]


class Submission:
    """The prediction files of one data set in `folder`. PNG files are written immediately, JSON files by `save`.

        segm.json, bbox.json         COCO results of the things
        panoptic.json, panoptic/     COCO panoptic: colors are segment ids (R + 256 G + 65536 B)
        semantic/                    PNGs with the class index of each pixel, from 0, in 8 or 16 bits
        referring.json               image_id, text, score, and the mask as run-length code (empty: no target)
        foreground/, matting/        PNGs with the probability or alpha, 8 bits
        categories.json              the class of each category id: COCO's ids for its 80 and 133 classes, else from 1

    image_id is the record's key without the file extension. A name as in COCO ("000000000139.jpg") becomes a number
    (139).
    """

    def __init__(self, folder: str, info: DatasetInfo):
        self.folder, self.info = folder, info
        self.ids = class_ids(info)
        self.lists: dict[str, list[dict]] = defaultdict(list)

    def instance(self, record: Record, segments: Segments) -> None:
        for mask, box, score, label in zip(segments.masks, segments.boxes, segments.scores, segments.prompt_ids):
            x0, y0, x1, y1 = map(float, box)
            fields = {"image_id": image_id(record), "category_id": self.ids[label], "score": float(score)}
            self.lists["bbox"].append({**fields, "bbox": [x0, y0, x1 - x0, y1 - y0]})
            self.lists["segm"].append({**fields, "segmentation": _rle(mask)})

    def panoptic(self, record: Record, segments: Segments) -> None:
        ids = segments.panoptic.astype(np.int64)
        colors = np.stack([ids >> 16 & 255, ids >> 8 & 255, ids & 255], -1).astype(np.uint8)  # BGR
        self._write_png("panoptic", record, colors)
        infos = [{"id": i + 1, "category_id": self.ids[label]} for i, label in enumerate(segments.prompt_ids)]
        self.lists["panoptic"].append(
            {"image_id": image_id(record), "file_name": f"{stem(record)}.png", "segments_info": infos}
        )

    def semantic(self, record: Record, labels: Int[np.ndarray, "h w"]) -> None:
        self._write_png("semantic", record, labels.astype(np.uint8 if len(self.ids) <= 256 else np.uint16))

    def referring(self, record: Record, segments: Segments) -> None:
        for text, mask, score in zip(segments.texts, segments.masks, segments.scores):
            fields = {"image_id": image_id(record), "text": text, "score": float(score)}
            self.lists["referring"].append({**fields, "segmentation": _rle(mask)})

    def soft(self, task: str, record: Record, mask: Float[np.ndarray, "h w"]) -> None:
        """Add a mask with values 0 to 1. task: the folder's name, "foreground" or "matting"."""
        self._write_png(task, record, np.round(mask * 255).astype(np.uint8))

    def merge(self, other: Submission) -> None:
        """Add the lists of another process."""
        for name, entries in other.lists.items():
            self.lists[name] += entries

    def save(self) -> None:
        os.makedirs(self.folder, exist_ok=True)
        categories = [
            {"id": i, "name": c.name, "isthing": int(not c.is_region)} for i, c in zip(self.ids, self.info.classes)
        ]
        panoptic = self.lists.get("panoptic")
        files = {
            **self.lists,
            **({"panoptic": {"annotations": panoptic, "categories": categories}} if panoptic else {}),
        }
        for name, content in {**files, **({"categories": categories} if categories else {})}.items():
            with open(os.path.join(self.folder, f"{name}.json"), "w") as f:
                json.dump(content, f)

    def _write_png(self, task: str, record: Record, pixels: np.ndarray) -> None:
        path = os.path.join(self.folder, task, f"{stem(record)}.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not cv2.imwrite(path, pixels):
            raise OSError(f"{path}: the image could not be written. Free disk space or fix the folder.")


def class_ids(info: DatasetInfo) -> list[int]:
    """Return the category id of each class: COCO's ids for its 80 and 133 classes, else 1, 2, ..."""
    coco_ids = {80: THING_IDS, 133: THING_IDS + COCO_STUFF} if info.name.startswith("coco") else {}
    return coco_ids.get(len(info.classes), list(range(1, len(info.classes) + 1)))


def stem(record: Record) -> str:
    """Return the record's key without the extension of an image file."""
    return re.sub(r"\.(jpe?g|png|webp|bmp|tiff?)$", "", record.key, flags=re.IGNORECASE)


def image_id(record: Record) -> int | str:
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d+)", stem(record))
    return int(number[1]) if number else stem(record)


def _rle(mask: np.ndarray) -> dict:
    counts = encode_rle(mask)
    return {"size": list(mask.shape), "counts": counts.decode() if isinstance(counts, bytes) else counts}
