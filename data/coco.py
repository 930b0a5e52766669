"""Data sets that come as COCO json: panoptic, instances (with LVIS and boxes alone), referring expressions, foreground."""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coco_records import Labels, foreground_union, instances_record, panoptic_record, referring_record
from shards import Job, Plan, Problems, builder, coco_origin

from mqformer_jax.input.record import ClassInfo

# ---- Plans: the json, once ----------------------------------------------------------------------------------------


def panoptic(json_path: str, images: str, masks: str) -> Plan:
    """COCO panoptic: a json and a folder of PNGs whose pixels are segment ids. Pixels of id 0 are ignored."""
    data = load_json(json_path, "images", "annotations", "categories")
    _need_folder(images, masks)
    if not all("isthing" in c for c in data["categories"]):
        raise ValueError(f"{json_path}: field 'isthing' is missing from a category; is it a panoptic json?")
    classes, class_of = vocabulary(data["categories"], json_path)
    problems = Problems()
    annotations = {a.get("image_id"): a for a in data["annotations"]}
    jobs = []
    for entry in _entries(data["images"], problems):
        annotation = annotations.get(entry["id"])
        if annotation is None:
            problems.add("image: no annotation", _name(entry))
            continue
        png = os.path.join(masks, annotation.get("file_name") or os.path.splitext(_name(entry))[0] + ".png")
        jobs.append(_job(entry, images, (png, annotation.get("segments_info", []))))
    return Plan("panoptic", classes, jobs, builder(panoptic_record, class_of=class_of, classes=classes), True, problems)


def instances(json_path: str, images: str) -> Plan:
    """COCO instances: polygons, run-length codes, or boxes alone. A json with `neg_category_ids` is federated (LVIS)."""
    data = load_json(json_path, "images", "annotations", "categories")
    _need_folder(images)
    classes, class_of = vocabulary(data["categories"], json_path)
    problems = Problems()
    of_image = _by_image(data["annotations"])
    entries = _entries(data["images"], problems)
    for image_id in of_image.keys() - {entry["id"] for entry in entries}:
        problems.add("segment: its image is not in the json", f"image_id {image_id}")
    federated = any("neg_category_ids" in entry for entry in entries)
    jobs = [_job(entry, images, of_image.get(entry["id"], [])) for entry in entries]
    return Plan("instances", classes, jobs, builder(instances_record, class_of=class_of, federated=federated), not federated, problems)


def referring(json_path: str, images: str, instance_files: Sequence[str] = (), refs_split: str | None = None) -> Plan:
    """Expressions: `refs` of {image_id, sentences, and bbox, segmentation or ann_id, or no_target}; `refs_split` keeps one split.

    An `ann_id` without a segmentation takes its shape from `instance_files`, which also list the images if the json does not.
    """
    data = load_json(json_path, "refs")
    _need_folder(images)
    shapes, entries, categories = _instance_index(instance_files)
    classes, class_of = vocabulary(data.get("categories", categories), json_path)
    problems = Problems()
    of_image = collections.defaultdict(list)
    for ref in data["refs"]:
        if refs_split is None or ref.get("split") == refs_split:
            known = {k: v for k, v in ref.items() if v is not None}
            of_image[ref.get("image_id")].append({**shapes.get(ref.get("ann_id"), {}), **known})
    listed = {e["id"]: e for e in _entries(data.get("images", list(entries.values())), problems)}
    for image_id in of_image.keys() - listed.keys():
        problems.add("expression: its image is not in the json", f"image_id {image_id}")
    jobs = [_job(entry, images, of_image[i]) for i, entry in listed.items() if i in of_image]
    return Plan("referring", classes, jobs, builder(referring_record, class_of=class_of), False, problems)


def foreground(json_path: str, images: str, instance_files: Sequence[str]) -> Plan:
    """Foregrounds that are unions of annotations: `items` of {image_id, ann_ids}, shapes from `instance_files`."""
    data = load_json(json_path, "items")
    _need_folder(images)
    shapes, entries, _ = _instance_index(instance_files)
    jobs, problems = [], Problems()
    for item in data["items"]:
        image_id, wanted = item.get("image_id"), item.get("ann_ids", [])
        if image_id not in entries or not wanted or not all(i in shapes for i in wanted):
            problems.add("image: its annotations are not in --instances", f"image_id {image_id}")
            continue
        jobs.append(_job(entries[image_id], images, [shapes[i] for i in wanted]))
    return Plan("foreground", (), jobs, builder(foreground_union), False, problems)


