"""Export checkpoints of this project to safetensors files, and restore them from these files."""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np
import safetensors

from mqformer_jax.checkpoint import Weights, config_from_json, config_to_json, load_weights
from mqformer_jax.convert.convert import abstract, check_output, nest, plan_of, save
from mqformer_jax.convert.files import read, write_safetensors
from mqformer_jax.convert.rules import invert, leaves
from mqformer_jax.models.tokenizer import TOKENIZER

HEADER = "mqformer_jax"  # header entry that marks an exported file: config and tokenizer as JSON


def export(source: str, output: str, like: str | None = None) -> int:
    """Write the checkpoint folder `source` of this project to a safetensors file, and return the number of tensors.

    like: another project's checkpoint whose tensor names and layout to use. If None, the names are this project's
    parameter paths, the header holds config and tokenizer, and `restore` can read the file. Raises ValueError if a
    checkpoint is damaged or `like` has another model, and OSError if a file cannot be read or written.
    """
    weights = load_weights(source)
    values = {
        path: np.asarray(leaf) for tree in (weights.params, weights.frozen) for path, leaf in leaves(tree).items()
    }
    if like is not None:
        _, plan, theirs = plan_of(like, None)
        tensors = invert(plan, values, {key: tuple(value.shape) for key, value in theirs.items()})
        if absent := {entry.theirs for entry in plan.entries} - set(tensors):
            raise ValueError(
                f"{source} lacks {len(absent)} tensors of {like} ({sorted(absent)[0]}, ...): "
                "use a checkpoint of the same model for --like."
            )
        write_safetensors(output, tensors)
        return len(tensors)
    beside = pathlib.Path(source, TOKENIZER)
    tokenizer = beside.read_text("utf-8") if beside.exists() else None
    write_safetensors(
        output, values, {HEADER: json.dumps({"config": config_to_json(weights.config), "tokenizer": tokenizer})}
    )
    return len(values)


def is_ours(path: str) -> bool:
    """Return whether `export` wrote this file with this project's parameter names, not with other tensor names."""
    return _header(path) is not None


def restore(source: str, output: str) -> int:
    """Write a checkpoint folder from a file for which `is_ours` is true, and return the number of tensors.

    Raises ValueError if the file is damaged, and OSError if the folder cannot be written.
    """
    check_output(output)
    header, tensors = _header(source), read(source)
    config = config_from_json(header["config"])
    shapes = abstract(config.model)
    for path, value in tensors.items():
        place = (shapes[0] | shapes[1]).get(path)
        if place is None or place.shape != value.shape:
            raise ValueError(
                f"{source}: {path} {value.shape} does not fit the config in the file's header: export it again."
            )
    params, frozen = ({path: value for path, value in tensors.items() if path in part} for part in shapes)
    about = {"converted": [{"family": "mqformer", "file": os.path.basename(source)}]}
    save(output, Weights(config, nest(params), nest(frozen)), about, header["tokenizer"])
    return len(tensors)


def _header(path: str) -> dict | None:
    if not os.path.isfile(path):
        return None
    try:
        with safetensors.safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(HEADER)
            return None if text is None else json.loads(text)
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError):
        return None
