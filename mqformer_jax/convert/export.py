"""Our checkpoints to safetensors and back."""

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

HEADER = "mqformer_jax"  # the entry of a file's header that makes it ours: JSON of config and tokenizer


def export(source: str, output: str, like: str | None = None) -> int:
    """Our checkpoint folder `source` as a safetensors file; returns the number of tensors.

    like: a checkpoint of the family in whose names and layout to write. Without it the names are our paths, the header
    holds config and tokenizer, and `restore` reads the file back. Raises ValueError or OSError in one line.
    """
    weights = load_weights(source)
    values = {
        path: np.asarray(leaf) for tree in (weights.params, weights.frozen) for path, leaf in leaves(tree).items()
    }
    if like is not None:
        _, plan, theirs = plan_of(like, None)
        tensors = invert(plan, values, {key: tuple(value.shape) for key, value in theirs.items()})
        if absent := {entry.theirs for entry in plan.entries} - set(tensors):
            raise ValueError(f"{source}: it has not what {like} has ({len(absent)} tensors, {sorted(absent)[0]}, ...).")
        write_safetensors(output, tensors)
        return len(tensors)
    beside = pathlib.Path(source, TOKENIZER)
    tokenizer = beside.read_text("utf-8") if beside.exists() else None
    write_safetensors(
        output, values, {HEADER: json.dumps({"config": config_to_json(weights.config), "tokenizer": tokenizer})}
    )
    return len(values)


def is_ours(path: str) -> bool:
    """Whether `export` wrote this file in our own names."""
    return _header(path) is not None


def restore(source: str, output: str) -> int:
    """A safetensors file that `export` wrote, back to a checkpoint folder; returns the number of tensors. Raises
    ValueError, OSError.
    """
    check_output(output)
    header, tensors = _header(source), read(source)
    config = config_from_json(header["config"])
    shapes = abstract(config)
    for path, value in tensors.items():
        place = (shapes[0] | shapes[1]).get(path)
        if place is None or place.shape != value.shape:
            raise ValueError(f"{source}: {path} {value.shape} is no part of the model that its header describes.")
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
