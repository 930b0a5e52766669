"""Analyze a traced program (a jaxpr): FLOPs, the largest arrays, and gathers, scatters and sorts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mqformer_jax.tools.hlo import Bytes, largest_by_shape

ROW = 8  # numbers; the numbers of shorter rows are counted one by one


def flops(jaxpr: Any) -> float:
    """Return the FLOPs of matmuls and convolutions of a jaxpr, including all iterations of scans.

    Operations inside shard_map count for one device.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[d] for d in contracted])
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval, eqn.params["dimension_numbers"]
            taps = kernel.size / kernel.shape[numbers.rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * taps / np.prod(eqn.params["lhs_dilation"])
        else:
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            total += times * sum(flops(getattr(inner, "jaxpr", inner)) for inner in _inner(eqn))
    return total


def irregular(jaxpr: Any) -> dict[str, float]:
    """Return counts of the operations in a jaxpr that are slow on TPUs, including all iterations of scans.

    gathered_rows, scattered_rows: rows of at least `ROW` adjacent numbers that gathers read and scatters write.
    gathered_numbers, scattered_numbers: numbers in shorter rows. sorted_numbers: inputs of sorts and top-k.
    random_numbers: random numbers of 32 bits. open_loops: loops whose length depends on data; their bodies count once.
    A gather with a single index is a slice and does not count. Of code that differs by platform, only the TPU's counts.
    """
    total: dict[str, float] = dict.fromkeys(
        ("gathered_rows", "gathered_numbers", "scattered_rows", "scattered_numbers", "sorted_numbers",
         "random_numbers", "open_loops"), 0.0
    )  # fmt: skip
    for eqn in jaxpr.eqns:
        name, times, inner = eqn.primitive.name, 1, list(_inner(eqn))
        if name == "gather":
            _count_rows(total, "gathered", eqn.outvars[0].aval.size, math.prod(eqn.params["slice_sizes"]))
        elif name.startswith("scatter"):
            index, updates = eqn.invars[1].aval, eqn.invars[2].aval
            _count_rows(total, "scattered", updates.size, updates.size // max(1, index.size // index.shape[-1]))
        elif name in ("sort", "top_k", "approx_top_k"):
            total["sorted_numbers"] += eqn.invars[0].aval.size
        elif name in ("random_bits", "threefry2x32"):
            total["random_numbers"] += sum(out.aval.size for out in eqn.outvars)
        elif name == "while":
            total["open_loops"] += not _counts_up(eqn)
        elif name == "scan":
            times = eqn.params["length"]
        elif name == "cond" and (platforms := eqn.params.get("branches_platforms")):
            ours = [i for i, p in enumerate(platforms) if p is None or "tpu" in p]
            inner = [eqn.params["branches"][ours[0]]]
        for one in inner:
            for kind, count in irregular(getattr(one, "jaxpr", one)).items():
                total[kind] += times * count
    return total


def _count_rows(total: dict[str, float], kind: str, size: int, row: int) -> None:
    if size > row:
        total[f"{kind}_rows" if row >= ROW else f"{kind}_numbers"] += size / row if row >= ROW else size


def _counts_up(eqn: Any) -> bool:
    """Return whether a `while` ends when a counter reaches a limit (`fori_loop`), not by a condition on data."""
    condition = eqn.params["cond_jaxpr"].jaxpr
    return [e.primitive.name for e in condition.eqns] == ["lt"]


def largest_traced(jaxpr: Any, count: int = 5) -> list[dict[str, Any]]:
    """Return bytes, shape and operation of the largest results in a jaxpr, one for each shape."""

    def made(jaxpr: Any) -> Iterator[tuple[Bytes, str, str]]:
        for eqn in jaxpr.eqns:
            for out in eqn.outvars:
                if hasattr(out.aval, "dtype"):
                    yield (
                        out.aval.size * getattr(out.aval.dtype, "itemsize", 4),
                        out.aval.str_short(),
                        str(eqn.primitive),
                    )
            for inner in _inner(eqn):
                yield from made(getattr(inner, "jaxpr", inner))

    return largest_by_shape(made(jaxpr), count)


def _inner(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
