"""PASCAL-Context: `trainval/*.mat`, each with a `LabelMap` of 459 labels, over the pictures of VOC 2010."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from mqformer_jax.input.record import ClassInfo, Record
from mqformer_jax.prepare.formats.class_lists import read_text
from mqformer_jax.prepare.formats.images import Image, Unusable, same_size
from mqformer_jax.prepare.formats.label_maps import Piece, panoptic_record
from mqformer_jax.prepare.plan import Job, Plan, Problems, builder

# What 59_labels.txt calls otherwise than labels.txt does, and words that run together in both.
ALIASES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
SPELLED = {"pottedplant": "potted plant", "tvmonitor": "tv monitor"}


def semantic(images: str, labels: str, names: str, classes: str | None = None, listed: str | None = None) -> Plan:
    """`images`: VOC2010/JPEGImages. `labels`: trainval. `names`: labels.txt.

    `classes`: 59_labels.txt, or None for all 459; pixels of other labels are ignored. `listed`: the images of this
    split (VOC2010/ImageSets/Main/val.txt), or None for every .mat there is.
    """
    for folder in (images, labels):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such folder")
    label_of = {name: label for label, name in _read_labels(names).items()}
    wanted = list(label_of)
    if classes is not None:
        wanted = [name if name in label_of else ALIASES.get(name, name) for name in _read_labels(classes).values()]
    for name in wanted:
        if name not in label_of:
            raise ValueError(f"{classes}: class {name!r} is not in {names}")
    infos = tuple(ClassInfo((SPELLED.get(name, name),), thing=False) for name in wanted)
    class_of = dict.fromkeys([0, *label_of.values()]) | {label_of[name]: i for i, name in enumerate(wanted)}
    stems = _read_list(listed) if listed else sorted(name[:-4] for name in os.listdir(labels) if name.endswith(".mat"))
    if not stems:
        raise ValueError(f"{listed or labels}: {'no name of an image in it' if listed else 'no .mat file in it'}")
    jobs = [Job(s, s, os.path.join(images, f"{s}.jpg"), os.path.join(labels, f"{s}.mat")) for s in stems]
    return Plan("pascal-context", infos, jobs, builder(_record, class_of=class_of, classes=infos))


def _record(
    job: Job, image: Image, problems: Problems, class_of: dict[int, int | None], classes: tuple[ClassInfo, ...]
) -> Record:
    label_map = same_size(read_label_map(job.labels), image)
    return panoptic_record(job.key, image, _pieces(label_map, class_of, job.key, problems), classes)


def _pieces(label_map: np.ndarray, class_of: dict[int, int | None], key: str, problems: Problems) -> Iterator[Piece]:
    """`class_of`: None for labels that are ignored."""
    for value in np.unique(label_map).tolist():
        if value not in class_of:
            problems.add(f"segment: mask value {value} has no class", key)
        elif class_of[value] is not None:
            yield Piece(class_of[value], label_map == value)


def _read_lines(path: str) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _read_list(path: str) -> list[str]:
    """The first column of VOC's lists of images."""
    return [line.split()[0] for line in _read_lines(path)]


def _read_labels(path: str) -> dict[int, str]:
    """Lines like "3: air conditioner". A label 0 ("background") is no class: it marks what nobody labelled."""
    found: dict[int, str] = {}
    for line in _read_lines(path):
        number, _, name = line.partition(":")
        if not number.strip().isdigit() or not name.strip():
            raise ValueError(f"{path}: line {line!r} is not like '3: air conditioner'")
        found[int(number)] = name.strip()
    found.pop(0, None)
    twice = [name for name in found.values() if list(found.values()).count(name) > 1]
    if twice or not found:
        raise ValueError(f"{path}: " + (f"class {twice[0]!r} occurs twice" if twice else "it holds no class"))
    return found


# ---- MATLAB 5 files ------------------------------------------------------------------------------------------------
# Read here and not by scipy.io.loadmat: one damaged byte can make that crash its process (scipy 1.17), so that a single
# file would end the whole preparation. An element is a type, a size and its bytes; a matrix is made of elements again.

COMPRESSED, MATRIX = 15, 14
INTEGERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"}
MOST_BYTES = 1 << 28  # a small file may unpack to any size


def read_label_map(path: str) -> np.ndarray:
    """The matrix `LabelMap` of a .mat file (as MATLAB's save -v6 and -v7 write it), integers [h, w]."""
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError:
        raise Unusable("mask file is missing") from None
    try:
        order = {b"IM": "<", b"MI": ">"}[data[126:128]]
        for kind, body in _elements(data[128:], order):
            if kind == COMPRESSED:
                ((kind, body),) = _elements(zlib.decompressobj().decompress(body, MOST_BYTES), order)
            parts = list(_elements(body, order)) if kind == MATRIX else []
            if len(parts) > 3 and parts[2][1] == b"LabelMap":
                _, (_, shape), _, (stored, values), *_ = parts
                height, width = np.frombuffer(shape, order + "i4")
                return np.frombuffer(values, order + INTEGERS[stored]).reshape(width, height).T
    except (ValueError, KeyError, struct.error, zlib.error):
        raise Unusable("mask is damaged, or no MATLAB 5 file of integers") from None
    raise Unusable("mask file has no LabelMap")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        start = at + 8
        if kind >> 16:  # the short form: size and type in one word, up to four bytes in the other
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data):
            raise ValueError("cut short")
        yield kind, data[start : start + size]
        at = start + size + (-(start + size - at) % 8 if kind != COMPRESSED else 0)
