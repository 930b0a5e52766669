"""Reading prepared data sets: one split of ArrayRecord shards as a Grain random access source of record bytes."""

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
    """One split of a prepared data set, `<root>/<name>`: `source[i]` is the bytes of a record (`Record.from_bytes`).
    paths: its shards.

    It goes to worker processes by pickle. Raises FileNotFoundError where the split is not prepared, ValueError where
    shards are missing or damaged, both in one line; BadRecord for one record that is damaged.
    """

    def __init__(self, root: str, name: str, split: str) -> None:
        self.name, self.split, self._folder = name, split, os.path.join(root, name)
        try:
            self.info = DatasetInfo.load(self._folder)
        except FileNotFoundError:
            raise FileNotFoundError(not_prepared(root, name, split)) from None
        if split not in self.info.splits:
            raise FileNotFoundError(not_prepared(root, name, split, self.info.source))
        self.paths = _checked(self._folder, split, self.info.splits[split])
        self._records = ArrayRecordDataSource(self.paths)

    def __len__(self) -> int:
        return self.info.splits[self.split]

    def __getitem__(self, index: SupportsIndex) -> bytes:
        i = operator.index(index)
        if not 0 <= i < len(self):
            raise IndexError(f"{self!r}: record {i} of {len(self)}")
        try:
            return self._records[i]
        except RuntimeError as e:
            raise BadRecord(f"{self._folder} {self.split}: record {i} is damaged: {e}") from e

    def __repr__(self) -> str:
        return f"ShardSource({self._folder!r}, {self.split!r})"


def _checked(folder: str, split: str, expected: int) -> Sequence[str]:
    """The shards of a split, all there and whole."""
    again = "prepare the split again with `mqformer prepare`"
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
        raise ValueError(f"{folder}: {split} shards of more than one preparation: delete them and {again}")
    counts = [_count(path) for path in paths]
    for path, count in zip(paths, counts):
        if not count:
            raise ValueError(f"{path} is damaged or cut short: {again}")
    if sum(counts) != expected:
        raise ValueError(f"{folder}: {split} shards hold {sum(counts)} records, dataset.json says {expected}: {again}")
    return paths


def _count(path: str) -> int:
    """Records of a shard; 0 where it is damaged, since a shard that lost its end opens as an empty one."""
    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
        return count
    except RuntimeError:
        return 0


def not_prepared(root: str, name: str, split: str, kind: str = "") -> str:
    """kind: the subcommand that prepared the other splits."""
    command = f"{kind} --name {name} --split {split} --output {root} …" if kind else f"public {name} --output {root}"
    command = f"sample --output {root}" if name.startswith("sample_") else command
    if kind == "synthesize" or name.endswith(("_syn", "_syn_m")):
        mend = "make it with `mqformer synthesize` (see docs/data.md)"
    else:
        mend = f"run `mqformer prepare {command}` (see data/README.md)"
    return f"data set '{name}' split '{split}' is not in {root}: {mend}"
