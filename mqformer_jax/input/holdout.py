"""Keep evaluation images out of the training data.

RefCOCO, RefCOCO+ and RefCOCOg evaluate on images of COCO's training split, which COCO panoptic, LVIS and Visual Genome
also label. The `origin` of a record identifies its image across data sets.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mqformer_jax.input.record import DatasetInfo, origins_path
from mqformer_jax.input.sources import ShardSource, not_prepared, prepare_again

Split = tuple[str, str]  # name, split


class Part:
    """A subset of the records of a source. indices: the indices of these records in the source."""

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
    """Return the training sources without the images of evaluation sets, and log lines about the excluded images.

    Evaluation sets are `eval_sets`, and also every prepared split under `root` that has expressions and whose name does
    not start with "train", because it may be evaluated later. A split in `sources` never counts as an evaluation set.
    Raises FileNotFoundError if one of `eval_sets` is not prepared, ValueError if all images of a source are excluded or
    a file of origins is damaged.
    """
    trained = {(source.name, source.split) for source in sources}
    evaluated = {(entry["name"], entry["split"]) for entry in eval_sets}
    expressions = _expression_splits(root)
    held_out: dict[str, set[str]] = defaultdict(set)
    for name, split in sorted((evaluated | expressions) - trained):
        for origin in filter(None, read_origins(root, name, split)):
            held_out[origin].add(f"{name}/{split}")
    lines = [
        f"data.leak_guard: {name}/{split} is used for training and for evaluation; its images are kept"
        for name, split in sorted(evaluated & trained)
    ]
    parts, has_origins = [], False
    for source in sources:
        origins = read_origins(root, source.name, source.split)
        has_origins |= bool(origins)
        part, line = _exclude(source, origins, held_out)
        parts.append(part)
        lines += [line] if line and line not in lines else []
    if has_origins and not expressions:
        lines.append(
            f"data.leak_guard: {root} has no val or test split of RefCOCO/+/g; "
            "if you will evaluate on them, prepare these splits before training"
        )
    if outdated := [
        f"{name}/{split}"
        for name, split in sorted(evaluated | trained)
        if split not in _info(root, name, split).expressions
    ]:
        lines.append(
            f"data.leak_guard: evaluation images in {', '.join(outdated)} cannot be recognized, because these sets "
            "were prepared by an older version; prepare them again"
        )
    return parts, lines


def read_origins(root: str, name: str, split: str) -> list[str]:
    """Return the `origin` of each record, or [] if all are "".

    Raises FileNotFoundError if the split is not prepared, ValueError if its file of origins has too few or too many
    lines.
    """
    info, path = _info(root, name, split), origins_path(os.path.join(root, name), split)
    if not os.path.exists(path):
        return []
    with open(path) as f:
        origins = f.read().splitlines()
    if len(origins) != info.splits[split]:
        raise ValueError(f"{path} has {len(origins)} lines for {info.splits[split]} records: {prepare_again(info)}")
    return origins


def _info(root: str, name: str, split: str) -> DatasetInfo:
    try:
        info = DatasetInfo.load(os.path.join(root, name))
    except FileNotFoundError:
        raise FileNotFoundError(not_prepared(root, name, split)) from None
    if split not in info.splits:
        raise FileNotFoundError(not_prepared(root, name, split, info.source))
    return info


def _exclude(
    source: ShardSource, origins: Sequence[str], held_out: Mapping[str, set[str]]
) -> tuple[ShardSource | Part, str]:
    """Return the source without held-out images, and a log line, or "" if nothing is excluded.

    origins: the original image of each record of `source`, as a string that identifies it. held_out: {original image:
    names of the evaluation splits that contain it}. Raises ValueError if every image is held out.
    """
    kept = [i for i, origin in enumerate(origins) if origin not in held_out]
    if len(kept) == len(origins):
        return source, ""
    evaluated_by = ", ".join(sorted(set().union(*(held_out[origin] for origin in origins if origin in held_out))))
    if not kept:
        raise ValueError(
            f"data.mixture: all {len(origins)} images of {source.name}/{source.split} are evaluation images of "
            f"{evaluated_by}. Check the split, or set data.leak_guard=False to train on them."
        )
    count = f"{len(origins) - len(kept)} of {len(origins)} images"
    line = f"data.leak_guard: {count} of {source.name}/{source.split} are left out; they belong to {evaluated_by}"
    return Part(source, kept), line


def _expression_splits(root: str) -> set[Split]:
    """Return the prepared splits that have expressions and whose name does not start with "train"."""
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
