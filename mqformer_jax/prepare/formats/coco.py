"""Plans for COCO's JSON formats: panoptic, instances (also LVIS and boxes only), expressions, foregrounds."""

from __future__ import annotations

import collections
import functools
import json
import os
import pickle
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mqformer_jax.prepare.formats.coco_categories import vocabulary, without_root
from mqformer_jax.prepare.formats.coco_records import (
    Labels,
    foreground_union,
    instances_record,
    panoptic_record,
    referring_record,
)
from mqformer_jax.prepare.plan import Job, Plan, Problems, builder, coco_origin

# Fields that no record needs are dropped while a JSON file is read. This reduces peak memory from 3.9 to 3.3 times the
# size of the file (measured with 0.2 GB of boxes; Objects365 has 5 GB). Jobs refer to the annotations and do not copy
# them.
_UNUSED = frozenset(
    ("area", "isfake", "isreflected", "license", "date_captured", "url", "flickr_url", "flickr_id", "image_url")
)
_UNUSED |= {"keypoints", "num_keypoints", "synset", "synsets", "def", "merged_object_ids", "attributes"}

# ---- Plans, made from JSON files -----------------------------------------------------------------------------------


def panoptic(json_path: str, images: str, masks: str) -> Plan:
    """Return the `Plan` of a COCO panoptic JSON file.

    images: folder of the images. masks: folder of PNGs with segment ids; pixels of id 0 are ignored.
    """
    data = load_json(json_path, "images", "annotations", "categories")
    need_folders(images, masks)
    if not all("isthing" in c for c in data["categories"]):
        raise ValueError(f"{json_path}: field 'isthing' is missing from a category; give a panoptic JSON file")
    classes, class_of = vocabulary(data["categories"], json_path)
    problems = Problems()
    entries = _entries(data["images"], problems)
    of_image = _by_image(data["annotations"], entries, json_path, problems)
    segments = [s for a in data["annotations"] for s in a.get("segments_info") or () if isinstance(s, dict)]
    _need_known(json_path, "category_id", segments, class_of)
    jobs = []
    for entry in entries:
        annotation, *more = of_image.get(entry["id"], [None])
        if annotation is None:
            problems.add("image: no annotation", _name(entry))
            continue
        if more:
            problems.add("note: image annotated twice in the JSON; the first annotation is used", _name(entry))
        png = os.path.join(masks, annotation.get("file_name") or os.path.splitext(_name(entry))[0] + ".png")
        jobs.append(_job(entry, images, (png, annotation.get("segments_info") or ())))
    _one_file_each(jobs, json_path, problems)
    return Plan("panoptic", classes, jobs, builder(panoptic_record, class_of=class_of, classes=classes), True, problems)


def instances(json_path: str, images: str) -> Plan:
    """Return the `Plan` of a COCO instances JSON file: polygons, run-length codes, or boxes only.

    If images have `neg_category_ids` (LVIS), the data set is federated. Boxes with `iscrowd` (Objects365) are crowds;
    fake and mirrored objects (`isfake`, `isreflected`) count as objects. Roboflow's exports (SeginW) have a category
    that is removed: see `without_root`.
    """
    data = load_json(json_path, "images", "annotations", "categories")
    need_folders(images)
    problems = Problems()
    classes, class_of = vocabulary(without_root(data["categories"], data["annotations"], problems), json_path)
    entries = _entries(data["images"], problems)
    of_image = _by_image(data["annotations"], entries, json_path, problems)
    _need_known(json_path, "category_id", data["annotations"], class_of)
    federated = any("neg_category_ids" in entry for entry in entries)
    for entry in entries:
        if of_image and entry["id"] not in of_image and not federated:  # maybe it was never annotated
            problems.add("note: image without annotations; all classes count as absent", _name(entry))
    jobs = [_job(entry, images, of_image.get(entry["id"], [])) for entry in entries]
    _one_file_each(jobs, json_path, problems)
    return Plan(
        "instances",
        classes,
        jobs,
        builder(instances_record, class_of=class_of, federated=federated),
        not federated,
        problems,
    )


