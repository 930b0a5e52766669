"""Convert label maps, whose pixel values encode the class and the instance, to records."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mqformer_jax.input.record import ClassInfo, Record, Segment, box_of, encode_rle
from mqformer_jax.prepare.formats.images import Image, Unusable, files_by_stem
from mqformer_jax.prepare.plan import Job, Problems


class Piece(NamedTuple):
    """Some pixels of a class.

    mask: bool [h, w], one thing or a part of a stuff class. crowd: whether the mask shows several things that are not
    separated.
    """

    class_id: int
    mask: np.ndarray
    crowd: bool = False


def panoptic_record(
    key: str, image: Image, pieces: Iterable[Piece], classes: Sequence[ClassInfo], partial: Collection[int] = ()
) -> Record:
    """Return a record with a segment for each thing and a region for each stuff class. Other pixels are ignored.

    Pieces must not overlap. partial: indices of classes with a dropped piece. Raises Unusable if there is no piece.
    """
    merged: dict[object, Piece] = {}
    ignore = np.ones((image.height, image.width), bool)
    for number, piece in enumerate(pieces):
        group = ("stuff", piece.class_id, piece.crowd) if classes[piece.class_id].is_region else number
        merged[group] = piece._replace(mask=merged[group].mask | piece.mask) if group in merged else piece
        ignore &= ~piece.mask
    if not merged:
        raise Unusable("image has nothing labeled")
    segments = tuple(
        Segment(p.class_id, box=box_of(p.mask), mask=encode_rle(p.mask), crowd=p.crowd) for p in merged.values()
    )
    code = encode_rle(ignore) if ignore.any() else None
    return Record(key, image.data, image.height, image.width, segments, code, partial_classes=tuple(sorted(partial)))


def paired(images: str, *maps: str, image_end: str = "", map_end: str = "") -> tuple[list[Job], Problems]:
    """Return a job for each image that has a map in every folder of `maps`, and the problems: files without a partner.

    `Job.labels` holds the paths of the maps. A map has the name of its image, but ends in `map_end` instead of
    `image_end`, e.g. in "_gtFine_instanceIds" instead of "_leftImg8bit". Files with other endings are skipped. Raises
    ValueError if no image has all its maps.
    """
    pictures, found = _files(images, image_end), [_files(folder, map_end) for folder in maps]
    jobs, problems = [], Problems()
    for key, path in pictures.items():
        missing = [folder for folder, files in zip(maps, found) if key not in files]
        if missing:
            problems.add(f"image: no mask with its name in {missing[0]}", key)
        else:
            jobs.append(Job(key, key, path, tuple(files[key] for files in found)))
    for folder, files in zip(maps, found):
        for key in sorted(files.keys() - pictures.keys()):
            problems.add(f"mask in {folder}: no image with its name", key)
    if not jobs:
        raise ValueError(
            f"{' and '.join(maps)}: no mask *{map_end}.png has the name of an image *{image_end}.* in {images}; "
            "check these folders"
        )
    return jobs, problems


def _files(folder: str, end: str) -> dict[str, str]:
    return {stem.removesuffix(end): path for stem, path in files_by_stem(folder).items() if stem.endswith(end)}


def distinct(names: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the names of each class without the synonyms that another class also has.

    For example, "stool" is a synonym of two classes of ADE20K, stool and toilet. A class always keeps its first name.
    """
    uses = collections.Counter(text for texts in names for text in set(texts))
    return [(texts[0], *(t for t in dict.fromkeys(texts[1:]) if uses[t] == 1)) for texts in names]
