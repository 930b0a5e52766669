"""ADE20K's 150 classes with instances: `annotations/<split>/*.png` and `annotations_instance/<split>/*.png`.

The semantic map holds the class of each pixel, 1 to 150, or 0 for unlabeled pixels. The instance map holds one of 100
instance categories in channel R, and the number of the instance in its image (0: no instance) in channel G. As in
Mask2Former's panoptic ADE20K, the instance map takes precedence where the two maps disagree. Pixels that have a thing
class but no instance become a crowd of that class: the class is present, but the number of its instances is unknown.
(Mask2Former leaves these pixels unlabeled.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mqformer_jax.input.record import ClassInfo, Record
from mqformer_jax.prepare.formats.class_lists import read_classes
from mqformer_jax.prepare.formats.images import Image, read_channels, read_index, same_size
from mqformer_jax.prepare.formats.label_maps import Piece, paired, panoptic_record
from mqformer_jax.prepare.plan import Job, Plan, Problems, builder

# Numbers (1 to 150) of the classes that have no instance category. Instance category i is the i-th of the other
# classes: see the first two columns of the ADE20K challenge's categoryMapping.txt.
STUFF = [
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    10,
    12,
    14,
    17,
    18,
    22,
    26,
    27,
    29,
    30,
    35,
    41,
    47,
    49,
    52,
    53,
    55,
    60,
    61,
    62,
    64,
    69,
    78,
    80,
    85,
    92,
]
STUFF += [95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123, 129, 132, 141, 142, 146]
THINGS = [value for value in range(1, 151) if value not in STUFF]


def panoptic(images: str, semantic: str, instances: str, classes: str) -> Plan:
    """Return the `Plan` of a split.

    For the training split, `images` is the folder images/training, `semantic` annotations/training, and `instances`
    annotations_instance/training. classes: path of objectInfo150.txt.
    """
    names, _, offset = read_classes(classes)
    if (len(names), offset) != (150, 1):
        raise ValueError(
            f"{classes}: has {len(names)} classes, with mask values from {offset} on; "
            "give ADE20K's objectInfo150.txt, which has 150 classes, with mask values from 1 on"
        )
    infos = tuple(ClassInfo(texts, is_region=value not in THINGS) for value, texts in enumerate(names, 1))
    jobs, problems = paired(images, semantic, instances)
    return Plan("ade20k", infos, jobs, builder(_record, classes=infos), True, problems)


def _record(job: Job, image: Image, problems: Problems, classes: tuple[ClassInfo, ...]) -> Record:
    semantic_path, instance_path = job.labels
    semantic = same_size(read_index(semantic_path), image)
    category, number, _ = np.moveaxis(read_channels(instance_path, 3), -1, 0)
    return panoptic_record(
        job.key, image, _pieces(semantic, category, same_size(number, image), job.key, problems), classes
    )


def _pieces(
    semantic: np.ndarray, category: np.ndarray, number: np.ndarray, key: str, problems: Problems
) -> Iterator[Piece]:
    owned = np.zeros(number.shape, bool)
    for instance in np.unique(number[number > 0]).tolist():
        mask = number == instance
        categories = np.unique(category[mask]).tolist()
        what = f"{key} instance {instance}"
        if len(categories) > 1:
            problems.add("segment: instance with two categories", what)
        elif not 1 <= categories[0] <= len(THINGS):
            problems.add(f"segment: instance category {categories[0]} does not exist", what)
        else:
            owned |= mask
            yield Piece(THINGS[categories[0] - 1] - 1, mask)
    for value in np.unique(semantic).tolist():
        crowd = value in THINGS
        mask = (semantic == value) & (~owned if crowd else number == 0)
        if value > 150:
            problems.add(f"segment: mask value {value} has no class", key)
        elif value and mask.any():
            yield Piece(value - 1, mask, crowd)
