"""How a foreign checkpoint's tensors become ours: a list of entries, each one tensor (or a slice of it) and its layout.

A family (one file each) looks at the names and shapes of a checkpoint and returns a `Plan`; everything else reads the plan:
`apply` brings tensors in, `invert` takes them back out, exactly.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mqformer_jax.convert.report import Report
from mqformer_jax.parallel.rules import path_name

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, np.ndarray]

# name: (theirs -> ours, ours -> theirs)
LAYOUTS: dict[str, tuple[Callable, Callable]] = {
    "same": (lambda x: x, lambda x: x),
    "linear": (lambda x: x.T, lambda x: x.T),  # [out, in] -> [in, out]
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW -> HWIO
    "column": (lambda x: x[:, None], lambda x: x[:, 0]),  # [n] -> [n, 1]
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of theirs and where it goes.

    ours: path of our leaf ("backbone/stem/conv/kernel"). theirs: key. layout: of LAYOUTS.
    index: which row of our leaf, where ours stacks layers of one shape. take: rows [start, stop) of theirs, where theirs packs
    several along the first axis (q, k, v). into: columns [start, stop) of ours' last axis, where ours packs. order: a permutation
    of theirs' first axis, by which ours reads it (levels counted from the other end: `reversed_levels`).
    Two entries with one place in ours are aliases: the checkpoint must hold equal values there.
    """

    ours: str
    theirs: str
    layout: str = "same"
    index: int | None = None
    take: tuple[int, int] | None = None
    into: tuple[int, int] | None = None
    order: np.ndarray | None = None


@dataclasses.dataclass
class Plan:
    """What a family makes of a checkpoint.

    config: a whole recipe (`config.base()`) whose `model` fits the checkpoint. part: the subtree of our parameters that it fills:
    "backbone", "text_encoder", or "" for the whole model. constants: leaves of ours that no tensor of theirs is read for.
    ignored: {regex of their keys: why they have no counterpart}.
    """

    config: ConfigDict
    part: str
    entries: list[Entry]
    constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of checkpoint. recognises: do these names look like it? plan: names and shapes to a Plan; raises ValueError in one line.

    originals: whose checkpoints, for --help. licence: what a user must know about the weights, or "".
    """

    name: str
    originals: str
    recognises: Callable[[Shapes], bool]
    plan: Callable[[Shapes], Plan]
    licence: str = ""


def linear(ours: str, theirs: str, index: int | None = None, bias: bool = True) -> list[Entry]:
    """A dense layer: ours/kernel and ours/bias of theirs.weight and theirs.bias."""
    kernel = [Entry(f"{ours}/kernel", f"{theirs}.weight", "linear", index)]
    return kernel + [Entry(f"{ours}/bias", f"{theirs}.bias", "same", index)] * bias


def conv(ours: str, theirs: str, index: int | None = None, bias: bool = False) -> list[Entry]:
    """A convolution: ours/kernel, and ours/bias, of theirs.weight and theirs.bias."""
    kernel = [Entry(f"{ours}/kernel", f"{theirs}.weight", "conv", index)]
    return kernel + [Entry(f"{ours}/bias", f"{theirs}.bias", "same", index)] * bias


def norm(ours: str, theirs: str, index: int | None = None) -> list[Entry]:
    """LayerNorm or GroupNorm: ours/scale and ours/bias."""
    return [Entry(f"{ours}/scale", f"{theirs}.weight", "same", index), Entry(f"{ours}/bias", f"{theirs}.bias", "same", index)]


def batch_norm(ours: str, theirs: str, index: int | None = None) -> list[Entry]:
    """Frozen BatchNorm: ours/scale, bias, mean, var."""
    names = dict(scale="weight", bias="bias", mean="running_mean", var="running_var")
    return [Entry(f"{ours}/{mine}", f"{theirs}.{name}", "same", index) for mine, name in names.items()]


def packed(ours: Sequence[str], theirs: str, width: int, index: int | None = None) -> list[Entry]:
    """torch's in_proj_weight and in_proj_bias ([q; k; v] along the first axis) to our three dense layers."""
    entries = []
    for k, name in enumerate(ours):
        rows = (k * width, (k + 1) * width)
        entries.append(Entry(f"{name}/kernel", f"{theirs}weight", "linear", index, take=rows))
        entries.append(Entry(f"{name}/bias", f"{theirs}bias", "same", index, take=rows))
    return entries


