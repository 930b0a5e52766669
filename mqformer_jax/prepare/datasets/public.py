"""Public data sets by name, read from the folders that their downloads unpack to.

    mqformer prepare public NAME ... --root=FOLDER

`--list` shows the names, the splits and the files of each split (`catalog.SETS`). data/README.md describes the sets.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Iterable, Iterator, Sequence

from mqformer_jax.prepare.datasets.catalog import SETS
from mqformer_jax.prepare.plan import Plan


def plans(names: Sequence[str], root: str, splits: Sequence[str] = ()) -> Iterator[tuple[str, str, Plan]]:
    """Return an iterator over (name, split, plan) of the named data sets.

    names: names or patterns, e.g. "seginw_*". root: the folder of the unpacked downloads. splits: all if empty. Raises
    ValueError for an unknown name or split and FileNotFoundError for the first missing file, before any plan is made.
    """
    wanted = [(name, split) for name in _expand(names) for split in _chosen(name, splits)]
    for name, split in wanted:
        missing = [path for path in SETS[name].splits[split].files() if not os.path.exists(os.path.join(root, path))]
        if missing:
            raise FileNotFoundError(_mend(name, split, os.path.join(root, missing[0])))
    return ((name, split, SETS[name].splits[split].plan(root)) for name, split in wanted)


def table(root: str) -> str:
    """Return a text that lists all data sets and the files of their splits. A + marks splits whose files all exist."""
    lines = [f"Files expected below {root}. A + marks splits whose files all exist."]
    for name, entry in SETS.items():
        lines += [
            "",
            f"{name}: {entry.teaches}",
            f"    download from {entry.url} and unpack {entry.get}; license: {entry.license}",
        ]
        for split, source in entry.splits.items():
            there = all(os.path.exists(os.path.join(root, path)) for path in source.files())
            lines.append(f"  {'+' if there else ' '} {split:6} {'  '.join(source.files())}")
    return "\n".join(lines)


def _expand(names: Sequence[str]) -> list[str]:
    if not names:
        raise ValueError("give the name of a data set, e.g. refcoco; --list shows all names")
    found: dict[str, None] = {}
    for pattern in names:
        matching = fnmatch.filter(SETS, pattern)
        if not matching:
            near = difflib.get_close_matches(pattern, SETS, n=1)
            raise ValueError(
                f"no data set {pattern!r}; " + (f"did you mean {near[0]}?" if near else "--list shows all names")
            )
        found.update(dict.fromkeys(matching))
    return list(found)


def _chosen(name: str, splits: Sequence[str]) -> Iterable[str]:
    known = SETS[name].splits
    for split in splits:
        if split not in known:
            raise ValueError(f"{name} has no split {split!r}; give --split with one of {', '.join(known)}")
    return splits or known


def _mend(name: str, split: str, path: str) -> str:
    entry = SETS[name]
    only = (
        f". To leave out this split, use --split {' '.join(s for s in entry.splits if s != split)}"
        if len(entry.splits) > 1
        else ""
    )
    return f"{path}: no such file or folder. For {name} {split}, download from {entry.url} and unpack {entry.get}{only}"
