"""Convert the tensors of another project's checkpoint to parameters of this project's model.

Each family of checkpoints has a module. From the names and shapes of a checkpoint's tensors, it makes a `Plan` with a
list of conversion rules (`Entry`). With this plan, `apply` converts the tensors to parameters, and `invert` converts
the parameters back exactly. In arguments, "ours" means parameter paths of the model, and "theirs" means tensor names in
the checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.convert.report import Report
from mqformer_jax.parallel.rules import path_name

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, np.ndarray]

# name: (function from the checkpoint's layout to the model's layout, its inverse)
LAYOUTS: dict[str, tuple[Callable, Callable]] = {
    "same": (lambda x: x, lambda x: x),
    "linear": (lambda x: x.T, lambda x: x.T),  # [out, in] -> [in, out]
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW -> HWIO
    "column": (lambda x: x[:, None], lambda x: x[:, 0]),  # [n] -> [n, 1]
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule that converts a tensor of the checkpoint, or a slice of it, to a parameter of the model, or a slice of it.

    ours: path of the parameter ("backbone/stem/conv/kernel").
    theirs: name of the tensor.
    layout: key of LAYOUTS.
    index: index on the first axis of the parameter, if the parameter stacks several layers.
    take: rows [start, stop) of the tensor, if the tensor packs several parameters (q, k, v).
    into: columns [start, stop) on the last axis of the parameter, if the parameter packs several tensors.
    order: permutation of the first axis of the tensor, e.g. `reversed_levels`.
    If two rules fill the same elements of a parameter, their tensors must be equal.
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
    """A plan for the conversion of one checkpoint.

    config: a complete recipe (`config.base()`) whose `model` fits the checkpoint. part: the part of the model that the
    checkpoint fills: "backbone", "text_encoder", or "" for the whole model. constants: {path: value} of parameters that
    have no counterpart in the checkpoint. ignored: {regex of tensor names: reason why these tensors have no counterpart
    in the model}.
    """

    config: ConfigDict
    part: str
    entries: list[Entry]
    constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    recognizes: returns whether {tensor name: shape} belong to this family. plan: returns the Plan for {tensor name:
    shape}, or raises ValueError. originals: description for --help. license: notice about the weights, or "".
    """

    name: str
    originals: str
    recognizes: Callable[[Shapes], bool]
    plan: Callable[[Shapes], Plan]
    license: str = ""


