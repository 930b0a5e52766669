"""True key layouts of public checkpoints: every name, shape and dtype, and random weights in them at full size.

`layouts/NAME.txt` holds facts read from the originals' code: a line a key pattern, "KEY DIM DIM ... DTYPE" (a scalar
has no DIM) or "KEY = OTHER" for a tensor that the checkpoint holds under both names. {a..b} and {a..b..step} in a key
count, last one fastest; OTHER's names are used in turn, over and over if they are fewer. Lines with # are comments.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "layouts"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.(\d+))?\}")


def load(name: str) -> Layout:
    """Every key of a checkpoint to its (shape, dtype), aliases too."""
    layout, same = _read(name)
    return layout | {key: layout[other] for key, other in same.items()}


def aliases(name: str) -> dict[str, str]:
    """{key: the key whose tensor it shares}."""
    return _read(name)[1]


def random(name: str, seed: int = 0, std: float = 0.02) -> Mapping[str, np.ndarray]:
    """A checkpoint of random weights, each tensor made when it is asked for, the same one every time.

    Normal with `std`; around 1 for scales of norms (vectors named weight) and in [0.5, 1.5) for running_var, so that a
    model of them stays finite. Integers count from 0. Aliases are equal.
    """
    return _Random(*_read(name), seed, std)


class _Random(Mapping[str, np.ndarray]):
    def __init__(self, layout: Layout, same: dict[str, str], seed: int, std: float):
        self.layout, self.same, self.seed, self.std = layout, same, seed, std
        self.last: tuple[str, np.ndarray] | None = None  # a reader often asks for one tensor several times in a row

    def __getitem__(self, key: str) -> np.ndarray:
        key = self.same.get(key, key)
        if self.last is None or self.last[0] != key:
            self.last = (key, self._make(key, *self.layout[key]))
        return self.last[1]

    def _make(self, key: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if dtype.kind == "i":
            return np.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)
        generator = np.random.default_rng([self.seed, zlib.crc32(key.encode())])
        if key.endswith("running_var"):
            return (0.5 + generator.random(shape, np.float32)).astype(dtype)
        value = np.asarray(generator.standard_normal(shape, np.float32) * np.float32(self.std))
        scale = len(shape) == 1 and key.endswith("weight")
        return np.asarray(value + 1 if scale else value, dtype)

    def __contains__(self, key: object) -> bool:
        return key in self.layout or key in self.same

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self.layout, self.same)

    def __len__(self) -> int:
        return len(self.layout) + len(self.same)


def _read(name: str) -> tuple[Layout, dict[str, str]]:
    """(the tensors, the aliases) of layouts/NAME.txt."""
    layout: Layout = {}
    same: dict[str, str] = {}
    for line in (FOLDER / f"{name}.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        key, *words = line.split()
        keys = _names(key)
        repeated = [old for old in keys if old in layout or old in same]
        if repeated:
            raise ValueError(f"{name}.txt: {repeated[0]} stands twice; drop one: {line}")
        if words[0] == "=":
            same.update(zip(keys, itertools.cycle(_names(words[1]))))
        else:
            layout.update(dict.fromkeys(keys, (tuple(map(int, words[:-1])), np.dtype(words[-1]))))
    return layout, same


def _names(pattern: str) -> list[str]:
    """The names that a pattern with {a..b} stands for."""
    counted = [range(int(start), int(stop) + 1, int(step or 1)) for start, stop, step in _RANGE.findall(pattern)]
    frame = _RANGE.sub("{}", pattern)
    return [frame.format(*numbers) for numbers in itertools.product(*counted)]
