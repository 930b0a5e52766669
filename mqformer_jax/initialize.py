"""Converted or trained weights as a run's start: `config.init_from`, several checkpoints at once, each by the parts it has."""

from __future__ import annotations

import math
import os
import re
import shutil
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mqformer_jax.checkpoint import load_weights
from mqformer_jax.models.swin import resize_table
from mqformer_jax.parallel.rules import path_name

TEXT_SPACE = re.compile(r"^(text_encoder|heads/class_embed|heads/logit_|noised|grain)")  # means nothing to another text encoder
TOKENIZER = "tokenizer.json"


def initialize(params: Any, frozen: Any, config: ConfigDict) -> tuple[Any, Any, list[str]]:
    """Parameters and constants with what the checkpoints of `config.init_from` hold, in order; and what was done, in lines.

    A part whose kind differs (another backbone, another text encoder and all that speaks its language) is left out and named.
    Tables of positions are cut or resized; any other difference of shape is an error, unless `config.init_skip` (regexes over
    parameter paths) leaves it fresh.
    """
    trees, lines, loaded = {"params": params, "frozen": frozen}, [], set()
    for path in config.init_from:
        weights = load_weights(path)
        theirs = _named(weights.params) | _named(weights.frozen)
        foreign = {why: what for why, what in _foreign(weights.config.model, config.model).items() if any(map(what.search, theirs))}
        skipped = (*foreign.values(), *map(re.compile, config.init_skip))
        wanted = {name: value for name, value in theirs.items() if not any(pattern.search(name) for pattern in skipped)}
        used: set[str] = set()
        trees = {
            name: jax.tree_util.tree_map_with_path(lambda p, leaf: _take(p, leaf, wanted, used, path), tree) for name, tree in trees.items()
        }
        loaded |= used
        lines.append(f"{path}: {len(used)} of {len(theirs)} arrays" + "".join(f"; {reason}" for reason in foreign))
        if unused := sorted(set(wanted) - used):
            lines.append(f"{path}: this model has no place for {_summary(unused)}")
    fresh = sorted({**_named(params), **_named(frozen)}.keys() - loaded)
    return trees["params"], trees["frozen"], lines + ([f"fresh: {_summary(fresh)}"] if fresh else [])


def bring_tokenizer(config: ConfigDict, workdir: str) -> None:
    """Copy the tokenizer of the first checkpoint of `init_from` that has one into the run, which is then whole by itself."""
    source = next((file for path in config.init_from if os.path.exists(file := os.path.join(path, TOKENIZER))), None)
    target = os.path.join(workdir, TOKENIZER)
    if source is not None and not os.path.exists(target):
        shutil.copyfile(source, target + ".tmp")
        os.replace(target + ".tmp", target)


def _named(tree: Any) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _foreign(theirs: ConfigDict, ours: ConfigDict) -> dict[str, re.Pattern]:
    """Why which parts of a checkpoint are left out: {reason: paths}."""
    parts = {}
    if theirs.backbone.name != ours.backbone.name:
        parts[f"not its backbone ({theirs.backbone.name}, here {ours.backbone.name})"] = re.compile(r"^backbone/")
    if any(theirs.text[field] != ours.text[field] for field in ("name", "vocab_size", "width", "embed_dim")):
        parts[f"not what its text encoder gives meaning ({theirs.text.name}, here {ours.text.name})"] = TEXT_SPACE
    return parts


def _take(path: tuple, leaf: jax.Array, theirs: dict[str, jax.Array], used: set[str], source: str) -> jax.Array:
    name = path_name(path)
    if name not in theirs:
        return leaf
    used.add(name)
    value = _fitted(name, np.asarray(theirs[name]), leaf.shape)
    if value.shape != leaf.shape:
        raise ValueError(
            f"{source}: {name} is {value.shape}, this config makes it {leaf.shape}: change the config, or leave it fresh with "
            f"config.init_skip=('^{name}$',)."
        )
    return jax.device_put(value.astype(leaf.dtype), leaf.sharding)


def _fitted(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Tables whose length is a choice: text positions are cut, Swin's relative positions resized to another window."""
    if name == "text_encoder/positions" and len(value) > shape[0]:
        return value[: shape[0]]
    if name.startswith("backbone/") and name.endswith("/position_bias") and value.shape != shape:
        return resize_table(value, window=(math.isqrt(shape[-2]) + 1) // 2)
    return value


def _summary(paths: list[str]) -> str:
    """Counts by the first two steps of the paths."""
    groups: dict[str, int] = {}
    for path in paths:
        group = "/".join(path.split("/")[:2])
        groups[group] = groups.get(group, 0) + 1
    return ", ".join(f"{group} ({n})" for group, n in groups.items())