def image_ids(json_path: str) -> set[int]:
    """Ids of all images that an annotation file lists."""
    return {entry.get("id") for entry in load_json(json_path, "images")["images"]}


def load_json(path: str, *fields: str) -> dict[str, Any]:
    """A json object (or RefCOCO's pickled refs) that holds these lists. Raises FileNotFoundError or ValueError, one line, if it does not."""
    try:
        with open(path, "rb") as f:
            data = {"refs": _PlainUnpickler(f, encoding="latin1").load()} if path.endswith(".p") else json.load(f)
    except OSError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path}: not {'a pickle of plain values' if path.endswith('.p') else 'JSON'}: {e}") from None
    for field in fields:
        if not isinstance(data, dict) or not isinstance(data.get(field), list):
            raise ValueError(f"{path}: field '{field}' is missing or no list; is it the right annotation file?")
    return data


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers, as RefCOCO's `refs(*).p` hold; nothing that could run code."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which expressions do not need")


def vocabulary(categories: Iterable[Mapping[str, Any]], path: str) -> tuple[tuple[ClassInfo, ...], dict[int, int]]:
    """Classes sorted by category id, and the map from category id to class index.

    Texts are the name and `synonyms`; a text that is another class's name is left out. Stuff names lose "-merged", "-other",
    "-stuff" ("sky-other-merged" is "sky") unless two classes would become one.
    """
    if any(not isinstance(c.get("id"), int) or not str(c.get("name", "")).strip() for c in categories):
        raise ValueError(f"{path}: a category without 'id' or 'name'")
    categories = sorted(categories, key=lambda c: c["id"])
    names = [_display(c) for c in categories]
    counts = collections.Counter(names)
    names = [n if counts[n] == 1 else _spaced(c["name"].replace("-", " ")) for c, n in zip(categories, names)]
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(f"{path}: category name {name!r} occurs {count} times; names must differ")
    classes = []
    taken = set(names)
    for category, name in zip(categories, names):
        others = [s for s in dict.fromkeys(map(_spaced, category.get("synonyms", []))) if s not in taken]
        taken.update(others)
        classes.append(ClassInfo((name, *others), bool(category.get("isthing", 1))))
    return tuple(classes), {c["id"]: i for i, c in enumerate(categories)}


def _display(category: Mapping[str, Any]) -> str:
    name = category["name"]
    return _spaced(name if category.get("isthing", 1) else re.sub("(-merged|-other|-stuff)+$", "", name).replace("-", " "))


def _spaced(name: str) -> str:
    return " ".join(str(name).replace("_", " ").split())


def _need_folder(*folders: str) -> None:
    for folder in folders:
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such folder")


def _entries(entries: list[dict], problems: Problems) -> list[dict]:
    """The images that can be told apart; an id that comes twice counts once."""
    known: dict[Any, dict] = {}
    for entry in entries:
        if "id" not in entry or not _name(entry):
            problems.add("image: no 'id' or 'file_name' in the json", str(entry.get("id", _name(entry))))
        elif entry["id"] in known:
            problems.add("image: listed twice in the json", _name(entry))
        else:
            known[entry["id"]] = entry
    return list(known.values())


def _name(entry: Mapping[str, Any]) -> str:
    """File name of an image; LVIS gives a URL only, whose last two parts are COCO's folder and file."""
    return entry.get("file_name") or "/".join(entry.get("coco_url", "").split("/")[-2:])


def _job(entry: dict, folder: str, items: Any) -> Job:
    name = _name(entry)
    path = os.path.join(folder, name)
    flat = os.path.join(folder, os.path.basename(name))
    federated = (tuple(entry.get(k, ())) for k in ("neg_category_ids", "not_exhaustive_category_ids"))
    labels = Labels(items, entry.get("height"), entry.get("width"), *federated)
    return Job(name, entry["id"], path if os.path.exists(path) else flat, labels, coco_origin(name))


def _by_image(annotations: list[dict]) -> dict[Any, list[dict]]:
    of_image = collections.defaultdict(list)
    for annotation in annotations:
        of_image[annotation.get("image_id")].append(annotation)
    return of_image


def _instance_index(paths: Sequence[str]) -> tuple[dict[int, dict], dict[int, dict], list[dict]]:
    """Annotations and images of instance files, by id, and the categories of the first."""
    files = [load_json(path, "images", "annotations", "categories") for path in paths]
    shapes = {a.get("id"): a for data in files for a in data["annotations"]}
    entries = {e.get("id"): e for data in files for e in data["images"]}
    return shapes, entries, files[0]["categories"] if files else []
