"""The leak guard: an image that one data set evaluates on is trained on by none.

RefCOCO, RefCOCO+ and RefCOCOg evaluate on images of COCO's training split, which COCO panoptic, LVIS and Visual Genome
label too. A record's `origin` says whose picture it is.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mqformer_jax.input.record import DatasetInfo
from mqformer_jax.input.sources import ShardSource

REFERRING = ("referring", "table", "tfds ref_coco")  # how `DatasetInfo.source` of a set of expressions begins


class Part:
    """Some of the records of a source, as a source."""

    def __init__(self, source: ShardSource, indices: Sequence[int]):
        self.info, self.name, self.split = source.info, source.name, source.split
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> bytes:
        return self._source[self._indices[index]]


def guard(
    sources: Sequence[ShardSource], root: str, mixture: Sequence[Mapping[str, Any]], eval_sets: Sequence[Mapping[str, Any]]
) -> tuple[list[ShardSource | Part], list[str]]:
    """The training sources without the images that others evaluate on, and lines that say how many those are.

    Held out are the sets of `config.eval.sets`, and every set of expressions under `root` but its train split: who trains
    today will evaluate on RefCOCO tomorrow. A split that the mixture itself names is trained on by intent. Raises ValueError
    where nothing of a source is left.
    """
    trained = {(entry["name"], entry["split"]) for entry in mixture}
    referring = _referring_splits(root)
    evaluated = {(entry["name"], entry["split"]) for entry in eval_sets} | set(referring)
    held: dict[str, set[str]] = defaultdict(set)
    for name, split in evaluated - trained:
        for origin in filter(None, ShardSource(root, name, split).origins()):
            held[origin].add(f"{name}/{split}")
    origins = [source.origins() for source in sources]
    parts, lines = zip(*(_without(source, of_source, held) for source, of_source in zip(sources, origins)))
    lines = [line for line in lines if line]
    if any(origins) and not referring:
        lines.append(f"leak guard: no val or test split of RefCOCO/+/g is in {root}; prepare them first if they are to be evaluated on")
    return list(parts), lines


def _without(source: ShardSource, origins: Sequence[str], held: Mapping[str, set[str]]) -> tuple[ShardSource | Part, str]:
    kept = [i for i, origin in enumerate(origins) if origin not in held]
    if len(kept) == len(origins):
        return source, ""
    evaluated_by = ", ".join(sorted(set().union(*(held[origin] for origin in origins if origin in held))))
    line = f"leak guard: {len(origins) - len(kept)} of {len(origins)} images of {source.name}/{source.split} left out, for {evaluated_by}"
    if not kept:
        raise ValueError(f"data.mixture: {line}; none are left. Is it the right split? (data.leak_guard=False trains on it)")
    return Part(source, kept), line


def _referring_splits(root: str) -> list[tuple[str, str]]:
    """The (name, split) of all prepared expressions that nobody trains on."""
    found = []
    for name in sorted(os.listdir(root)) if os.path.isdir(root) else ():
        if os.path.exists(os.path.join(root, name, "dataset.json")):
            info = DatasetInfo.load(os.path.join(root, name))
            found += [(name, split) for split in info.splits if info.source.startswith(REFERRING) and not split.startswith("train")]
    return found
