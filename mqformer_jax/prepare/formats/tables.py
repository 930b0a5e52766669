"""The plan for your own data in a CSV or JSONL table.

Each row labels one object in an image, or names something that the image does not show.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
import math
import os
import posixpath
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from mqformer_jax.input.record import ClassInfo, Record, Segment, box_of, encode_rle
from mqformer_jax.prepare.formats.class_lists import read_classes
from mqformer_jax.prepare.formats.folders import read_mask
from mqformer_jax.prepare.formats.images import Image, Unusable
from mqformer_jax.prepare.plan import Job, Plan, Problems, builder, coco_origin

COLUMNS = ("image", "mask", "bbox", "class", "expression", "no_target")
_YES, _NO = {"1", "true", "yes"}, {"", "0", "false", "no"}


class Row(NamedTuple):
    """A row of a table.

    where: "file:line", for messages. mask: path, or "". bbox: x, y, width, height in pixels, or (). name: class, or "".
    texts: expressions. absent: whether `no_target` is set. wrong: the reason why the row cannot be used, or "".
    """

    where: str
    image: str
    mask: str
    bbox: tuple[float, ...]
    name: str
    texts: tuple[str, ...]
    absent: bool
    wrong: str


def table(
    path: str,
    images: str,
    masks: str | None = None,
    classes: str | None = None,
    stuff: Sequence[str] = (),
    exhaustive: bool = False,
) -> Plan:
    """Return the `Plan` to prepare a data set whose annotations are the rows of a table file, such as CSV.

    All rows of an image become one record. Rows of an image with the same mask and bbox become one segment. masks:
    folder of the masks (default: the folder of the table). classes: path of a class list (default: all classes in the
    table). stuff: classes that own one region of an image; all other classes have instances. exhaustive: whether an
    image shows only the classes of its rows. If so, a row with only an image states that the image shows no class.
    Raises FileNotFoundError if the table or a folder is missing, ValueError if the table is malformed.
    """
    masks = masks or os.path.dirname(path) or "."
    for folder in (images, masks):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: no such folder; check the path")
    rows = [_row(where, fields, masks) for where, fields in _read(path)]
    names = read_classes(classes)[0] if classes else [(name,) for name in sorted({row.name for row in rows} - {""})]
    unknown = sorted({*stuff} - {name[0] for name in names})
    if unknown:
        raise ValueError(
            f"--stuff {unknown[0]!r} is not a class; classes are {', '.join(name[0] for name in names) or 'none'}"
        )
    class_of = {word: i for i, name in enumerate(names) for word in name[1:]} | {
        name[0]: i for i, name in enumerate(names)
    }
    problems = Problems()
    of_image = collections.defaultdict(list)
    for row in rows:
        if not row.image:
            problems.add("row: no image", row.where)
        elif (
            row.name and row.name not in class_of and exhaustive
        ):  # an error: if the row were dropped, the class would count as absent
            raise ValueError(f"{row.where}: class {row.name!r} is not in {classes}; add it there, or correct the row")
        elif row.name and row.name not in class_of:
            problems.add(f"row: class {row.name!r} is not in --classes", row.where)
        else:
            of_image[row.image].append(row)
    jobs = [
        Job(name, name, os.path.join(images, name), tuple(said), coco_origin(name)) for name, said in of_image.items()
    ]
    infos = tuple(ClassInfo(name, is_region=name[0] in stuff) for name in names)
    return Plan("table", infos, jobs, builder(_record, class_of=class_of, exhaustive=exhaustive), exhaustive, problems)


# ---- Rows ----------------------------------------------------------------------------------------------------------


def _read(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", fields) of every row. The field `expression` is a list.

    Raises FileNotFoundError if the table cannot be opened, ValueError if it is malformed or neither CSV nor JSONL.
    """
    kinds = {".csv": _read_csv, ".jsonl": _read_jsonl}
    kind = os.path.splitext(path)[1].lower()
    if kind not in kinds:
        raise ValueError(
            f"{path}: unknown extension; give a .csv file with a header, or a .jsonl file with one JSON object per line"
        )
    try:
        yield from kinds[kind](path)
    except OSError:
        raise FileNotFoundError(f"{path}: no such file; check the path") from None


def _read_csv(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, skipinitialspace=True)
        try:
            _check_columns(f"{path}:1", reader.fieldnames or ())
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                if None in fields:
                    raise ValueError(
                        f"{where}: more fields than the header has; write fields that contain commas in double quotes"
                    )
                yield where, fields | {"expression": (fields.get("expression") or "").split(";")}
        except UnicodeDecodeError as e:  # text is decoded in blocks, so the line is not known
            raise ValueError(f"{path}: not UTF-8 text ({e}); save it as CSV in UTF-8") from None
        except csv.Error as e:
            raise ValueError(f"{path}:{reader.line_num + 1}: not CSV: {e}") from None