def shape_of(shapes: Shapes, key: str, ndim: int) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises ValueError if it is missing or does not have `ndim` dimensions."""
    shape = shapes.get(key)
    if shape is None or len(shape) != ndim:
        found = "is missing" if shape is None else f"has shape {tuple(shape)}"
        raise ValueError(
            f"{key} {found}: a tensor with {ndim} dimension{'s' * (ndim > 1)} is expected; give the complete file."
        )
    return tuple(shape)


def count(shapes: Shapes, pattern: str) -> int:
    """Return the number of layers in a checkpoint. Raises ValueError if it is 0, or if the layer numbers have a gap.

    pattern: prefix of the tensor names of a layer, with {} for the layer's number, counted from 0.
    """
    layer = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    found = {int(match[1]) for key in shapes if (match := layer.match(key))}
    absent = next(i for i in range(len(found) + 1) if i not in found)
    if absent < max(len(found), 1):
        raise ValueError(
            f"{pattern.replace('{}', str(absent))}* is missing: layers are numbered from 0; give the complete file."
        )
    return len(found)


def prefix_of(shapes: Shapes, name: str, *others: str) -> str | None:
    """Return the prefix of `name` in a checkpoint, e.g. "model." if `name` is "conv1" and a tensor is "model.conv1".

    Return None if no tensor name ends in `name`, or if one of `others` does not exist with the same prefix.
    """
    prefix = next((key.removesuffix(name) for key in shapes if key == name or key.endswith(f".{name}")), None)
    return prefix if prefix is not None and all(prefix + other in shapes for other in others) else None


def is_model(shapes: Shapes) -> bool:
    """Return whether the checkpoint holds a complete model (e.g. CLIP) instead of a backbone alone.

    Families of backbones reject complete models, which have their own families.
    """
    return any(part in key for key in shapes for part in ("sem_seg_head.", "pixel_level_module.", "visual."))


def linear(ours: str, theirs: str, index: int | None = None, bias: bool = True) -> list[Entry]:
    """Return the conversion rules of a dense layer: theirs.weight to ours/kernel, theirs.bias to ours/bias."""
    kernel = [Entry(f"{ours}/kernel", f"{theirs}.weight", "linear", index)]
    return kernel + [Entry(f"{ours}/bias", f"{theirs}.bias", "same", index)] * bias


def conv(ours: str, theirs: str, index: int | None = None, bias: bool = False) -> list[Entry]:
    """Return the conversion rules of a convolution: theirs.weight to ours/kernel, theirs.bias to ours/bias."""
    kernel = [Entry(f"{ours}/kernel", f"{theirs}.weight", "conv", index)]
    return kernel + [Entry(f"{ours}/bias", f"{theirs}.bias", "same", index)] * bias


def norm(ours: str, theirs: str, index: int | None = None) -> list[Entry]:
    """Return the conversion rules of a layer or group norm: theirs.weight to ours/scale, theirs.bias to ours/bias."""
    return [
        Entry(f"{ours}/scale", f"{theirs}.weight", "same", index),
        Entry(f"{ours}/bias", f"{theirs}.bias", "same", index),
    ]


def batch_norm(ours: str, theirs: str, index: int | None = None) -> list[Entry]:
    """Return the conversion rules of a frozen BatchNorm.

    theirs.weight, bias, running_mean and running_var become ours/scale, bias, mean and var.
    """
    names = dict(scale="weight", bias="bias", mean="running_mean", var="running_var")
    return [Entry(f"{ours}/{mine}", f"{theirs}.{name}", "same", index) for mine, name in names.items()]


def packed(ours: Sequence[str], theirs: str, width: int, index: int | None = None) -> list[Entry]:
    """Return the conversion rules that split torch's in_proj_weight and in_proj_bias, [q; k; v], into three layers.

    ours: paths of the layers. theirs: prefix of the two names, which ends in "in_proj_". width: rows of each part.
    """
    entries = []
    for k, name in enumerate(ours):
        rows = (k * width, (k + 1) * width)
        entries.append(Entry(f"{name}/kernel", f"{theirs}weight", "linear", index, take=rows))
        entries.append(Entry(f"{name}/bias", f"{theirs}bias", "same", index, take=rows))
    return entries


def packing(ours: str, theirs: Sequence[str], width: int, index: int | None = None) -> list[Entry]:
    """Return the conversion rules that pack separate dense layers for q, k and v into one layer.

    width: output channels of each separate layer.
    """
    entries = []
    for k, name in enumerate(theirs):
        columns = (k * width, (k + 1) * width)
        entries.append(Entry(f"{ours}/kernel", f"{name}.weight", "linear", index, into=columns))
        entries.append(Entry(f"{ours}/bias", f"{name}.bias", "same", index, into=columns))
    return entries


def reversed_levels(heads: int, levels: int, rest: int) -> np.ndarray:
    """Return the permutation (`Entry.order`) of heads x levels x rest rows that reverses the order of the levels.

    Some checkpoints, e.g. Mask2Former's, store the coarsest level first.
    """
    return np.arange(heads * levels * rest).reshape(heads, levels, rest)[:, ::-1].ravel()


def apply(
    plan: Plan, tensors: Tensors, ours: Mapping[str, jax.ShapeDtypeStruct | Array]
) -> tuple[dict[str, np.ndarray], Report]:
    """Convert a checkpoint's tensors. Return {path: value} and a report.

    The values include only parameters of which the checkpoint has all elements. ours: {path: shape and type} of the
    parameters in the part of the model that `plan` converts. Tensors that contain NaN or infinity are also converted,
    with a warning.
    """
    report, values, filled = Report(), {}, {}
    read, odd = set(), {}
    for entry in plan.entries:
        read.add(entry.theirs)
        if entry.theirs not in tensors or entry.ours not in ours:
            continue  # reported below as missing or unused
        if entry.ours not in values:
            values[entry.ours] = np.zeros(ours[entry.ours].shape, np.float32)
            filled[entry.ours] = np.zeros(ours[entry.ours].shape, bool)
        tensor, place = tensors[entry.theirs], _place(entry)
        told = f"{entry.theirs} {tensor.shape} -> {_name(entry)} {values[entry.ours].shape}"
        try:
            piece = LAYOUTS[entry.layout][0](_rows(tensor, entry)).astype(np.float32)
            target, done = values[entry.ours][place], filled[entry.ours][place]
        except (IndexError, ValueError):  # wrong number of dimensions
            report.mismatched.append(told)
            continue
        if not np.isfinite(piece).all():
            odd[entry.theirs] = True
        if target.shape != piece.shape:
            report.mismatched.append(told)
        elif done.size and done.all() and not np.array_equal(target, piece, equal_nan=True):
            report.mismatched.append(f"{told}: differs from another tensor that should be equal")
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
    if odd:
        logging.warning("these converted tensors contain NaN or infinity: %s", ", ".join(odd))
    return complete, report


def invert(plan: Plan, values: Mapping[str, Array], shapes: Shapes | None = None) -> dict[str, np.ndarray]:
    """Convert parameters of the model back to the tensors of the checkpoint, exactly. Return {name: tensor} in float32.

    values: {path: parameter}. A tensor is left out if a parameter that holds a part of it is missing. shapes: {name:
    shape} of the checkpoint's tensors, for a check that these can hold `values`. Raises ValueError if a parameter does
    not have the shape that the plan fills, or if a constant of the plan has changed.
    """
    if shapes is not None:
        _check_expressible(plan, values, shapes)
    by_key: dict[str, list[Entry]] = {}
    for entry in plan.entries:
        by_key.setdefault(entry.theirs, []).append(entry)
    tensors = {}
    for key, entries in by_key.items():
        if all(entry.ours in values for entry in entries):
            pieces = [
                _inverted(values[entry.ours], entry) for entry in sorted(entries, key=lambda entry: entry.take or ())
            ]
            piece, order = pieces[0] if entries[0].take is None else np.concatenate(pieces), entries[0].order
            tensors[key] = np.ascontiguousarray(piece if order is None else piece[np.argsort(order)])
    return tensors


def _inverted(value: Array, entry: Entry) -> Array:
    try:
        return LAYOUTS[entry.layout][1](value[_place(entry)])
    except (IndexError, ValueError) as e:
        raise ValueError(
            f"{entry.ours} {value.shape} has no {_name(entry)} for {entry.theirs}: "
            "use a checkpoint of the same model for --like."
        ) from e


def _check_expressible(plan: Plan, values: Mapping[str, Array], shapes: Shapes) -> None:
    """Raise ValueError if a parameter does not have the shape that the plan fills, or a constant has changed."""
    for path, constant in plan.constants.items():
        if path in values and not np.array_equal(values[path], constant.astype(np.float32)):
            raise ValueError(
                f"parameter {path} was changed by training, but the original format has no tensor for it: "
                "export without --like."
            )
    layers, columns = {}, {}
    for entry in plan.entries:
        layers[entry.ours] = max(layers.get(entry.ours, 0), 0 if entry.index is None else entry.index + 1)
        columns[entry.ours] = max(columns.get(entry.ours, 0), 0 if entry.into is None else entry.into[1])
    for entry in plan.entries:
        if entry.ours not in values or entry.theirs not in shapes:
            continue
        one = np.broadcast_to(np.float32(0), shapes[entry.theirs])
        shape = LAYOUTS[entry.layout][0](one if entry.take is None else one[slice(*entry.take)]).shape
        shape = (layers[entry.ours],) * (entry.index is not None) + shape
        shape = shape if entry.into is None else (*shape[:-1], columns[entry.ours])
        if values[entry.ours].shape != shape:
            raise ValueError(
                f"{entry.ours} has shape {values[entry.ours].shape}, "
                f"but {entry.theirs} needs {shape}: use a checkpoint of the same model for --like."
            )


def leaves(tree: Any) -> dict[str, Any]:
    """Return {path: leaf} of a pytree, with paths such as "backbone/stem/conv/kernel"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fill(module: nnx.Module, values: Mapping[str, Array], part: str) -> nnx.Module:
    """Return `module` with all variables replaced by those in `values`.

    module: a module, or its shapes (`nnx.eval_shape`). part: path of the module in `values`, or "" for the whole model.
    """
    graph, state = nnx.split(module)
    pure = nnx.to_pure_dict(state)
    named = [f"{part}/{path}" if part else path for path in leaves(pure)]
    nnx.replace_by_pure_dict(
        state, jax.tree.unflatten(jax.tree.structure(pure), [jnp.asarray(values[path]) for path in named])
    )
    return nnx.merge(graph, state)


def _rows(x: np.ndarray, entry: Entry) -> np.ndarray:
    if entry.order is not None and x.shape[:1] == entry.order.shape:
        x = x[entry.order]
    return x if entry.take is None else x[slice(*entry.take)]


def _place(entry: Entry) -> tuple:
    index = () if entry.index is None else (entry.index,)
    columns = () if entry.into is None else (slice(*entry.into),)
    return (*index, ..., *columns)


def _name(entry: Entry) -> str:
    return entry.ours + ("" if entry.index is None else f"[{entry.index}]")
