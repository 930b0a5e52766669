"""Converted or trained weights as a run's start: `config.init_from`, several checkpoints at once, each by the parts it
has.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mqformer_jax.checkpoint import load_config, load_weights
from mqformer_jax.files import atomic_write
from mqformer_jax.models.swin import resize_table
from mqformer_jax.models.tokenizer import TOKENIZER
from mqformer_jax.parallel.rules import flatten_paths, path_name

# means nothing to another text encoder
TEXT_SPACE = re.compile(r"^(text_encoder|heads/class_embed|heads/logit_|denoising_embedding|region_embedding)")
# fields of config.model that change what weights mean and not their shapes, by the paths they matter to
MEANING = {
    "backbone/": ("backbone.stride_in_1x1",),
    "text_encoder/": ("text.tokenizer", "text.heads", "text.norm_eps", "text.classes"),
    "pixel_decoder/": ("heads",),
    "decoder/": ("heads", "level_order"),
    "heads/class_embed": ("score",),
}


def initialize(params: Any, frozen: Any, config: ConfigDict) -> tuple[Any, Any, list[str]]:
    """Parameters and constants with what the checkpoints of `config.init_from` hold, in order; and what was done, in
    lines.

    A part whose kind differs (another backbone, another text encoder and all that speaks its language) is left out and
    named. Tables of positions are cut or resized; what is new beside trained weights starts as the identity. Raises
    ValueError in one line for any other difference of shape, and for weights that fit and would mean something else
    (MEANING), unless `config.init_skip` (regexes over parameter paths) leaves them fresh.
    """
    trees, lines, loaded = {"params": params, "frozen": frozen}, [], set()
    for path in config.init_from:
        weights = load_weights(path)
        theirs = flatten_paths(weights.params) | flatten_paths(weights.frozen)
        foreign = {
            why: what
            for why, what in _foreign(weights.config.model, config.model).items()
            if any(map(what.search, theirs))
        }
        skipped = (*foreign.values(), *map(_pattern, config.init_skip))
        wanted = {name: value for name, value in theirs.items() if not any(pattern.search(name) for pattern in skipped)}
        _check_meaning(path, wanted, weights.config.model, config.model)
        _check_shapes(path, wanted, flatten_paths(params) | flatten_paths(frozen))
        used: set[str] = set()
        take = functools.partial(_take, theirs=wanted, used=used)
        trees = {name: jax.tree_util.tree_map_with_path(take, tree) for name, tree in trees.items()}
        if not used:
            raise ValueError(
                f"{path}: nothing of it fits this config{''.join(f'; {reason}' for reason in foreign)}: "
                "take it out of config.init_from."
            )
        loaded |= used
        lines.append(f"{path}: {len(used)} of {len(theirs)} arrays" + "".join(f"; {reason}" for reason in foreign))
        if unused := sorted(set(wanted) - used):
            lines.append(f"{path}: this model has no place for {_summary(unused)}")
    name = "region_embedding"
    if name in params and name not in loaded and "heads/class_embed/kernel" in loaded:
        # the trained classes were learned without it: start at the identity
        trees["params"][name] = jax.tree.map(jnp.zeros_like, params[name])
    fresh = sorted({**flatten_paths(params), **flatten_paths(frozen)}.keys() - loaded)
    return trees["params"], trees["frozen"], lines + ([f"fresh: {_summary(fresh)}"] if fresh else [])


def bring_tokenizer(config: ConfigDict, workdir: str) -> None:
    """Copy the tokenizer of the checkpoint of `init_from` that brings the text encoder into the run, which is then
    whole by itself.

    Raises FileNotFoundError in one line for a folder of `init_from` without a checkpoint.
    """
    kinds = {path: load_config(path).model.text.tokenizer for path in config.init_from}
    files = [os.path.join(path, TOKENIZER) for path, kind in kinds.items() if kind == config.model.text.tokenizer]
    source = next((file for file in reversed(files) if os.path.exists(file)), None)
    if source is not None:
        with atomic_write(os.path.join(workdir, TOKENIZER)) as temporary:
            shutil.copyfile(source, temporary)


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as e:
        raise ValueError(f"config.init_skip: {text!r} is no regular expression ({e}).") from e


def _foreign(theirs: ConfigDict, ours: ConfigDict) -> dict[str, re.Pattern]:
    """Why which parts of a checkpoint are left out: {reason: paths}."""
    parts = {}
    if theirs.backbone.name != ours.backbone.name:
        parts[f"not its backbone ({theirs.backbone.name}, here {ours.backbone.name})"] = re.compile(r"^backbone/")
    if any(theirs.text[field] != ours.text[field] for field in ("name", "vocab_size", "width", "embed_dim")):
        parts[f"not what its text encoder gives meaning ({theirs.text.name}, here {ours.text.name})"] = TEXT_SPACE
    return parts


def _check_meaning(source: str, paths: Iterable[str], theirs: ConfigDict, ours: ConfigDict) -> None:
    """Weights that fit and would mean something else: an error that names the field."""
    read = lambda model, field: functools.reduce(lambda node, name: node[name], field.split("."), model)
    value = lambda model, field: tuple(found) if isinstance(found := read(model, field), (list, tuple)) else found
    for part, fields in MEANING.items():
        for field in fields if any(path.startswith(part) for path in paths) else ():
            if (had := value(theirs, field)) != (has := value(ours, field)):
                raise ValueError(
                    f"{source}: it was made with model.{field} = {had!r}, this config has {has!r}: "
                    f"set config.model.{field} to that, or leave it out with config.init_skip=('^{part}',)."
                )


def _check_shapes(source: str, theirs: Mapping[str, jax.Array], ours: Mapping[str, jax.Array]) -> None:
    wrong = [
        f"{name} is {value.shape}, here {ours[name].shape}"
        for name, value in theirs.items()
        if name in ours and _fitted(name, value, ours[name].shape).shape != ours[name].shape
    ]
    if wrong:
        names = ", ".join(f"'^{line.split()[0]}$'" for line in wrong[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{source}: {'; '.join(wrong[:3])}{more}: "
            f"change the config, or leave them fresh with config.init_skip, e.g. ({names},)."
        )


def _take(path: tuple, leaf: jax.Array, theirs: dict[str, jax.Array], used: set[str]) -> jax.Array:
    name = path_name(path)
    if name not in theirs:
        return leaf
    used.add(name)
    return jax.device_put(_fitted(name, theirs[name], leaf.shape).astype(leaf.dtype), leaf.sharding)


def _fitted(name: str, value: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """Tables whose length is a choice: text positions are cut, Swin's relative positions resized to another window."""
    value = np.asarray(value)
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
