"""Read the records of a prepared data set. `ShardSource` is a random access source for Grain."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Sequence
from typing import SupportsIndex

from array_record.python.array_record_module import ArrayRecordReader
from grain.sources import ArrayRecordDataSource

from mqformer_jax.input.record import BadRecord, DatasetInfo, shard_paths


class ShardSource:
    """One split of the prepared data set `<root>/<name>`. `source[i]` returns the bytes for `Record.from_bytes`.

    paths: the shards. A source can be pickled, e.g. for worker processes. Raises FileNotFoundError if the split is not
    prepared, and ValueError if shards are missing or damaged. `source[i]` raises BadRecord if that record is damaged.
    """

    def __init__(self, root: str, name: str, split: str) -> None:
        self.name, self.split, self._folder = name, split, os.path.join(root, name)
        try:
            self.info = DatasetInfo.load(self._folder)
        except FileNotFoundError:
            raise FileNotFoundError(not_prepared(root, name, split)) from None
        if split not in self.info.splits:
            raise FileNotFoundError(not_prepared(root, name, split, self.info.source))
        self.paths = _find_shards(self._folder, split, self.info.splits[split], prepare_again(self.info))
        self._records = ArrayRecordDataSource(self.paths)

    def __len__(self) -> int:
        return self.info.splits[self.split]

    def __getitem__(self, index: SupportsIndex) -> bytes:
        i = operator.index(index)
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} is out of range: {self!r} has {len(self)} records")
        try:
            return self._records[i]
        except RuntimeError as e:
            raise BadRecord(
                f"{self._folder}, split {self.split}: record {i} is damaged ({e}): {prepare_again(self.info)}"
            ) from e

    def __repr__(self) -> str:
        return f"ShardSource({self._folder!r}, {self.split!r})"


def _find_shards(folder: str, split: str, expected: int, again: str) -> Sequence[str]:
    """Return the shards of a split. Raises ValueError if one is missing or damaged.

    expected: number of records of the split. again: advice for the end of error messages (`prepare_again`).
    """
    found = {
        name
        for name in os.listdir(folder)
        if re.fullmatch(rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}\.array_record", name)
    }
    totals = {int(name[-18:-13]) for name in found} or {1}
    paths = shard_paths(folder, split, max(totals))
    for path in paths:
        if os.path.basename(path) not in found:
            raise ValueError(f"{path} is missing: {again}")
    if len(paths) != len(found):
        raise ValueError(f"{folder}: the {split} shards come from more than one preparation: delete them and {again}")
    counts = [_count(path) for path in paths]
    for path, count in zip(paths, counts):
        if not count:
            raise ValueError(f"{path} is damaged or incomplete: {again}")
    if sum(counts) != expected:
        counted = f"the {split} shards hold {sum(counts)} records, but dataset.json lists {expected}"
        raise ValueError(f"{folder}: {counted}: {again}")
    return paths


def _count(path: str) -> int:
    """Return the number of records of a shard, or 0 if it is damaged (a truncated shard opens as an empty one)."""
    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
        return count
    except RuntimeError:
        return 0


def prepare_again(info: DatasetInfo) -> str:
    """Return advice for the end of a message about a damaged split: which command to run again."""
    command = "synthesize" if info.source == "synthesize" else "prepare"
    return f"prepare the split again with `mqformer {command}`"


def not_prepared(root: str, name: str, split: str, kind: str = "") -> str:
    """Return the message about a missing split. kind: `Plan.kind` of the other splits, or ""."""
    command = f"{kind} --name {name} --split {split} --output {root} …" if kind else f"public {name} --output {root}"
    command = f"sample --output {root}" if name.startswith("sample_") else command
    if kind == "synthesize" or name.endswith(("_syn", "_syn_m")):
        hint = "create it with `mqformer synthesize` (see docs/data.md)"
    elif kind == "script":
        hint = "run the script that prepares this data set (see docs/data.md)"
    else:
        hint = f"run `mqformer prepare {command}` (see data/README.md)"
    return f"data set '{name}' split '{split}' is not in {root}: {hint}"
