"""The leak guard: an image that one data set evaluates on is trained on by none.

RefCOCO, RefCOCO+ and RefCOCOg evaluate on images of COCO's training split, which COCO panoptic, LVIS and Visual Genome
label too. A record's `origin` says whose picture it is.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mqformer_jax.input.record import DatasetInfo, origins_path
from mqformer_jax.input.sources import ShardSource, not_prepared

Split = tuple[str, str]  # name, split


class Part:
    """Some of the records of a source, as a source. indices: their numbers there."""

    def __init__(self, source: ShardSource, indices: Sequence[int]):
        self.info, self.name, self.split = source.info, source.name, source.split
        self.indices, self._source = indices, source

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes:
        return self._source[self.indices[index]]


def exclude_eval_images(
    sources: Sequence[ShardSource], root: str, eval_sets: Sequence[Mapping[str, Any]]
) -> tuple[list[ShardSource | Part], list[str]]:
    """Return the training sources without the images of evaluation sets, and lines for the log on what was left out.

    Held out are the sets of `config.eval.sets`, and every split of expressions under `root` that is not called train:
    who trains today will evaluate on RefCOCO tomorrow. A split that is trained on is not held out. Raises
    FileNotFoundError where a set of `eval_sets` is not prepared, ValueError where nothing of a source is left.
    """
    trained = {(source.name, source.split) for source in sources}
    evaluated = {(entry["name"], entry["split"]) for entry in eval_sets}
    expressions = _splits_of_expressions(root)
    held: dict[str, set[str]] = defaultdict(set)
    for name, split in sorted((evaluated | expressions) - trained):
        for origin in filter(None, read_origins(root, name, split)):
            held[origin].add(f"{name}/{split}")
    lines = [
        f"leak guard: {name}/{split} is trained on and evaluated on" for name, split in sorted(evaluated & trained)
    ]
    parts, known = [], False
    for source in sources:
        origins = read_origins(root, source.name, source.split)
        known |= bool(origins)
        part, line = _without(source, origins, held)
        parts.append(part)
        lines += [line] if line and line not in lines else []
    if known and not expressions:
        lines.append(
            f"leak guard: no val or test split of RefCOCO/+/g is in {root}; "
            "prepare them first if they are to be evaluated on"
        )
    if old := [
        f"{name}/{split}"
        for name, split in sorted(evaluated | trained)
        if split not in _info(root, name, split).expressions
    ]:
        lines.append(f"leak guard: whose pictures these hold is not known, prepare them again: {', '.join(old)}")
    return parts, lines


def read_origins(root: str, name: str, split: str) -> list[str]:
    """Each record's `origin`; nothing where all of them are "". Raises FileNotFoundError, ValueError, in one line."""
    count, path = _info(root, name, split).splits[split], origins_path(os.path.join(root, name), split)
    if not os.path.exists(path):
        return []
    with open(path) as f:
        origins = f.read().splitlines()
    if len(origins) != count:
        raise ValueError(
            f"{path} has {len(origins)} lines for {count} records: prepare the split again with `mqformer prepare`"
        )
    return origins


def _info(root: str, name: str, split: str) -> DatasetInfo:
    try:
        info = DatasetInfo.load(os.path.join(root, name))
    except FileNotFoundError:
        raise FileNotFoundError(not_prepared(root, name, split)) from None
    if split not in info.splits:
        raise FileNotFoundError(not_prepared(root, name, split, info.source))
    return info


def _without(
    source: ShardSource, origins: Sequence[str], held: Mapping[str, set[str]]
) -> tuple[ShardSource | Part, str]:
    kept = [i for i, origin in enumerate(origins) if origin not in held]
    if len(kept) == len(origins):
        return source, ""
    evaluated_by = ", ".join(sorted(set().union(*(held[origin] for origin in origins if origin in held))))
    out = f"{len(origins) - len(kept)} of {len(origins)} images of {source.name}/{source.split} left out"
    line = f"leak guard: {out}, for {evaluated_by}"
    if not kept:
        raise ValueError(
            f"data.mixture: {line}; none are left. Is it the right split? (data.leak_guard=False trains on it)"
        )
    return Part(source, kept), line


def _splits_of_expressions(root: str) -> set[Split]:
    """All prepared splits that hold expressions and are not called train."""
    infos = [DatasetInfo.load(os.path.join(root, name)) for name in _prepared(root)]
    return {
        (info.name, split)
        for info in infos
        for split, count in info.expressions.items()
        if count and not split.startswith("train")
    }


def _prepared(root: str) -> list[str]:
    return (
        sorted(name for name in os.listdir(root) if os.path.exists(os.path.join(root, name, "dataset.json")))
        if os.path.isdir(root)
        else []
    )