def packing(ours: str, theirs: Sequence[str], width: int, index: int | None = None) -> list[Entry]:
    """Their separate q, k, v dense layers to our packed one."""
    entries = []
    for k, name in enumerate(theirs):
        columns = (k * width, (k + 1) * width)
        entries.append(Entry(f"{ours}/kernel", f"{name}.weight", "linear", index, into=columns))
        entries.append(Entry(f"{ours}/bias", f"{name}.bias", "same", index, into=columns))
    return entries


def reversed_levels(heads: int, levels: int, rest: int) -> np.ndarray:
    """The `order` of rows [heads x levels x rest] whose levels run the other way (Mask2Former counts from the coarsest)."""
    return np.arange(heads * levels * rest).reshape(heads, levels, rest)[:, ::-1].ravel()


def apply(plan: Plan, tensors: Tensors, ours: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, np.ndarray], Report]:
    """Theirs to ours. `ours`: the leaves of the plan's part by path (`leaves`). Only leaves that were filled whole are returned."""
    report, values, filled = Report(), {}, {}
    read = set()
    for entry in plan.entries:
        read.add(entry.theirs)
        if entry.theirs not in tensors or entry.ours not in ours:
            continue  # named below, as missing or unused
        piece = LAYOUTS[entry.layout][0](_rows(tensors[entry.theirs], entry)).astype(np.float32)
        if entry.ours not in values:
            values[entry.ours] = np.zeros(ours[entry.ours].shape, np.float32)
            filled[entry.ours] = np.zeros(ours[entry.ours].shape, bool)
        place = _place(entry)
        told = f"{entry.theirs} {tensors[entry.theirs].shape} -> {_name(entry)} {values[entry.ours].shape}"
        try:
            target, done = values[entry.ours][place], filled[entry.ours][place]
        except IndexError:
            report.mismatched.append(told)
            continue
        if target.shape != piece.shape:
            report.mismatched.append(told)
        elif done.size and done.all() and not np.array_equal(target, piece):
            report.mismatched.append(f"{told}: another tensor that should be the same is not")
        else:
            values[entry.ours][place], filled[entry.ours][place] = piece, True
            plain = entry.layout == "same" and place == (...,) and entry.take is None and entry.order is None
            (report.loaded if plain else report.reshaped).append(told)
    for path, value in plan.constants.items():
        values[path], filled[path] = value.astype(np.float32), np.ones(value.shape, bool)
    complete = {path: value for path, value in values.items() if filled[path].all()}
    report.missing = sorted(set(ours) - set(complete))
    for key in sorted(set(tensors) - read):
        reason = next((why for pattern, why in plan.ignored.items() if re.search(pattern, key)), None)
        (report.unused if reason is None else report.ignored).append(key if reason is None else f"{key}: {reason}")
    return complete, report


def invert(plan: Plan, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ours back to theirs, exactly: the tensors that the plan's entries name, in float32."""
    pieces: dict[str, list[tuple[Entry, np.ndarray]]] = {}
    for entry in plan.entries:
        if entry.ours in values:
            pieces.setdefault(entry.theirs, []).append((entry, LAYOUTS[entry.layout][1](values[entry.ours][_place(entry)])))
    tensors = {}
    for key, parts in pieces.items():
        entry, piece = parts[0]
        if entry.take is not None:
            piece = np.concatenate([piece for _, piece in sorted(parts, key=lambda part: part[0].take)])
        tensors[key] = np.ascontiguousarray(piece if entry.order is None else piece[np.argsort(entry.order)])
    return tensors


def leaves(tree: Any) -> dict[str, Any]:
    """A pytree's leaves by path, as entries name them."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fill(module: nnx.Module, values: Mapping[str, np.ndarray], part: str) -> nnx.Module:
    """A module (or its shapes: `nnx.eval_shape`) with all variables taken from `values`, whose paths begin with `part`."""
    graph, state = nnx.split(module)
    pure = nnx.to_pure_dict(state)
    named = [f"{part}/{path}" if part else path for path in leaves(pure)]
    nnx.replace_by_pure_dict(state, jax.tree.unflatten(jax.tree.structure(pure), [jnp.asarray(values[path]) for path in named]))
    return nnx.merge(graph, state)


def _rows(x: np.ndarray, entry: Entry) -> np.ndarray:
    if entry.order is not None and len(entry.order) == len(x):
        x = x[entry.order]
    return x if entry.take is None else x[slice(*entry.take)]


def _place(entry: Entry) -> tuple:
    index = () if entry.index is None else (entry.index,)
    columns = () if entry.into is None else (slice(*entry.into),)
    return (*index, ..., *columns)


def _name(entry: Entry) -> str:
    return entry.ours + ("" if entry.index is None else f"[{entry.index}]")
