"""PASCAL-Context: files `trainval/*.mat`, each with a `LabelMap` of up to 459 labels, for the images of VOC 2010."""

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

# {name in 59_labels.txt: different name of the same class in labels.txt}
ALIASES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
# {name in both files: name with a space, for prompts}
SPELLED = {"pottedplant": "potted plant", "tvmonitor": "tv monitor"}


def semantic(images: str, labels: str, names: str, classes: str | None = None, listed: str | None = None) -> Plan:
    """Return the `Plan` of a split.

    images: folder VOC2010/JPEGImages. labels: folder trainval. names: path of labels.txt. classes: path of
    59_labels.txt, to ignore pixels of other labels, or None to use all 459 labels. listed: path of a list of the
    split's images, e.g. VOC2010/ImageSets/Main/val.txt, or None to use all .mat files.
    """
    for folder in (images, labels):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such folder; check the path")
    label_of = {name: label for label, name in _read_labels(names).items()}
    wanted = list(label_of)
    if classes is not None:
        wanted = [name if name in label_of else ALIASES.get(name, name) for name in _read_labels(classes).values()]
    for name in wanted:
        if name not in label_of:
            raise ValueError(f"{classes}: class {name!r} is not in {names}; give PASCAL-Context's own files")
    infos = tuple(ClassInfo((SPELLED.get(name, name),), is_region=True) for name in wanted)
    class_of = dict.fromkeys([0, *label_of.values()]) | {label_of[name]: i for i, name in enumerate(wanted)}
    stems = _read_list(listed) if listed else sorted(name[:-4] for name in os.listdir(labels) if name.endswith(".mat"))
    if not stems:
        raise ValueError(
            f"{listed or labels}: "
            + (
                "it lists no images; write one image name per line"
                if listed
                else "this folder has no .mat files; give PASCAL-Context's folder trainval"
            )
        )
    jobs = [Job(s, s, os.path.join(images, f"{s}.jpg"), os.path.join(labels, f"{s}.mat")) for s in stems]
    return Plan("pascal_context", infos, jobs, builder(_record, class_of=class_of, classes=infos))


def _record(
    job: Job, image: Image, problems: Problems, class_of: dict[int, int | None], classes: tuple[ClassInfo, ...]
) -> Record:
    label_map = same_size(read_label_map(job.labels), image)
    return panoptic_record(job.key, image, _pieces(label_map, class_of, job.key, problems), classes)


def _pieces(label_map: np.ndarray, class_of: dict[int, int | None], key: str, problems: Problems) -> Iterator[Piece]:
    """Yield the region of each class. class_of: {label: class index, or None if the label is ignored}."""
    for value in np.unique(label_map).tolist():
        if value not in class_of:
            problems.add(f"segment: mask value {value} has no class", key)
        elif class_of[value] is not None:
            yield Piece(class_of[value], label_map == value)


def _read_lines(path: str) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _read_list(path: str) -> list[str]:
    """Return the image names in a list file: the first word of each line."""
    return [line.split()[0] for line in _read_lines(path)]


def _read_labels(path: str) -> dict[int, str]:
    """Return {label: name} of a file with lines like "3: air conditioner", without label 0 (unlabeled pixels)."""
    found: dict[int, str] = {}
    for line in _read_lines(path):
        number, _, name = line.partition(":")
        if not number.strip().isdigit() or not name.strip():
            raise ValueError(
                f"{path}: line {line!r} does not look like '3: air conditioner'; give PASCAL-Context's own file"
            )
        found[int(number)] = name.strip()
    found.pop(0, None)
    twice = [name for name in found.values() if list(found.values()).count(name) > 1]
    if twice or not found:
        raise ValueError(
            f"{path}: "
            + (f"class {twice[0]!r} occurs twice" if twice else "it contains no classes")
            + "; give PASCAL-Context's own file"
        )
    return found


# ---- MATLAB 5 files ------------------------------------------------------------------------------------------------
# scipy.io.loadmat (scipy 1.17) is not used, because one damaged byte can crash the process. In the file format, an
# element consists of a type, a size and bytes. A matrix consists of elements.

COMPRESSED, MATRIX = 15, 14
INTEGERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"}
MOST_BYTES = 1 << 28  # limit of an unpacked label map: without one, a small file may unpack to any size


def read_label_map(path: str) -> np.ndarray:
    """Return the `LabelMap` in a .mat file (MATLAB's save -v6 or -v7) as integers [h, w].

    Raises Unusable if the file is missing, damaged, of another format, or without a LabelMap.
    """
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
        raise Unusable("mask is damaged or not a MATLAB 5 file of integers") from None
    raise Unusable("mask file has no LabelMap")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        start = at + 8
        if kind >> 16:  # short form: type and size share 4 bytes, then come up to 4 bytes of data
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data):
            raise ValueError("the file is truncated")
        yield kind, data[start : start + size]
        at = start + size + (-(start + size - at) % 8 if kind != COMPRESSED else 0)
