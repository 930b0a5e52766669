"""Convert the COCO annotations of an image to a record, in a worker process.

Unusable annotations are dropped and counted.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from hotcoco import mask as rle_codec

from mqformer_jax.input.record import ClassInfo, Record, Segment, box_iou, decode_rle, encode_rle
from mqformer_jax.prepare.formats import label_maps
from mqformer_jax.prepare.formats.folders import foreground_record
from mqformer_jax.prepare.formats.images import Image, Unusable, read_ids, same_size
from mqformer_jax.prepare.formats.label_maps import Piece
from mqformer_jax.prepare.plan import Job, Problems

Box = tuple[float, float, float, float]


class Labels(NamedTuple):
    """The JSON annotations of one image.

    items: the annotations, as the JSON file stores them. height, width: the image's size in pixels according to the
    JSON file, or None. negative: ids of categories that are verified as absent (LVIS). not_exhaustive: ids of
    categories that are labeled only in part (LVIS).
    """

    items: Any
    height: int | None
    width: int | None
    negative: tuple[int, ...]
    not_exhaustive: tuple[int, ...]


def panoptic_record(
    job: Job, image: Image, problems: Problems, class_of: dict[int, int], classes: Sequence[ClassInfo]
) -> Record:
    """Return a record with a segment for each thing and a region for each stuff class. Other pixels are ignored."""
    png, infos = items_of(job, image)
    ids = same_size(read_ids(png), image)
    present = set(np.unique(ids).tolist()) - {0}
    pieces: dict[int, Piece] = {}
    for info in infos:
        segment_id, what = info.get("id"), f"{job.key} segment {info.get('id')}"
        if segment_id in pieces:
            problems.add("segment: its id occurs twice in the JSON", what)
        elif segment_id not in present:
            problems.add("segment: in the JSON, not in the PNG", what)
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
        problems.add("segment: in the PNG, not in the JSON", f"{job.key} segment {segment_id}")
        partial |= set(range(len(classes))) - kept  # any of these may be its class
    return label_maps.panoptic_record(job.key, image, pieces.values(), classes, partial)


def _lost(infos: Sequence[Mapping[str, Any]], pieces: Mapping[int, Piece]) -> Iterator[Any]:
    """Return the category ids of dropped segments, and of segments whose segment id occurs more than once."""
    uses = collections.Counter(info.get("id") for info in infos)
    return (info.get("category_id") for info in infos if info.get("id") not in pieces or uses[info.get("id")] > 1)


def instances_record(job: Job, image: Image, problems: Problems, class_of: dict[int, int], federated: bool) -> Record:
    """Return a record with a segment for each annotation.

    A class with a dropped annotation counts as labeled in part. If two annotations without masks have the same class
    and box, they are one object (Objects365 sometimes repeats all boxes of an image).
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
        raise Unusable("image has nothing labeled")
    lists = {"absent_classes": tuple(sorted(absent)), "partial_classes": tuple(sorted(partial))}
    return Record(job.key, image.data, image.height, image.width, tuple(segments), **lists)


def referring_record(
    job: Job, image: Image, problems: Problems, class_of: dict[int, int], every: bool = False
) -> Record:
    """Return a record with one segment for each object, which has all expressions of the object.

    The classes of the objects count as labeled in part. An expression that names two objects is ambiguous, so it is
    dropped. If an expression names an object, but also occurs with `no_target`, the latter is ignored. every: keep all
    expressions, also ambiguous and repeated ones. Evaluation needs this: published metrics count an expression as often
    as it occurs.
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
            # an object with an expression is a target, even a crowd
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
    """Return a record whose salient foreground is the union of the job's annotations.

    Raises Unusable if an annotation is malformed or has no mask.
    """
    masks = [shape(annotation, image, problems, job.key, None).mask for annotation in items_of(job, image)]
    if None in masks:
        raise Unusable("image has an annotation without a mask")
    union = np.any([decode_rle(mask, image.height, image.width) for mask in masks], axis=0)
    return foreground_record(job.key, image, union)


def items_of(job: Job, image: Image) -> Any:
    """Return the annotations of a job's image. Raises Unusable if its size differs from that in the JSON file."""
    said, real = (job.labels.height, job.labels.width), (image.height, image.width)
    if None not in said and said != real:
        turned = " (rotated by EXIF)" if said == real[::-1] else ""
        raise Unusable(f"image size differs from the JSON{turned}")
    return job.labels.items