def _read_jsonl(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            try:
                fields = json.loads(line) if line.strip() else None
            except ValueError as e:
                raise ValueError(f"{where}: not JSON: {e}") from None
            if isinstance(fields, dict):
                _check_columns(where, fields)
                said = fields.get("expression")
                yield where, fields | {"expression": said if isinstance(said, list) else [said]}
            elif line.strip():
                raise ValueError(
                    f'{where}: not a JSON object; write lines like {{"image": "a.jpg", "bbox": [x, y, width, height]}}'
                )


def _check_columns(where: str, names: Collection[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            raise ValueError(f"{where}: unknown column {name!r}; remove it, or use one of {', '.join(COLUMNS)}")
    if "image" not in names:
        raise ValueError(f"{where}: column 'image' is missing; add it (possible columns are {', '.join(COLUMNS)})")


def _row(where: str, fields: dict[str, Any], masks: str) -> Row:
    image, mask = (_within(where, column, str(fields.get(column) or "").strip()) for column in ("image", "mask"))
    bbox, no_target = _bbox(fields.get("bbox")), _words(fields.get("no_target")).lower()
    name = _words(fields.get("class")).replace("_", " ").strip()
    texts = tuple(dict.fromkeys(text for text in map(_words, fields["expression"]) if text))
    absent, shaped = no_target in _YES, bool(mask or bbox)
    wrong = ""
    if bbox is None:
        wrong = "bbox is not x, y, width, height"
    elif no_target not in _YES | _NO:
        wrong = "no_target is neither true nor false"
    elif absent and shaped:
        wrong = "no_target together with a mask or bbox"
    elif (absent or shaped) and not (name or texts):
        wrong = "neither class nor expression"
    elif (name or texts) and not (absent or shaped):
        wrong = "no mask, bbox or no_target"
    return Row(where, image, mask and os.path.join(masks, mask), bbox or (), name, texts, absent, wrong)


def _within(where: str, column: str, path: str) -> str:
    """Normalize a relative path, so that rows that spell the path differently are grouped.

    Raises ValueError if the path leads out of its folder.
    """
    path = posixpath.normpath(path) if path else ""
    if path.startswith(("/", "../")):
        raise ValueError(f"{where}: {column} {path!r} is not within --{column}s; give a path relative to this folder")
    return path


def _words(text: Any) -> str:
    return " ".join(str(text).split()) if text is not None else ""


def _bbox(value: Any) -> tuple[float, ...] | None:
    """Return the four numbers of a box, () for an empty value, or None for a malformed one."""
    parts = value.replace(",", " ").split() if isinstance(value, str) else value or ()
    try:
        numbers = tuple(float(v) for v in parts)
    except (TypeError, ValueError):
        return None
    return numbers if not numbers or (len(numbers) == 4 and all(map(math.isfinite, numbers))) else None


# ---- Records, in a worker process ----------------------------------------------------------------------------------


def _record(job: Job, image: Image, problems: Problems, class_of: dict[str, int], exhaustive: bool) -> Record:
    """Return the record of an image, made from the rows of the image.

    A class counts as labeled in part if one of its rows was dropped, or if the table is not exhaustive.
    """
    found: dict[Any, Segment] = {}
    absent_texts: list[str] = []
    absent, partial = set(), set()
    for row in job.labels:
        class_id = class_of.get(row.name)
        try:
            if row.wrong:
                raise Unusable(row.wrong)
            if row.texts and row.absent:
                absent_texts += row.texts
            elif row.absent:
                absent.add(class_id)
            elif row.mask or row.bbox:
                key = row.mask, row.bbox
                found[key] = _joined(found.get(key) or _shape(row, image, problems), class_id, row.texts)
            elif not exhaustive:
                raise Unusable("neither class nor expression")
        except Unusable as e:
            problems.add(f"row: {e}", row.where)
            partial.add(class_id)
    segments, absent_texts = _settled(job.key, list(found.values()), absent_texts, problems)
    owned = {s.class_id for s in segments}
    absent -= owned | partial
    if not (segments or absent_texts or absent or exhaustive):
        raise Unusable("image has no usable row")
    partial = (partial if exhaustive else partial | owned) - {None}
    known = {"absent_classes": tuple(sorted(absent)), "partial_classes": tuple(sorted(partial))}
    return Record(job.key, image.data, image.height, image.width, segments, absent_texts=absent_texts, **known)


def _joined(segment: Segment, class_id: int | None, texts: tuple[str, ...]) -> Segment:
    if None not in (segment.class_id, class_id) and segment.class_id != class_id:
        raise Unusable("its mask or bbox already has another class")
    return dataclasses.replace(
        segment, class_id=segment.class_id if class_id is None else class_id, texts=segment.texts + texts
    )


def _settled(
    key: str, found: list[Segment], absent: list[str], problems: Problems
) -> tuple[tuple[Segment, ...], tuple[str, ...]]:
    """Return the segments and the absent expressions of an image, without contradictions.

    An expression of two segments is dropped. An expression that is both present and absent counts as present. A segment
    without a class that loses all its expressions is dropped.
    """
    uses = collections.Counter(text for segment in found for text in set(segment.texts))
    for text in sorted(uses):
        if uses[text] > 1:
            problems.add("expression: names two objects", f"{key} {text!r}")
        elif text in absent:
            problems.add("expression: both present and absent", f"{key} {text!r}")
    own = [
        dataclasses.replace(s, texts=tuple(dict.fromkeys(text for text in s.texts if uses[text] == 1))) for s in found
    ]
    segments = tuple(s for s in own if s.texts or s.class_id is not None)
    return segments, tuple(text for text in dict.fromkeys(absent) if text not in uses)


def _shape(row: Row, image: Image, problems: Problems) -> Segment:
    """Return the segment of a row, without its class and expressions. If there is a mask, `bbox` is not used.

    Raises Unusable if the mask is unreadable or empty, or if the box is empty or outside the image.
    """
    if row.mask:
        mask = read_mask(row.mask, image)
        if not mask.any():
            raise Unusable("mask is empty")
        return Segment(box=box_of(mask), mask=encode_rle(mask))
    x, y, width, height = row.bbox
    box = max(x, 0.0), max(y, 0.0), min(x + width, float(image.width)), min(y + height, float(image.height))
    if width <= 0 or height <= 0:
        raise Unusable("box without area")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise Unusable("box outside its image")
    if min(x, y) < -1 or x + width > image.width + 1 or y + height > image.height + 1:
        problems.add("note: box clipped to its image (a bbox is x, y, width, height)", row.where)
    return Segment(box=box)
