"""BDD100K's panoptic bit masks: `labels/pan_seg/bitmasks/<split>/*.png`, four 8-bit channels.

Channel R holds the category of a pixel, and G the attributes. 256 B + A is the number of the region in its image. The
classes are all 40 categories of the panoptic evaluation; category 0 means unlabeled.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

import numpy as np

from mqformer_jax.input.record import ClassInfo, Record
from mqformer_jax.prepare.formats.images import Image, read_channels, same_size
from mqformer_jax.prepare.formats.label_maps import Piece, paired, panoptic_record
from mqformer_jax.prepare.plan import Job, Plan, Problems, builder

# Names of the categories 1, 2, ... (bdd100k/label/label.py). The first 30 are stuff, the rest are things.
NAMES = """dynamic, ego vehicle, ground, static, parking, rail track, road, sidewalk, bridge, building, fence, garage,
guard rail, tunnel, wall, banner, billboard, lane divider, parking sign, pole, pole group, street light, traffic cone,
traffic device, traffic light, traffic sign, traffic sign frame, terrain, vegetation, sky, person, rider, bicycle, bus,
car, caravan, motorcycle, trailer, train, truck"""
STUFF = 30
CLASSES = tuple(ClassInfo((" ".join(name.split()),), is_region=i < STUFF) for i, name in enumerate(NAMES.split(",")))
# Bits of the attributes: 8 truncated, 4 occluded, 2 crowd, 1 ignore. The official evaluation leaves out regions with
# the attribute crowd or ignore.
CROWD_OR_IGNORE = 3


def panoptic(images: str, bitmasks: str) -> Plan:
    """Return the `Plan` of a split, from folders such as images/10k/train and labels/pan_seg/bitmasks/train."""
    jobs, problems = paired(images, bitmasks)
    return Plan("bdd100k", CLASSES, jobs, builder(_record), True, problems)


def _record(job: Job, image: Image, problems: Problems) -> Record:
    r, g, b, a = np.moveaxis(read_channels(job.labels[0], 4).astype(np.uint32), -1, 0)
    crowd = (g & CROWD_OR_IGNORE) > 0
    regions = same_size(r << 24 | crowd << 16 | b << 8 | a, image)
    return panoptic_record(job.key, image, _pieces(regions, job.key, problems), CLASSES)


def _pieces(regions: np.ndarray, key: str, problems: Problems) -> Iterator[Piece]:
    values = [(value, value >> 24, value & 0xFFFF) for value in np.unique(regions).tolist()]
    uses = collections.Counter(number for _, category, number in values if category > STUFF)
    for value, category, number in values:
        if category > len(CLASSES):
            problems.add(f"segment: category {category} does not exist", f"{key} region {number}")
        elif category:
            torn = category > STUFF and uses[number] > 1
            if torn:
                problems.add("note: two things with the same number; both become crowds", f"{key} region {number}")
            yield Piece(category - 1, regions == value, crowd=torn or bool(value >> 16 & 1))