def _class(category: Any, class_of: dict[int, int]) -> int:
    if category not in class_of:
        raise Unusable("unknown category")
    return class_of[category]


def _sentences(ref: Mapping[str, Any], problems: Problems, what: str) -> list[str]:
    """Return the expressions of a ref, which are in its field `sentences`.

    The field is a string, an object {"sent": ...} as in RefCOCO, or a list of these. Raises Unusable if it has no text,
    or if the ref is marked as uncertain.
    """
    if flag(ref, "uncertain"):
        raise Unusable("marked as uncertain")
    said = ref.get("sentences", [])
    texts = [s.get("sent") if isinstance(s, dict) else s for s in (said if isinstance(said, list) else [said])]
    for _ in (text for text in texts if not isinstance(text, str)):
        problems.add("expression: no text", what)
    texts = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise Unusable("the ref has no sentence")
    return texts


_FLAGS = dict.fromkeys(("0", "false", "none"), False) | dict.fromkeys(("1", "true"), True)


def flag(item: Mapping[str, Any], field: str) -> bool:
    """Return a field as a bool. A missing field is False.

    Valid values are 0, 1, false and true, also as strings, and null, which is False. Raises Unusable for other values.
    """
    value = str(item.get(field, 0)).lower()
    if value not in _FLAGS:
        raise Unusable(f"'{field}' is neither 0 nor 1")
    return _FLAGS[value]


# ---- Shapes --------------------------------------------------------------------------------------------------------


def shape(annotation: Mapping[str, Any], image: Image, problems: Problems, what: str, class_id: int | None) -> Segment:
    """Return the segment of an annotation, with a mask and a box, or with only a box.

    what: name of the annotation in `problems`. Raises Unusable if the annotation has neither mask nor box, or if one is
    malformed, empty or outside the image.
    """
    crowd = flag(annotation, "iscrowd")
    try:
        if annotation.get("segmentation"):
            segment = _masked(_rle(annotation["segmentation"], image), image, class_id=class_id, crowd=crowd)
            box = _corners(annotation["bbox"], image) if annotation.get("bbox") else segment.box
            given, tight = np.array(box), np.array(segment.box)
            if box_iou(given, tight) >= 0.9 or np.abs(given - tight).max() <= 2:
                return dataclasses.replace(segment, box=box)  # the given box has fractions of a pixel
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
            problems.add("note: box clipped to its image (JSON boxes are x, y, width, height)", what)
        return Segment(class_id, box=box, crowd=crowd)
    except Unusable:
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Unusable("malformed mask or box") from None


def _corners(xywh: Sequence[Any], image: Image) -> Box:
    """Convert a COCO box x, y, width, height in pixels to x0, y0, x1, y1, clipped to the image."""
    x, y, w, h = (float(v) for v in xywh)
    if not all(map(math.isfinite, (x, y, w, h))):
        raise ValueError("not finite")
    return max(x, 0.0), max(y, 0.0), min(x + w, float(image.width)), min(y + h, float(image.height))


def _masked(counts: bytes, image: Image, **fields: Any) -> Segment:
    x, y, w, h = rle_codec.toBbox({"size": [image.height, image.width], "counts": counts})
    return Segment(box=(float(x), float(y), float(x + w), float(y + h)), mask=counts, **fields)


def _rle(segmentation: Any, image: Image) -> bytes:
    """Convert polygons or a run-length code to a compressed run-length code.

    Raises Unusable if the mask is malformed or empty, or does not fit the image.
    """
    height, width = image.height, image.width
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise Unusable("mask size differs from its image")
        if isinstance(segmentation["counts"], list):
            segmentation = rle_codec.frPyObjects(segmentation, height, width)
        if sum(_runs(segmentation["counts"])) != height * width:
            raise Unusable("run-length code does not fit its image")
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
    """Return the lengths of the runs in a compressed run-length code.

    hotcoco cannot be used to check the code, because it also decodes truncated codes without an error.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        value |= (byte - 48 & 31) << shift
        shift += 5
        # Without the bit 0x20, the byte is the last one of a value, and its bit 0x10 is the sign. From the fourth run
        # on, a value is the difference to the run before the previous one.
        if not byte - 48 & 32:
            value -= (byte - 48 & 16) << shift - 4
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
