"""Visual Genome: objects are boxes with a class, region descriptions are boxes with a phrase. Neither is exhaustive."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mqformer_jax.input.record import ClassInfo, Record, Segment, box_iou
from mqformer_jax.prepare.formats.coco import need_folders, read_json
from mqformer_jax.prepare.formats.coco_records import Box, Labels, items_of, shape
from mqformer_jax.prepare.formats.images import Image, Unusable
from mqformer_jax.prepare.plan import Job, Plan, Problems, builder

# Boxes with the same class or phrase and at least this IoU count as one object that two annotators labeled. Merging two
# real objects is harmless, since no class counts as exhaustively labeled.
SAME = 0.7


class Scene(NamedTuple):
    """The annotations of one image: boxes (x, y, width, height) with a class index, and boxes with a phrase."""

    objects: list[tuple[int, list[Any]]]
    phrases: list[tuple[str, list[Any]]]


# ---- Plan ---------------------------------------------------------------------------------------------------------


def visual_genome(
    images: Sequence[str],
    image_data: str,
    objects: str | None,
    regions: str | None,
    alias: str | None = None,
    min_images: int = 50,
) -> Plan:
    """Return the `Plan` of `objects` (objects.json: classes) and `regions` (region_descriptions.json: expressions).

    images: the folders VG_100K and VG_100K_2. The names of objects are the classes; `alias` (object_alias.txt) merges
    names with the same meaning. A class that fewer than `min_images` images show is dropped, with its objects. The `id`
    of a job is the image's id in COCO or, if it is not in COCO, "vg/<image_id>".
    """
    if not objects and not regions:
        raise ValueError("Visual Genome: give --objects, --regions, or both")
    need_folders(*images)
    entries = {_image_id(entry): entry for entry in _load(image_data)}
    problems = Problems()
    named = dict(_listed(objects, "objects", entries, problems))
    told = dict(_listed(regions, "regions", entries, problems))
    classes, class_of = _vocabulary(named, _aliases(alias), min_images)
    folder_of = {name: folder for folder in images for name in os.listdir(folder)}
    jobs = []
    for image_id, entry in entries.items():
        name, coco_id = f"{image_id}.jpg", entry.get("coco_id")
        found = list(_classed(named.get(image_id, ()), class_of, name, min_images, problems))
        scene = Scene(found, [(_clean(region.get("phrase")), _box(region)) for region in told.get(image_id, ())])
        labels = Labels(scene, entry.get("height"), entry.get("width"), (), ())
        path = os.path.join(folder_of.get(name, images[0]), name)
        jobs.append(Job(name, coco_id or f"vg/{image_id}", path, labels, f"coco/{coco_id}" if coco_id else ""))
    return Plan(
        "visual_genome", classes, jobs, builder(scene_record), exhaustive=False, problems=problems, unique_texts=False
    )


def _load(path: str) -> list[dict[str, Any]]:
    data = read_json(path)
    if (
        not isinstance(data, list)
        or not all(isinstance(entry, dict) for entry in data)
        or any(_image_id(e) is None for e in data)
    ):
        raise ValueError(f"{path}: not a list of objects with 'image_id'; give Visual Genome's own file")
    return data


def _listed(
    path: str | None, field: str, entries: dict[Any, dict], problems: Problems
) -> Iterator[tuple[Any, list[dict]]]:
    """Yield (image id, objects or regions) of each image in objects.json or region_descriptions.json.

    Images that image_data.json lacks, and repeated images, are left out and counted as problems. path: the file, or
    None. field: "objects" or "regions". entries: {image id: entry} of image_data.json. Raises ValueError if the file is
    malformed.
    """
    seen = set()
    for entry in _load(path) if path else ():
        if not isinstance(entry.get(field), list) or not all(isinstance(item, dict) for item in entry[field]):
            raise ValueError(f"{path}: field '{field}' is not a list of objects; give Visual Genome's own file")
        if _image_id(entry) in seen:
            problems.add(
                f"note: image listed twice in {field}; the first entry is used", f"image_id {_image_id(entry)}"
            )
        elif _image_id(entry) in entries:
            seen.add(_image_id(entry))
            yield _image_id(entry), entry[field]
        else:
            problems.add(f"image: in {field}, not in image_data.json", f"image_id {_image_id(entry)}")


def _image_id(entry: dict) -> Any:
    return entry.get("image_id", entry.get("id"))  # versions before 1.2 have `id`


def _box(item: dict) -> list[Any]:
    """Return x, y, width, height of an object (keys w and h) or of a region (keys width and height)."""
    return [item.get("x"), item.get("y"), item.get("w", item.get("width")), item.get("h", item.get("height"))]


def _clean(text: Any) -> str:
    return " ".join(str(text or "").lower().split()).strip(" .,")


# ---- Vocabulary ---------------------------------------------------------------------------------------------------


def _aliases(path: str | None) -> dict[str, str]:
    """Return {spelling: first spelling on the same line} of object_alias.txt.

    For example, the line "tv,television" gives {"tv": "tv", "television": "tv"}.
    """
    first: dict[str, str] = {}
    try:
        with open(path or os.devnull, encoding="utf-8") as f:
            for line in f:
                spellings = [s for s in map(_clean, line.split(",")) if s]
                for spelling in spellings:
                    first.setdefault(spelling, spellings[0])
    except OSError:
        raise FileNotFoundError(f"{path}: no such file; check the path") from None
    return first


def _vocabulary(
    named: dict[Any, list[dict]], alias: dict[str, str], min_images: int
) -> tuple[tuple[ClassInfo, ...], dict[str, int]]:
    """Return the classes sorted by name, and {spelling: class index}.

    named: {image id: objects}. alias: see `_aliases`. The first text of a class is its most frequent spelling. The
    other texts are the spellings that occur in at least `min_images` images, in order of frequency.
    """
    images_of: collections.Counter[str] = collections.Counter()
    spelled: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for objects in named.values():
        spellings = {spelling for item in objects for spelling in _names(item)}
        images_of.update({alias.get(spelling, spelling) for spelling in spellings})
        for spelling in spellings:
            spelled[alias.get(spelling, spelling)][spelling] += 1
    texts = []
    for name in (name for name, count in images_of.items() if count >= min_images):
        first, *others = sorted(spelled[name], key=lambda s: (-spelled[name][s], s))
        texts.append((first, *(s for s in others if spelled[name][s] >= min_images)))
    texts.sort()
    class_of_first = {t[0]: i for i, t in enumerate(texts)}
    class_of = {s: class_of_first[t[0]] for t in texts for s in spelled[alias.get(t[0], t[0])]}
    return tuple(ClassInfo(t) for t in texts), class_of


def _names(item: dict) -> list[str]:
    names = item.get("names")
    return [name for name in map(_clean, names if isinstance(names, list) else [names]) if name]


def _classed(
    objects: Sequence[dict], class_of: dict[str, int], key: str, min_images: int, problems: Problems
) -> Iterator[tuple[int, list]]:
    """Yield (class index, box) of each object that has a class.

    If an object has several names, the first one that belongs to a class determines the class.
    """
    for item in objects:
        names = _names(item)
        known = [class_of[name] for name in names if name in class_of]
        if known:
            yield known[0], _box(item)
        else:
            reason = (
                f"segment: object name in fewer than {min_images} images" if names else "segment: object without a name"
            )
            problems.add(reason, f"{key} {', '.join(names)!r}")


# ---- Records, in a worker process ----------------------------------------------------------------------------------


def scene_record(job: Job, image: Image, problems: Problems) -> Record:
    """Return a record of boxes with classes, then boxes with phrases. All its classes count as labeled in part."""
    scene = items_of(job, image)
    segments = (*_objects(scene, job, image, problems), *_regions(scene, job, image, problems))
    if not segments:
        raise Unusable("image has nothing labeled")
    partial = tuple(sorted({s.class_id for s in segments if s.class_id is not None}))
    return Record(job.key, image.data, image.height, image.width, segments, partial_classes=partial)


def _objects(scene: Scene, job: Job, image: Image, problems: Problems) -> Iterator[Segment]:
    kept: dict[int, list[Box]] = collections.defaultdict(list)
    for class_id, xywh in scene.objects:
        try:
            segment = shape({"bbox": xywh}, image, problems, job.key, class_id)
        except Unusable as e:
            problems.add(f"segment: {e}", job.key)
            continue
        if _new(segment.box, kept[class_id]):
            yield segment
        else:
            problems.add("segment: object annotated twice", job.key)


def _regions(scene: Scene, job: Job, image: Image, problems: Problems) -> Iterator[Segment]:
    """Return a segment for each box with phrases. A phrase of two boxes is ambiguous, so it is dropped."""
    boxes_of: dict[str, list[Box]] = collections.defaultdict(list)
    for phrase, xywh in scene.phrases:
        try:
            if not phrase:
                raise Unusable("no sentence")
            if not _new(shape({"bbox": xywh}, image, problems, job.key, None).box, boxes_of[phrase]):
                problems.add("expression: annotated twice for one box", f"{job.key} {phrase!r}")
        except Unusable as e:
            problems.add(f"expression: {e}", f"{job.key} {phrase!r}")
    phrases_of: dict[Box, list[str]] = collections.defaultdict(list)
    for phrase, boxes in boxes_of.items():
        if len(boxes) == 1:
            phrases_of[boxes[0]].append(phrase)
        else:
            problems.add("expression: names two objects", f"{job.key} {phrase!r}")
    return (Segment(texts=tuple(phrases), box=box) for box, phrases in phrases_of.items())


def _new(box: Box, boxes: list[Box]) -> bool:
    """Return whether a box is new, i.e. has an IoU below SAME with each of `boxes`. If so, add it to `boxes`."""
    if boxes and (box_iou(np.array(box), np.array(boxes)) >= SAME).any():
        return False
    boxes.append(box)
    return True
