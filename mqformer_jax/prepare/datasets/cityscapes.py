"""Cityscapes' fine annotations: `gtFine/<split>/<city>/*_gtFine_instanceIds.png`, 16-bit PNG files.

A pixel value of 1000 or more is 1000 * label + number of the thing. A smaller value is the label itself; for a thing
class, it marks a group of things that are not separated. Pixels of labels that the evaluation does not use are ignored.
createPanopticImgs.py of cityscapesScripts does the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mqformer_jax.input.record import ClassInfo, Record
from mqformer_jax.prepare.formats.images import Image, read_index, same_size
from mqformer_jax.prepare.formats.label_maps import Piece, paired, panoptic_record
from mqformer_jax.prepare.plan import Job, Plan, Problems, builder

# Label ids of the 19 classes of the evaluation (cityscapesScripts, helpers/labels.py); the other labels from 0 to 33
# are ignored.
STUFF = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
}
STUFF |= {21: "vegetation", 22: "terrain", 23: "sky"}
THINGS = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
LABELS = [*STUFF, *THINGS]
CLASSES = (
    *(ClassInfo((name,), is_region=True) for name in STUFF.values()),
    *(ClassInfo((name,)) for name in THINGS.values()),
)
LAST_LABEL = 33


def panoptic(images: str, labels: str) -> Plan:
    """Return the `Plan` of a split, from folders such as leftImg8bit/train and gtFine/train."""
    jobs, problems = paired(images, labels, image_end="_leftImg8bit", map_end="_gtFine_instanceIds")
    return Plan("cityscapes", CLASSES, jobs, builder(_record), True, problems)


def _record(job: Job, image: Image, problems: Problems) -> Record:
    ids = same_size(read_index(job.labels[0]), image)
    return panoptic_record(job.key, image, _pieces(ids, job.key, problems), CLASSES)


def _pieces(ids: np.ndarray, key: str, problems: Problems) -> Iterator[Piece]:
    for value in np.unique(ids).tolist():
        label = value // 1000 if value >= 1000 else value
        if label > LAST_LABEL:
            problems.add(f"segment: mask value {value} has no class", key)
        elif label in LABELS:
            yield Piece(LABELS.index(label), ids == value, crowd=label in THINGS and value < 1000)
