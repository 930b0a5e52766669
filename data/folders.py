"""Data sets that are folders of images and folders of masks with the same names: semantic, foreground, mattes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import cv2
import numpy as np
from images import Image, Unusable, files_by_stem, read_grey, read_index, same_size
from shards import Job, Plan, Problems, builder

from mqformer_jax.input.record import ClassInfo, Record, Segment, box_of, encode_rle


def semantic(images: str, masks: str, classes: str, ignore: Sequence[int] | None = None, offset: int | None = None) -> Plan:
    """Index masks: each class present becomes one region. `ignore`, `offset`: see `read_classes`, whose values they replace."""
    names, file_ignore, file_offset = read_classes(classes)
    ignore = file_ignore if ignore is None else ignore
    offset = file_offset if offset is None else offset
    values = [value for value in range(offset, offset + len(names)) if value not in ignore]
    infos = tuple(ClassInfo(names[value - offset], thing=False) for value in values)
    class_of = {value: i for i, value in enumerate(values)}
    jobs, problems = _pairs(images, masks)
    return Plan("semantic", infos, jobs, builder(_semantic, class_of=class_of, unlabelled={*ignore, *range(offset)}), True, problems)


def foreground(images: str, masks: str) -> Plan:
    """Black and white masks of the salient foreground (0 and 255, or 0 and 1)."""
    jobs, problems = _pairs(images, masks)
    return Plan("foreground", (), jobs, builder(_foreground), False, problems)


def mattes(images: str, alphas: str) -> Plan:
    """Alpha mattes of the foreground, 0 to 255."""
    jobs, problems = _pairs(images, alphas)
    return Plan("mattes", (), jobs, builder(_matte), False, problems)


def read_classes(path: str) -> tuple[list[tuple[str, ...]], list[int], int]:
    """Names (with synonyms) of a class list, the mask values that mean "unlabelled", and the mask value of the first class.

    Read are JSON (a list, or {"classes": [...], "ignore_index": 11, "index_offset": 0}), ADE20K's objectInfo150.txt (a table
    whose first column is the mask value and whose last is the name), and plain text, one class a line. Commas part synonyms.
    """
    try:
        with open(path) as f:
            text = f.read()
    except OSError:
        raise FileNotFoundError(f"{path}: no such file") from None
    ignore, offset = [255], 0
    if path.endswith(".json"):
        try:
            fields = json.loads(text)
        except ValueError as e:
            raise ValueError(f"{path}: not JSON: {e}") from None
        fields = {"classes": fields} if isinstance(fields, list) else fields
        if not isinstance(fields, dict) or not isinstance(fields.get("classes"), list):
            raise ValueError(f'{path}: field \'classes\' is missing; give {{"classes": ["sky", ...], "ignore_index": 255}}')
        lines, offset = fields["classes"], fields.get("index_offset", 0)
        ignore = [fields["ignore_index"]] if "ignore_index" in fields else ignore
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        if lines and "\t" in lines[0]:
            offset = int(lines[1].split("\t")[0])
            lines = [line.split("\t")[-1] for line in lines[1:]]
    names = [_synonyms(line if isinstance(line, str) else ",".join(line)) for line in lines]
    twice = [n[0] for i, n in enumerate(names) if n[0] in {m[0] for m in names[:i]}]
    if not names or twice or not all(names):
        raise ValueError(f"{path}: " + (f"class {twice[0]!r} occurs twice" if twice else "a class without a name"))
    return names, ignore, offset


def _synonyms(line: str) -> tuple[str, ...]:
    return tuple(word.strip().replace("_", " ") for word in line.replace(";", ",").split(",") if word.strip())


def _pairs(images: str, masks: str) -> tuple[list[Job], Problems]:
    """Images and masks of the same name; what stands alone is counted."""
    pictures, labels, problems = files_by_stem(images), files_by_stem(masks), Problems()
    for key in sorted(pictures.keys() - labels.keys()):
        problems.add("image: no mask of its name", key)
    for key in sorted(labels.keys() - pictures.keys()):
        problems.add("mask: no image of its name", key)
    jobs = [Job(key, key, path, labels[key]) for key, path in pictures.items() if key in labels]
    if not jobs:
        raise ValueError(f"{masks}: no mask has the name of an image of {images}")
    return jobs, problems


def _semantic(job: Job, image: Image, problems: Problems, class_of: dict[int, int], unlabelled: set[int]) -> Record:
    index = same_size(read_index(job.labels), image)
    segments, ignore = [], np.zeros(index.shape, bool)
    for value in np.unique(index).tolist():
        region = index == value
        if value in class_of:
            segments.append(Segment(class_of[value], box=box_of(region), mask=encode_rle(region)))
            continue
        ignore |= region
        if value not in unlabelled:
            problems.add(f"segment: mask value {value} has no class", job.key)
    if not segments:
        raise Unusable("image has nothing labelled")
    rle = encode_rle(ignore) if ignore.any() else None
    return Record(job.key, image.data, image.height, image.width, tuple(segments), rle)


def _foreground(job: Job, image: Image, problems: Problems) -> Record:
    grey = same_size(read_grey(job.labels), image)
    return foreground_record(job.key, image, grey > (127 if grey.max() > 1 else 0))


def _matte(job: Job, image: Image, problems: Problems) -> Record:
    alpha = same_size(read_grey(job.labels), image)
    return foreground_record(job.key, image, alpha > 127, cv2.imencode(".png", alpha)[1].tobytes())


def foreground_record(key: str, image: Image, mask: np.ndarray, alpha: bytes | None = None) -> Record:
    """The record of one salient foreground, bool [h, w]. Raises Unusable where it is empty."""
    if not mask.any():
        raise Unusable("image has an empty foreground")
    segment = Segment(box=box_of(mask), mask=encode_rle(mask), alpha=alpha, foreground=True)
    return Record(key, image.data, image.height, image.width, (segment,))
