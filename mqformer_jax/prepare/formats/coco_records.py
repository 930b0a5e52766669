"""COCO annotations of one image to its record, in a worker process. Whatever is wrong is counted, never guessed at."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from hotcoco import mask as rle_codec

from mqformer_jax.input.record import ClassInfo, Record, Segment, decode_rle, encode_rle
from mqformer_jax.prepare.formats import label_maps
from mqformer_jax.prepare.formats.folders import foreground_record
from mqformer_jax.prepare.formats.images import Image, Unusable, read_ids, same_size
from mqformer_jax.prepare.formats.label_maps import Piece
from mqformer_jax.prepare.plan import Job, Problems

Box = tuple[float, float, float, float]


class Labels(NamedTuple):
    """What the json says of one image. items: its annotations, as the family needs them. height, width: pixels, if
    given.

    negative, not_exhaustive: LVIS's category ids checked to be absent, and labelled only in part.
    """

    items: Any
    height: int | None
    width: int | None
    negative: tuple[int, ...]
    not_exhaustive: tuple[int, ...]


def panoptic_record(
    job: Job, image: Image, problems: Problems, class_of: dict[int, int], classes: Sequence[ClassInfo]
) -> Record:
    """Things one by one, a stuff class as one region however many pieces it has; every other pixel is ignored."""
    png, infos = items_of(job, image)
    ids = same_size(read_ids(png), image)
    present = set(np.unique(ids).tolist()) - {0}
    pieces: dict[int, Piece] = {}
    for info in infos:
        segment_id, what = info.get("id"), f"{job.key} segment {info.get('id')}"
        if segment_id in pieces:
            problems.add("segment: its id comes twice in the json", what)
        elif segment_id not in present:
            problems.add("segment: in the json, not in the PNG", what)
        elif info.get("category_id") not in class_of:
            problems.add("segment: unknown category", what)
        else:
            try:
                pieces[segment_id] = Piece(class_of[info["category_id"]], ids == segment_id, flag(info, "iscrowd"))
            except Unusable as e:
                problems.add(f"segment: {e}", what)
    kept = {piece.class_id for piece in pieces.values()}
    partial = {class_of[c] for c in _lost(infos, pieces) if c in class_of}
    for segment_id in sorted(present - {info.get("id") for info in infos}):
        problems.add("segment: in the PNG, not in the json", f"{job.key} segment {segment_id}")
        partial |= set(range(len(classes))) - kept  # it could be any of them
    return label_maps.panoptic_record(job.key, image, pieces.values(), classes, partial)


def _lost(infos: Sequence[Mapping[str, Any]], pieces: Mapping[int, Piece]) -> Iterator[Any]:
    """Categories of the segments that were dropped; of two with one id, which is meant is not known."""
    uses = collections.Counter(info.get("id") for info in infos)
    return (info.get("category_id") for info in infos if info.get("id") not in pieces or uses[info.get("id")] > 1)


def instances_record(job: Job, image: Image, problems: Problems, class_of: dict[int, int], federated: bool) -> Record:
    """Every annotation a segment. A class that lost an annotation counts as labelled in part, so it is not taught
    absent.

    A box that comes twice is one object (Objects365 repeats all of an image's boxes now and then).
    """
    segments, partial = [], set(job.labels.not_exhaustive)
    for annotation in items_of(job, image):
        category, what = annotation.get("category_id"), f"{job.key} annotation {annotation.get('id')}"
        try:
            segment = shape(annotation, image, problems, what, _class(category, class_of))
            if segment.mask is None and segment in segments:
                problems.add("segment: the same box twice", what)
            else:
                segments.append(segment)
        except Unusable as e:
            problems.add(f"segment: {e}", what)
            partial.add(category)
    owned = {s.class_id for s in segments}
    partial = {class_of[c] for c in partial if c in class_of}
    absent = {class_of[c] for c in job.labels.negative if c in class_of} - owned - partial
    if federated and not owned and not absent:
        raise Unusable("image has nothing labelled")
    lists = {"absent_classes": tuple(sorted(absent)), "partial_classes": tuple(sorted(partial))}
    return Record(job.key, image.data, image.height, image.width, tuple(segments), **lists)


def referring_record(
    job: Job, image: Image, problems: Problems, class_of: dict[int, int], every: bool = False
) -> Record:
    """One segment for each object referred to, with all its expressions. Its class is labelled in part: others go
    unmentioned.

    An expression of two objects is no target of either and is dropped; one that is also said to name nothing stays
    present.
    `every`: to evaluate on, where published figures count each expression as often as it was said, whatever it names.
    """
    found: dict[Any, tuple[Segment, list[str]]] = {}
    absent: list[str] = []
    for number, ref in enumerate(items_of(job, image)):
        what = f"{job.key} ref {ref.get('ref_id', number)}"
        try:
            texts = _sentences(ref, problems, what)
            if flag(ref, "no_target"):
                absent += texts
                continue
            key = tuple(round(v, 1) for v in ref["bbox"]) if ref.get("bbox") else ref.get("ann_id", ("ref", number))
            class_id = _class(ref["category_id"], class_of) if "category_id" in ref else None
            # somebody pointed at it, so it is a target
            segment = shape({**ref, "iscrowd": 0}, image, problems, what, class_id)
            old, old_texts = found.get(key, (segment, []))
            found[key] = (old if old.mask else segment, old_texts + texts)
        except Unusable as e:
            problems.add(f"expression: {e}", what)
        except (TypeError, ValueError):
            problems.add("expression: malformed mask or box", what)
    uses = collections.Counter(text for _, texts in found.values() for text in set(texts))
    if every:
        segments = tuple(dataclasses.replace(segment, texts=tuple(texts)) for segment, texts in found.values())
        return _referred(job, image, segments, tuple(absent))
    for text in sorted(uses):
        if uses[text] > 1:
            problems.add("expression: names two objects", f"{job.key} {text!r}")
        elif text in absent:
            problems.add("expression: both present and absent", f"{job.key} {text!r}")
    segments = []
    for segment, texts in found.values():
        own = tuple(dict.fromkeys(text for text in texts if uses[text] == 1))
        if own:
            segments.append(dataclasses.replace(segment, texts=own))
    return _referred(job, image, tuple(segments), tuple(text for text in dict.fromkeys(absent) if text not in uses))


def _referred(job: Job, image: Image, segments: tuple[Segment, ...], absent: tuple[str, ...]) -> Record:
    if not segments and not absent:
        raise Unusable("image has no usable expression")
    partial = tuple(sorted({s.class_id for s in segments if s.class_id is not None}))
    return Record(
        job.key, image.data, image.height, image.width, segments, absent_texts=absent, partial_classes=partial
    )


def foreground_union(job: Job, image: Image, problems: Problems) -> Record:
    """The union of some annotations as one salient foreground."""
    masks = [shape(annotation, image, problems, job.key, None).mask for annotation in items_of(job, image)]
    if None in masks:
        raise Unusable("image has an annotation without a mask")
    union = np.any([decode_rle(mask, image.height, image.width) for mask in masks], axis=0)
    return foreground_record(job.key, image, union)


def items_of(job: Job, image: Image) -> Any:
    """The annotations. Raises Unusable where they were made for another size than the image's (say, before EXIF
    rotation).
    """
    said, real = (job.labels.height, job.labels.width), (image.height, image.width)
    if None not in said and said != real:
        turned = " (turned by EXIF)" if said == real[::-1] else ""
        raise Unusable(f"image has another size than the json says{turned}")
    return job.labels.items


def _class(category: Any, class_of: dict[int, int]) -> int:
    if category not in class_of:
        raise Unusable("unknown category")
    return class_of[category]


def _sentences(ref: Mapping[str, Any], problems: Problems, what: str) -> list[str]:
    """The expressions of a ref: a string, several, or RefCOCO's {"sent": ..., "raw": ...}, of which `sent` is the
    cleaned one.
    """
    if flag(ref, "uncertain"):
        raise Unusable("marked as uncertain")
    said = ref.get("sentences", [])
    texts = [s.get("sent") if isinstance(s, dict) else s for s in (said if isinstance(said, list) else [said])]
    for _ in (text for text in texts if not isinstance(text, str)):
        problems.add("expression: no text", what)
    texts = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise Unusable("no sentence")
    return texts


_FLAGS = dict.fromkeys(("0", "false", "none"), False) | dict.fromkeys(("1", "true"), True)


def flag(item: Mapping[str, Any], field: str) -> bool:
    """A field that is 0 or 1, false or true, or either as text; a missing one is false. Raises Unusable for all
    else.
    """
    value = str(item.get(field, 0)).lower()
    if value not in _FLAGS:
        raise Unusable(f"'{field}' is neither 0 nor 1")
    return _FLAGS[value]


# ---- Shapes --------------------------------------------------------------------------------------------------------


def shape(annotation: Mapping[str, Any], image: Image, problems: Problems, what: str, class_id: int | None) -> Segment:
    """The segment of an annotation: mask and box, or a box alone. Raises Unusable, for malformed values too."""
    crowd = flag(annotation, "iscrowd")
    try:
        if annotation.get("segmentation"):
            segment = _masked(_rle(annotation["segmentation"], image), image, class_id=class_id, crowd=crowd)
            box = _corners(annotation["bbox"], image) if annotation.get("bbox") else segment.box
            if iou(box, segment.box) >= 0.9 or max(abs(a - b) for a, b in zip(box, segment.box)) <= 2:
                return dataclasses.replace(segment, box=box)  # exact to fractions of a pixel
            problems.add("note: box disagrees with its mask; the mask's box is kept", what)
            return segment
        if not annotation.get("bbox"):
            raise Unusable("neither mask nor box")
        box = _corners(annotation["bbox"], image)
        x, y, w, h = annotation["bbox"]
        if w <= 0 or h <= 0:
            raise Unusable("box without area")
        if box[0] >= box[2] or box[1] >= box[3]:
            raise Unusable("box outside its image")
        if min(x, y) < -1 or x + w > image.width + 1 or y + h > image.height + 1:
            problems.add("note: box clipped to its image (json boxes are x, y, width, height)", what)
        return Segment(class_id, box=box, crowd=crowd)
    except Unusable:
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Unusable("malformed mask or box") from None


def _corners(xywh: Sequence[Any], image: Image) -> Box:
    """A COCO box x, y, width, height as x0, y0, x1, y1, clipped to the image."""
    x, y, w, h = (float(v) for v in xywh)
    if not all(map(math.isfinite, (x, y, w, h))):
        raise ValueError("not finite")
    return max(x, 0.0), max(y, 0.0), min(x + w, float(image.width)), min(y + h, float(image.height))


def iou(a: Box, b: Box) -> float:
    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0, 0.0) * max(y1 - y0, 0.0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return common / (area(*a) + area(*b) - common + 1e-9)


def _masked(counts: bytes, image: Image, **fields: Any) -> Segment:
    x, y, w, h = rle_codec.toBbox({"size": [image.height, image.width], "counts": counts})
    return Segment(box=(float(x), float(y), float(x + w), float(y + h)), mask=counts, **fields)


def _rle(segmentation: Any, image: Image) -> bytes:
    """Polygons, counts or compressed counts to compressed run-length code. Raises Unusable where nothing is in it."""
    height, width = image.height, image.width
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise Unusable("mask has another size than its image")
        if isinstance(segmentation["counts"], list):
            segmentation = rle_codec.frPyObjects(segmentation, height, width)
        if sum(_runs(segmentation["counts"])) != height * width:
            raise Unusable("run-length code of another size than its image")
        rle = {"size": [height, width], "counts": encode_rle(rle_codec.decode(segmentation))}
    else:
        polygons = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0 and all(map(math.isfinite, p))]
        if not polygons:
            raise Unusable("empty polygon")
        if len(polygons) < len(segmentation):
            raise Unusable("a part of its polygon is malformed")
        rle = rle_codec.merge(rle_codec.frPyObjects(polygons, height, width))
    if not rle_codec.area(rle):
        raise Unusable("mask is empty")
    return rle["counts"]


def _runs(counts: str | bytes) -> list[int]:
    """Lengths of the runs of a compressed code, which the library does not tell: it reads what was cut short without
    complaint.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        value |= (byte - 48 & 31) << shift
        shift += 5
        if (
            not byte - 48 & 32
        ):  # the last five bits of a run; the fifth is the sign, and from the fourth run on it is a difference
            value -= (byte - 48 & 16) << shift - 4
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
