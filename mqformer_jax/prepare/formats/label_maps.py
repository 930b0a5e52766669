"""Label maps, whose pixel values say which class a pixel has and which thing of that class it belongs to, to
records.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mqformer_jax.input.record import ClassInfo, Record, Segment, box_of, encode_rle
from mqformer_jax.prepare.formats.images import Image, Unusable, files_by_stem
from mqformer_jax.prepare.plan import Job, Problems


class Piece(NamedTuple):
    """Pixels of one class, bool [h, w]: a thing, a part of a stuff class, or (crowd) things that nobody separated."""

    class_id: int
    mask: np.ndarray
    crowd: bool = False


def panoptic_record(
    key: str, image: Image, pieces: Iterable[Piece], classes: Sequence[ClassInfo], partial: Collection[int] = ()
) -> Record:
    """Things one by one, a stuff class as one region however many pieces it has; pixels of no piece are ignored.

    Pieces must not overlap. Raises Unusable where there are none. partial: classes of which a piece was lost.
    """
    merged: dict[object, Piece] = {}
    ignore = np.ones((image.height, image.width), bool)
    for number, piece in enumerate(pieces):
        group = number if classes[piece.class_id].thing else ("stuff", piece.class_id, piece.crowd)
        merged[group] = piece._replace(mask=merged[group].mask | piece.mask) if group in merged else piece
        ignore &= ~piece.mask
    if not merged:
        raise Unusable("image has nothing labelled")
    segments = tuple(
        Segment(p.class_id, box=box_of(p.mask), mask=encode_rle(p.mask), crowd=p.crowd) for p in merged.values()
    )
    code = encode_rle(ignore) if ignore.any() else None
    return Record(key, image.data, image.height, image.width, segments, code, partial_classes=tuple(sorted(partial)))


def paired(images: str, *maps: str, image_end: str = "", map_end: str = "") -> tuple[list[Job], Problems]:
    """Jobs whose `labels` are the paths of an image's maps, one from each folder; what stands alone is counted.

    Names pair after they lost `image_end` or `map_end` ("_leftImg8bit"); a file whose name ends otherwise is no part of
    the set.
    """
    pictures, found = _files(images, image_end), [_files(folder, map_end) for folder in maps]
    jobs, problems = [], Problems()
    for key, path in pictures.items():
        missing = [folder for folder, files in zip(maps, found) if key not in files]
        if missing:
            problems.add(f"image: no mask of its name in {missing[0]}", key)
        else:
            jobs.append(Job(key, key, path, tuple(files[key] for files in found)))
    for folder, files in zip(maps, found):
        for key in sorted(files.keys() - pictures.keys()):
            problems.add(f"mask: no image of its name for one in {folder}", key)
    if not jobs:
        raise ValueError(
            f"{' and '.join(maps)}: no mask *{map_end}.png has the name of an image *{image_end}.* of {images}"
        )
    return jobs, problems


def _files(folder: str, end: str) -> dict[str, str]:
    return {stem.removesuffix(end): path for stem, path in files_by_stem(folder).items() if stem.endswith(end)}


def distinct(names: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Texts of classes without the synonyms that another class has too ("stool" of ADE20K's toilet): they would name
    both.
    """
    uses = collections.Counter(text for texts in names for text in set(texts))
    return [(texts[0], *(t for t in dict.fromkeys(texts[1:]) if uses[t] == 1)) for texts in names]