def referring(json_path: str, images: str, instance_files: Sequence[str] = (), refs_split: str | None = None) -> Plan:
    """Return the `Plan` of a JSON file of expressions, or of RefCOCO's pickled refs.

    Each item of the field `refs` has image_id, sentences, and at least one of bbox, segmentation, ann_id and no_target.
    Fields that a ref with an `ann_id` lacks are taken from the annotation with this id in `instance_files`. If the JSON
    file does not list the images, `instance_files` must. refs_split: keep only the refs of this split; None keeps all.
    A split other than train is for evaluation, so all its expressions are kept: see `every` of `referring_record`.
    """
    data = load_json(json_path, "refs")
    need_folders(images)
    shapes, entries, categories = _instance_index(instance_files)
    classes, class_of = vocabulary(data.get("categories", categories), json_path)
    every = refs_split not in (None, "train")
    problems = Problems()
    of_image = collections.defaultdict(list)
    for number, ref in enumerate(_of_split(data["refs"], refs_split, json_path)):
        known, image_id = {k: v for k, v in ref.items() if v is not None}, ref.get("image_id")
        annotation = shapes.get(ref.get("ann_id"), {})
        if annotation and annotation.get("image_id") != image_id:
            problems.add(
                "expression: its annotation belongs to another image",
                f"image_id {image_id} ref {ref.get('ref_id', number)}",
            )
            continue
        of_image[image_id].append({**annotation, **known})
    listed = {e["id"]: e for e in _entries(data.get("images", list(entries.values())), problems)}
    if not listed:
        raise ValueError(
            f"{json_path}: the file lists no images; give --instances with a file that does (RefCOCO's instances.json)"
        )
    for image_id in of_image.keys() - listed.keys():
        problems.add("expression: its image is not in the JSON", f"image_id {image_id}")
    jobs = [_job(entry, images, of_image[i]) for i, entry in listed.items() if i in of_image]
    _one_file_each(jobs, json_path, problems)
    return Plan("referring", classes, jobs, builder(referring_record, class_of=class_of, every=every), False, problems)


def foreground(json_path: str, images: str, instance_files: Sequence[str]) -> Plan:
    """Return the `Plan` of a JSON file of salient foregrounds.

    Each item of the field `items` is {image_id, ann_ids}: the foreground of this image is the union of these
    annotations, which are in `instance_files`.
    """
    data = load_json(json_path, "items")
    need_folders(images)
    shapes, entries, _ = _instance_index(instance_files)
    jobs, problems = [], Problems()
    entries = {e["id"]: e for e in _entries(list(entries.values()), problems)}
    for item in data["items"]:
        image_id, wanted = item.get("image_id"), item.get("ann_ids") or ()
        if image_id not in entries or not wanted or not all(i in shapes for i in wanted):
            problems.add("image: its annotations are not in --instances", f"image_id {image_id}")
            continue
        if any(shapes[i].get("image_id") != image_id for i in wanted):
            problems.add("image: its annotations belong to another image", f"image_id {image_id}")
            continue
        jobs.append(_job(entries[image_id], images, [shapes[i] for i in wanted]))
    _one_file_each(jobs, json_path, problems)
    return Plan("foreground", (), jobs, builder(foreground_union), False, problems)


_ID, _TEXT, _LIST = (int, float, str), str, list
_KINDS = {int: "a number", float: "a number", str: "a string", list: "a list"}
_TYPES: dict[str, dict[str, Any]] = {
    "images": {
        "id": _ID,
        "file_name": _TEXT,
        "coco_url": _TEXT,
        "neg_category_ids": _LIST,
        "not_exhaustive_category_ids": _LIST,
    },
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "file_name": _TEXT, "segments_info": _LIST},
    "categories": {"synonyms": (list, str)},
    "refs": {"image_id": _ID, "ann_id": _ID, "category_id": _ID},
    "items": {"image_id": _ID, "ann_ids": _LIST},
}


