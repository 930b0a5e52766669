"""Plans for folders of images and of masks with the same names: semantic classes, foregrounds, mattes."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from mqformer_jax.input.record import ClassInfo, Record, Segment, box_of, encode_rle
from mqformer_jax.prepare.formats.class_lists import read_classes, read_colors, read_text
from mqformer_jax.prepare.formats.images import (
    EXTENSIONS,
    JPEG,
    Image,
    Unusable,
    files_by_stem,
    read_gray,
    read_index,
    same_size,
)
from mqformer_jax.prepare.plan import Job, Plan, Problems, builder, coco_origin

# ---- Plans, made from folders --------------------------------------------------------------------------------------


def semantic(
    images: str,
    masks: str,
    classes: str,
    ignore: Sequence[int] | None = None,
    offset: int | None = None,
    names: str | None = None,
    suffix: str = "",
) -> Plan:
    """Return the `Plan` of masks whose pixel values, or whose colors, stand for classes. Each class becomes one region.

    classes: path of the class list, which has colors if the masks are color images. ignore: mask values of unlabeled
    pixels. offset: mask value of the first class. Both default to what `read_classes` returns. names, suffix: see
    `pairs`.
    """
    listed, file_ignore, offset = read_classes(classes, offset)
    ignore = file_ignore if ignore is None else ignore
    values = [value for value in range(offset, offset + len(listed)) if value not in ignore]
    infos = tuple(ClassInfo(listed[value - offset], is_region=True) for value in values)
    class_of = {value: i for i, value in enumerate(values)}
    colors = {color: offset + i for color, i in read_colors(classes).items()}
    jobs, problems = pairs(images, masks, names, suffix)
    make = builder(_semantic, class_of=class_of, unlabeled={*ignore, *range(offset)}, colors=colors)
    return Plan("semantic", infos, jobs, make, True, problems)


def foreground(images: str, masks: str, names: str | None = None, suffix: str = "") -> Plan:
    """Return the `Plan` of black and white masks of the salient foreground. names, suffix: see `pairs`."""
    jobs, problems = pairs(images, masks, names, suffix)
    return Plan("foreground", (), jobs, builder(_foreground), False, problems)


def mattes(images: str, alphas: str, trimaps: str | None = None, names: str | None = None, suffix: str = "") -> Plan:
    """Return the `Plan` to prepare foreground alpha mattes, with optional trimaps. names, suffix: see `pairs`."""
    jobs, problems = pairs(images, alphas, names, suffix)
    found = files_by_stem(trimaps) if trimaps else {}
    if trimaps and not any(job.key in found for job in jobs):
        raise ValueError(
            f"{trimaps}: no trimap has the name of an image in {images}; rename the trimaps, e.g. to 1.png for 1.jpg"
        )
    for job in jobs:
        job.labels = (job.labels, found.get(job.key))
        if trimaps and job.key not in found:
            problems.add("trimap: no file with the name of its image", job.key)
    return Plan("mattes", (), jobs, builder(_matte), False, problems)


# ---- Pairs of images and masks -------------------------------------------------------------------------------------


def pairs(images: str, masks: str, names: str | None = None, suffix: str = "") -> tuple[list[Job], Problems]:
    """Return a job for each image that has a mask, and the problems, which are files without a partner.

    A mask has the name of its image plus `suffix`, with any extension. names: a file that lists the images of this
    split (default: all images). `images` and `masks` may be the same folder: then the masks are the files whose names
    end in `suffix` or, without a suffix, the files that are not JPEGs. Raises ValueError if no image has a mask.
    """
    problems = Problems()
    if not os.path.isdir(images) or not os.path.isdir(masks) or not os.path.samefile(images, masks):
        pictures, labels = files_by_stem(images), files_by_stem(masks)
    elif suffix:
        labels = files_by_stem(masks)
        pictures = {key: path for key, path in labels.items() if not key.endswith(suffix)}
    else:
        pictures, labels = files_by_stem(images, JPEG), files_by_stem(masks, [e for e in EXTENSIONS if e not in JPEG])
    labels = {key.removesuffix(suffix): path for key, path in labels.items() if key.endswith(suffix)}
    alone = [] if names else labels.keys() - pictures.keys()
    if names:
        pictures = {key: pictures[key] for key in _listed(names, pictures, problems)}
    for key in sorted(pictures.keys() - labels.keys()):
        problems.add("image: no mask with its name", key)
    for key in sorted(alone):
        problems.add("mask: no image with its name", key)
    jobs = [Job(key, key, path, labels[key], coco_origin(path)) for key, path in pictures.items() if key in labels]
    if not jobs:
        raise ValueError(
            f"{masks}: no mask has the name of an image in {names or images}"
            + f" and the suffix {suffix}" * bool(suffix)
            + f"; rename the masks, e.g. to 1{suffix}.png for 1.jpg"
        )
    return jobs, problems


def _listed(path: str, keys: dict[str, str], problems: Problems) -> list[str]:
    """Return the sorted keys of the images that a list file names. Count lines without an image as problems.

    Raises ValueError if no line names an image.
    """
    lines = list(dict.fromkeys(line.strip() for line in read_text(path).splitlines() if line.strip()))
    found = set()
    for line in lines:
        key = next((key for name in _names(line) for key in _tails(name, keys)), None)
        if key is None:
            problems.add("image: in the list, not in the folder", line)
        else:
            found.add(key)
    if not found:
        raise ValueError(
            f"{path}: no line names an image in --images (first line: {lines[0]!r}); write one image name per line"
            if lines
            else f"{path}: the file is empty; write one image name per line"
        )
    return sorted(found)


def _names(line: str) -> list[str]:
    """Return the possible image names in a line of a list file.

    The whole line may be the name. The text before the first space may be the name if the text after it is a number or
    the path of a mask.
    """
    first, _, rest = line.partition(" ")
    paths = all("/" in path or path.lower().endswith(EXTENSIONS) for path in (first, rest.strip()))
    return [line, first] if paths or re.fullmatch(r"\s*-?\d+", rest) else [line]


def _tails(name: str, keys: dict[str, str]) -> Iterator[str]:
    """Yield the keys to which an image name in a list file may refer.

    A key is the name without its extension and, possibly, without its first folders. The rest of the name must agree
    with the end of the key's path on disk. For example, x/photos/1.jpg may
    refer to the key "1" if the path on disk is .../photos/1.jpg. keys: {key: path on disk}.
    """
    stem, extension = os.path.splitext(posixpath.normpath(name))
    parts = (stem if extension.lower() in EXTENSIONS else posixpath.normpath(name)).split("/")
    for i in range(len(parts)):
        key = "/".join(parts[i:])
        if key in keys and (
            i == 0 or parts[i - 1] in ("", os.path.abspath(keys[key]).split(os.sep)[i - 1 - len(parts)])
        ):
            yield key


# ---- Records, in a worker process ----------------------------------------------------------------------------------


def _semantic(
    job: Job, image: Image, problems: Problems, class_of: dict[int, int], unlabeled: set[int], colors: dict[int, int]
) -> Record:
    index = same_size(read_index(job.labels, colors), image)
    segments, ignore = [], np.asarray(index < 0)
    if ignore.any():
        color = -1 - int(index[ignore][0])
        rgb = color >> 16, color >> 8 & 255, color & 255
        problems.add("segment: mask color has no class", f"{job.key} {rgb}")
    for value in np.unique(index[~ignore]).tolist():
        region = index == value
        if value in class_of:
            segments.append(Segment(class_of[value], box=box_of(region), mask=encode_rle(region)))
            continue
        ignore |= region
        if value not in unlabeled:
            problems.add(f"segment: mask value {value} has no class", job.key)
    if not segments:
        raise Unusable("image has nothing labeled")
    rle = encode_rle(ignore) if ignore.any() else None
    return Record(job.key, image.data, image.height, image.width, tuple(segments), rle)


def _foreground(job: Job, image: Image, problems: Problems) -> Record:
    return foreground_record(job.key, image, read_mask(job.labels, image))


def _matte(job: Job, image: Image, problems: Problems) -> Record:
    alpha_path, trimap_path = job.labels
    alpha = same_size(read_gray(alpha_path), image)
    trimap = None
    if trimap_path:
        try:
            trimap = _png(_read_trimap(trimap_path, image))
        except Unusable as e:
            problems.add(f"trimap: {str(e).removeprefix('trimap ')}", job.key)
    return foreground_record(job.key, image, alpha > 127, _png(alpha), trimap)


def _read_trimap(path: str, image: Image) -> np.ndarray:
    trimap = same_size(read_gray(path, "trimap"), image, "trimap")
    if trimap.max() < 3:
        raise Unusable("trimap has no value above 2; unknown is 128, inside is 255")
    return trimap


def read_mask(path: str, image: Image) -> np.ndarray:
    """Return a black and white mask as bool [h, w], True where it is white.

    Pixels above 127 are white. If all values are 0 or 1, pixels of 1 are white. Raises Unusable if the file is missing
    or damaged, if its size differs from the image's, or if the largest value is between 2 and 127.
    """
    gray = same_size(read_gray(path), image)
    if 1 < gray.max() < 128:
        raise Unusable("mask has a largest value between 2 and 127; save white as 255, or as 1")
    return gray > (127 if gray.max() > 1 else 0)


def foreground_record(
    key: str, image: Image, mask: np.ndarray, alpha: bytes | None = None, trimap: bytes | None = None
) -> Record:
    """Return the record of an image with one salient foreground.

    mask: bool [h, w]. alpha, trimap: bytes of PNG files. Raises Unusable if the mask is empty.
    """
    if not mask.any():
        raise Unusable("image has an empty foreground")
    segment = Segment(box=box_of(mask), mask=encode_rle(mask), alpha=alpha, trimap=trimap, foreground=True)
    return Record(key, image.data, image.height, image.width, (segment,))


def _png(gray: np.ndarray) -> bytes:
    return cv2.imencode(".png", gray)[1].tobytes()
