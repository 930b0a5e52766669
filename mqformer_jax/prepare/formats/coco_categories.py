"""Turn the categories of a COCO JSON file into classes: names, synonyms, corrections of misspelled names."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mqformer_jax.input.record import ClassInfo
from mqformer_jax.prepare.formats.coco_records import flag
from mqformer_jax.prepare.formats.images import Unusable
from mqformer_jax.prepare.formats.label_maps import distinct
from mqformer_jax.prepare.plan import Problems

# Corrections of names that are misspelled in their data sets or that join two names (Objects365, LVIS).
_MENDED = {
    "Moniter/TV": ("Monitor", "TV"),
    "Bakset": ("Basket",),
    "Ballon": ("Balloon",),
    "Dinning Table": ("Dining Table",),
    "Cutting/chopping Board": ("Cutting Board", "Chopping Board"),
    "Billards": ("Billiards",),
    "Extention Cord": ("Extension Cord",),
    "Hotair ballon": ("Hot air balloon",),
    "Hamimelon": ("Hami melon",),
    "Mushroon": ("Mushroom",),
    "Tape Measur/ Ruler": ("Tape Measure", "Ruler"),
    "Campel": ("Camel",),
    "Buttefly": ("Butterfly",),
    "Noddles": ("Noodles",),
    "Table Teniis paddle": ("Table Tennis paddle",),
    "monitor_(computer_equipment) computer_monitor": ("monitor (computer equipment)", "computer monitor"),
}

# A slash between two names: "Cabinet/shelf" and "Tape Measure/ Ruler", but not "and/or", "w/o", "N/A" or "24/7".
_OR = re.compile(r"(?<=[^\W\d_]{2})(?<!\band)\s*/\s*(?=[^\W\d_]{2})")


def vocabulary(categories: Sequence[Mapping[str, Any]], path: str) -> tuple[tuple[ClassInfo, ...], dict[int, int]]:
    """Return the classes, sorted by category id, and {category id: class index}.

    The texts of a class are its name, split at slashes ("Cabinet/shelf"), and its `synonyms`, without synonyms that
    another class also has. A qualifier in brackets stays ("bow (weapon)"), since some names in LVIS differ only in it.
    Stuff names lose "-merged", "-other" and "-stuff" ("sky-other-merged" becomes "sky"). If two classes would then have
    the same name, both keep their full names. Raises ValueError if a category is malformed, or if an id or a name
    occurs twice.
    """
    for c in categories:
        if not isinstance(c.get("id"), int) or not isinstance(c.get("name"), str) or not c["name"].strip():
            raise ValueError(f"{path}: category {str(c)[:100]} needs 'id' (an integer) and 'name' (a string)")
    for category_id, count in collections.Counter(c["id"] for c in categories).items():
        if count > 1:
            raise ValueError(f"{path}: category id {category_id} occurs {count} times; ids must differ")
    try:
        isthing = {c["id"]: flag({"isthing": 1, **c}, "isthing") for c in categories}
    except Unusable as e:
        raise ValueError(f"{path}: in a category, {e}") from None
    categories = sorted(categories, key=lambda c: c["id"])
    words = [_words(c["name"], isthing[c["id"]]) for c in categories]
    counts = collections.Counter(w[0] for w in words)
    names = [w[0] if counts[w[0]] == 1 else _spaced(c["name"].replace("-", " ")) for c, w in zip(categories, words)]
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(f"{path}: category name {name!r} occurs {count} times; names must differ")
    synonyms = [_synonyms(c, path) for c in categories]
    texts = distinct(
        [tuple(dict.fromkeys((name, *more, *others))) for name, more, others in zip(names, words, synonyms)]
    )
    classes = tuple(ClassInfo(tuple(t), is_region=not isthing[c["id"]]) for c, t in zip(categories, texts))
    return classes, {c["id"]: i for i, c in enumerate(categories)}


def _synonyms(category: Mapping[str, Any], path: str) -> list[str]:
    synonyms = category.get("synonyms") or []
    synonyms = [synonyms] if isinstance(synonyms, str) else synonyms
    if not all(isinstance(s, str) for s in synonyms):
        raise ValueError(
            f"{path}: field 'synonyms' of category {category['name']!r} contains values that are not strings"
        )
    return [_spaced(s) for s in synonyms if s.strip() and s != category["name"]]


def _words(name: str, isthing: bool) -> tuple[str, ...]:
    """Split the name of a category at slashes and return the parts, which are synonyms.

    A name with a bracket is not split. Known misspellings are corrected. Stuff names lose "-merged", "-other" and
    "-stuff".
    """
    if name in _MENDED:
        return _MENDED[name]
    name = _spaced(name if isthing else re.sub("(-merged|-other|-stuff)+$", "", name).replace("-", " "))
    return (name,) if "(" in name else tuple(_OR.split(name))


def _spaced(name: str) -> str:
    return " ".join(str(name).replace("_", " ").split())


def without_root(categories: list[dict], annotations: list[dict], problems: Problems) -> list[dict]:
    """Return the categories without the root category that Roboflow adds for the project, if there is one.

    The root is the super-category of all other categories, and its own super-category is "none". It has no annotations,
    so as a class it would count as absent in every image. A category that has annotations is never the root, nor is one
    that is its own super-category, like Hand-Segmentation in SeginW.
    """
    above = collections.Counter(c.get("supercategory") for c in categories)
    for root in categories:
        is_root = root.get("supercategory") == "none" and above == {"none": 1, root.get("name"): len(categories) - 1}
        if is_root and all(a.get("category_id") != root.get("id") for a in annotations):
            problems.add(
                "note: dropped the super-category of all other categories, which has no annotations",
                str(root.get("name")),
            )
            return [c for c in categories if c is not root]
    return categories