def image_ids(json_path: str) -> set[int]:
    """Return the ids of all images that an annotation file lists."""
    return {entry.get("id") for entry in load_json(json_path, "images")["images"]}


def load_json(path: str, *fields: str) -> dict[str, Any]:
    """Return the JSON object in a file, or {"refs": RefCOCO's pickled refs}. Its `fields` are lists of objects.

    Raises FileNotFoundError if the file cannot be opened, ValueError if a field is missing or malformed.
    """
    data = {"refs": read_json(path)} if path.endswith(".p") else read_json(path)
    more = [field for field in ("images", "categories") if isinstance(data, dict) and field in data]
    for field in dict.fromkeys((*fields, *more)):
        items = data.get(field) if isinstance(data, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(
                f"{path}: field '{field}' is missing or not a list of objects; give an annotation file that has it"
            )
        for name, types in _TYPES[field].items():
            wrong = [
                value for value in (item.get(name) for item in items) if not (value is None or isinstance(value, types))
            ][:1]
            if wrong:
                kinds = types if isinstance(types, tuple) else (types,)
                expected = " or ".join(dict.fromkeys(_KINDS[kind] for kind in kinds))
                raise ValueError(f"{path}: field '{name}' in '{field}' cannot be {wrong[0]!r}; expected {expected}")
    return data


def read_json(path: str) -> Any:
    """Return the contents of a JSON file or of a pickle (.p) of lists, dicts, strings and numbers.

    Raises FileNotFoundError if the file cannot be opened, ValueError if it has another format or is damaged.
    """
    pickled = path.endswith(".p")
    try:
        if pickled:
            with open(path, "rb") as f:
                return _PlainUnpickler(f, encoding="latin1").load()
        with open(path, encoding="utf-8-sig") as f:  # in binary mode, json.load would also keep the bytes
            return json.load(f, object_pairs_hook=_needed)
    except OSError:
        raise FileNotFoundError(f"{path}: no such file; check the path") from None
    except (ValueError, EOFError, pickle.UnpicklingError, IndexError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{path}: not {'a pickle of plain values' if pickled else 'JSON'}: {e}") from None


def _needed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {field: value for field, value in pairs if field not in _UNUSED}


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle only lists, dicts, strings and numbers, as in RefCOCO's `refs(*).p`.

    Other objects raise UnpicklingError, because they could run code.
    """

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(
            f"it contains {module}.{name}, which is not read because it could run code; "
            "use only lists, dicts, strings and numbers"
        )


def _of_split(refs: list[dict], split: str | None, path: str) -> list[dict]:
    """Return the refs of one split, or all refs if `split` is None.

    Raises ValueError if no ref has this split, or if `split` is None and the file contains both train and other splits.
    """
    splits = sorted({str(ref["split"]) for ref in refs if ref.get("split") is not None})
    if split is None and "train" in splits and len(splits) > 1:
        raise ValueError(f"{path}: contains the splits {', '.join(splits)}; choose one with --refs_split")
    if split is not None and split not in splits:
        raise ValueError(
            f"{path}: no ref has the split {split!r}; the file has the splits {', '.join(splits) or '(none)'}"
        )
    return refs if split is None else [ref for ref in refs if ref.get("split") == split]


def need_folders(*folders: str) -> None:
    for folder in folders:
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such folder; check the path")


def _entries(entries: list[dict], problems: Problems) -> list[dict]:
    """Return the images that have an id and a file name, each id once. Count all other entries as problems."""
    known: dict[Any, dict] = {}
    for entry in entries:
        if "id" not in entry or not _name(entry):
            problems.add("image: no 'id' or 'file_name' in the JSON", str(entry.get("id", _name(entry))))
        elif entry["id"] in known:
            problems.add("image: listed twice in the JSON", _name(entry))
        else:
            known[entry["id"]] = entry
    return list(known.values())


def _name(entry: Mapping[str, Any]) -> str:
    """Return the file name of an image.

    LVIS gives only a URL. Its last two parts are the file name with COCO's folder, e.g. "train2017/000000391895.jpg".
    """
    return entry.get("file_name") or "/".join((entry.get("coco_url") or "").split("/")[-2:])


def _job(entry: dict, folder: str, items: Any) -> Job:
    name = _name(entry)
    parent, file = os.path.split(name)
    federated = (tuple(entry.get(k) or ()) for k in ("neg_category_ids", "not_exhaustive_category_ids"))
    labels = Labels(items, entry.get("height"), entry.get("width"), *federated)
    return Job(name, entry["id"], os.path.join(_below(folder, parent), file), labels, coco_origin(name))


@functools.lru_cache(maxsize=1 << 16)
def _below(folder: str, parent: str) -> str:
    """Return the folder that contains an image: `folder` or one of its subfolders.

    parent: the image's folder in the JSON file. Its first parts may be missing on disk. For example, Objects365's JSON
    file has images/v1/patch8, but the archives unpack to patch8. For LVIS, `parent` is train2017, which may be `folder`
    itself. The results are cached, so that each folder is looked up on disk only once.
    """
    parts = parent.split("/")
    ends = (os.path.join(folder, *parts[i:]) for i in range(len(parts)))
    return next(filter(os.path.isdir, ends), folder)


def _by_image(annotations: list[dict], entries: list[dict], path: str, problems: Problems) -> dict[Any, list[dict]]:
    """Return {image id: annotations}. Count annotated images that are not among the `entries` as problems.

    Raises ValueError if none of the annotations belongs to one of the `entries`.
    """
    listed = {entry["id"] for entry in entries}
    _need_known(path, "image_id", annotations, listed)
    of_image = collections.defaultdict(list)
    for annotation in annotations:
        of_image[annotation.get("image_id")].append(annotation)
    for image_id in of_image.keys() - listed:
        problems.add("segment: its image is not in the JSON", f"image_id {image_id}")
    return of_image


def _need_known(path: str, field: str, annotations: list[dict], known: Collection[Any]) -> None:
    """Raise ValueError if there are annotations, but none of them has a known id.

    field: the field that holds the id, `image_id` or `category_id`. known: the known ids. A typical cause is ids of
    different types ("0" and 0). Without this check, all classes would count as absent in every image.
    """
    if annotations and not any(annotation.get(field) in known for annotation in annotations):
        there = f"but known ids are, e.g., {', '.join(map(repr, list(known)[:3]))}" if known else "but no id is known"
        raise ValueError(
            f"{path}: no annotation has a known '{field}'; the first has {annotations[0].get(field)!r}, {there}; "
            "use the same ids, of the same type (e.g. integers), wherever they occur"
        )


def _one_file_each(jobs: list[Job], path: str, problems: Problems) -> None:
    """Raise ValueError if two entries with different file names would be read from the same file on disk.

    File names that occur several times in the JSON file are added to `problems`. path: the JSON file, for the message.
    """
    keys: dict[str, str] = {}
    for job in jobs:
        other = keys.setdefault(job.image, job.key)
        if other != job.key:
            raise ValueError(
                f"{path}: the images {other} and {job.key} would both be read from {job.image}; "
                "give an image folder that contains both of these paths"
            )
    for key, count in collections.Counter(job.key for job in jobs).items():
        if count > 1:
            problems.add("note: several images in the JSON have this file", key)


def _instance_index(paths: Sequence[str]) -> tuple[dict[int, dict], dict[int, dict], list[dict]]:
    """Return the annotations and images of instance files by id, and the categories of the first file.

    Raises ValueError if two annotations have the same id.
    """
    files = [load_json(path, "images", "annotations", "categories") for path in paths]
    shapes: dict[Any, dict] = {}
    for path, data in zip(paths, files):
        for annotation in data["annotations"]:
            if annotation.get("id") is not None and shapes.setdefault(annotation["id"], annotation) != annotation:
                raise ValueError(
                    f"{path}: annotation id {annotation['id']} occurs twice in --instances, for different annotations; "
                    "give files whose ids are unique"
                )
    entries = {e.get("id"): e for data in files for e in data["images"]}
    return shapes, entries, files[0]["categories"] if files else []
