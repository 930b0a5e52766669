"""Read class lists, which give the class of each mask value or color, in the formats of public data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from mqformer_jax.prepare.formats.label_maps import distinct

NUMBERED = re.compile(r"\s*\d+[\s:,]")


def read_classes(path: str, offset: int | None = None) -> tuple[list[tuple[str, ...]], list[int], int]:
    """Return the synonyms of each class, the mask values of unlabeled pixels, and the mask value of the first class.

    Formats:
    - JSON: a list, or {"classes": [...], "ignore_index": 11, "index_offset": 0}. A class is a name, a list of synonyms,
      or {"name": ..., "color": [r, g, b]}.
    - ADE20K's objectInfo150.txt: a table with the mask value in the first column and the name in the last.
    - CamVid's label_colors.txt: lines "R G B name". "Void" is unlabeled.
    - Plain text: one class per line.

    Commas separate synonyms. A synonym of two classes is left out. offset: mask value of the first class (default: the
    one in the file, else 0). Raises FileNotFoundError if the file is missing, ValueError if it is malformed.
    """
    entries, ignore, own_offset = _read_list(path)
    offset = own_offset if offset is None else offset
    names = [name for name, _ in entries]
    first = [name[0] for name in names if name]
    twice = [name for name in first if first.count(name) > 1]
    if not names:
        raise ValueError(f"{path}: the class list is empty; write at least one class name")
    if len(first) < len(names):
        raise ValueError(
            f"{path}: class {names.index(()) + 1} of {len(names)} has no name; give it a name, or remove it"
        )
    if twice:
        raise ValueError(f"{path}: class {twice[0]!r} occurs twice; rename or remove one of the two")
    if ignore is None:  # not given: 255, unless that is a class
        ignore = [] if offset <= 255 < offset + len(names) else [255]
    return distinct(names), ignore, offset


def read_colors(path: str) -> dict[int, int]:
    """Return {color: class index} of a class list. A color is the number red << 16 | green << 8 | blue.

    Raises ValueError if two classes have the same color.
    """
    names, found = [], {}
    for i, (texts, color) in enumerate(_read_list(path)[0]):
        names.append(", ".join(texts))
        if color is not None and found.setdefault(color, i) != i:
            rgb = color >> 16, color >> 8 & 255, color & 255
            raise ValueError(
                f"{path}: classes {names[found[color]]!r} and {names[i]!r} have the same color {rgb}; change one color"
            )
    return found


def _read_list(path: str) -> tuple[list[tuple[tuple[str, ...], int | None]], list[int] | None, int]:
    """Return (synonyms, color) of each class, the mask values of unlabeled pixels, and the first class's mask value.

    A color or a list of unlabeled values that the file does not give is None.
    """
    text = read_text(path)
    lines, ignore, offset = _json_classes(path, text) if path.endswith(".json") else _text_classes(path, text)
    try:
        named = [line if isinstance(line, dict) else {"name": line} for line in lines]
        return [(_synonyms(line["name"]), _color(line)) for line in named], ignore, offset
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{path}: a class is malformed; write it in one of these forms: "
            '"sky", ["sky", "heaven"] or {"name": "sky", "color": [128, 128, 128]}'
        ) from None


def _json_classes(path: str, text: str) -> tuple[list[Any], list[int] | None, int]:
    try:
        fields = json.loads(text)
    except ValueError as e:
        raise ValueError(f"{path}: not JSON: {e}") from None
    fields = {"classes": fields} if isinstance(fields, list) else fields
    if not isinstance(fields, dict) or not isinstance(fields.get("classes"), list):
        raise ValueError(
            f"{path}: field 'classes' is missing or not a list; "
            'write {"classes": ["sky", ...], "ignore_index": 255}, or only the list'
        )
    ignore = [fields["ignore_index"]] if "ignore_index" in fields else None
    return fields["classes"], ignore, fields.get("index_offset", 0)


def _text_classes(path: str, text: str) -> tuple[list[Any], list[int] | None, int]:
    lines = [line for line in text.splitlines() if line.strip()]
    colored = [re.fullmatch(r"\s*(\d+)\s+(\d+)\s+(\d+)\s+(\S.*)", line) for line in lines]
    if lines and all(colored):
        classes = [{"name": found[4], "color": found.groups()[:3]} for found in colored]
        return classes, [i for i, c in enumerate(classes) if c["name"].strip().lower() == "void"], 0
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines]
    values = [int(row[0]) for row in rows[1:] if row[0].isdecimal() and len(row) > 1]
    if values and not rows[0][0].isdecimal() and values == list(range(values[0], values[0] + len(rows) - 1)):
        # a table with a header: the mask value comes first, the name last
        return (
            [row[-1] for row in rows[1:]],
            None,
            values[0],
        )
    for line in lines:
        nameless = any(not re.search(r"[^\W\d_]", name) for name in _synonyms(line))
        if nameless or "#" in line or "::" in line or NUMBERED.match(line):
            formats = "JSON, lines with one name, lines 'R G B name', or a table with a header, like objectInfo150.txt"
            raise ValueError(f"{path}: line {line.strip()!r} is not a class name; use one of these formats: {formats}")
    return lines, None, 0


def _color(line: dict[str, Any]) -> int | None:
    if "color" not in line and "colour" not in line:
        return None
    red, green, blue = (int(v) for v in line.get("color", line.get("colour")))
    if not all(0 <= v <= 255 for v in (red, green, blue)):
        raise ValueError("no color")
    return red << 16 | green << 8 | blue


def _synonyms(words: str | Sequence[str]) -> tuple[str, ...]:
    line = words if isinstance(words, str) else ",".join(words)
    return tuple(word.strip().replace("_", " ") for word in line.replace(";", ",").split(",") if word.strip())


def read_text(path: str) -> str:
    """Return the contents of a UTF-8 text file without its byte order mark.

    Raises FileNotFoundError if the file cannot be opened, ValueError if it is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except OSError:
        raise FileNotFoundError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8; save it in this encoding") from None
