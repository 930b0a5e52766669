"""Start a run from converted or trained weights: `config.init_from`, one or more checkpoints.

Each checkpoint provides the parts of the model that it contains.
"""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
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

# parameters that are valid only for the text encoder they were trained with
TEXT_SPACE = re.compile(r"^(text_encoder|heads/class_embed|heads/logit_|denoising_embedding|region_embedding)")
# {path prefix of weights: fields of config.model that change how the model uses them, but not their shapes}
MEANING = {
    "backbone/": ("backbone.stride_in_1x1",),
    "text_encoder/": ("text.tokenizer", "text.heads", "text.norm_eps", "text.classes"),
    "pixel_decoder/": ("heads",),
    "decoder/": ("heads", "level_order"),
    "heads/class_embed": ("score",),
}


def initialize(
    params: Any, frozen: Any, model: ConfigDict, init_from: Sequence[str], init_skip: Sequence[str] = ()
) -> tuple[Any, Any, list[str], set[str]]:
    """Load the checkpoints of `init_from`. Return the parameters, the constants, a report, and the loaded paths.

    Later checkpoints override earlier ones. If a checkpoint has another backbone or text encoder than the model, this
    part is skipped and reported. All weights that depend on a skipped text encoder are skipped with it. Position tables
    are truncated or resized. If the checkpoints lack the exchange layers (attention between learnable and conditional
    queries) or the region embeddings (added to prompts that name one region), these do not change the predictions at
    first.

    params, frozen: the initial values; `model` is their `config.model`. init_skip: regexes over the paths of parameters
    that keep their initial values.

    Raises ValueError, with a message of one line, if the shape of any other loaded array differs, or if a config field
    listed in `MEANING` differs. (With another value of such a field, the shapes fit, but the model would use the
    weights wrongly.) To load the rest anyway, exclude these weights with `init_skip`.
    """
    trees, lines, loaded = {"params": params, "frozen": frozen}, [], set()
    for path in init_from:
        weights = load_weights(path)
        theirs = flatten_paths(weights.params) | flatten_paths(weights.frozen)
        foreign = {
            why: what for why, what in _foreign(weights.config.model, model).items() if any(map(what.search, theirs))
        }
        skipped = (*foreign.values(), *map(_pattern, init_skip))
        wanted = {name: value for name, value in theirs.items() if not any(pattern.search(name) for pattern in skipped)}
        _check_meaning(path, wanted, weights.config.model, model)
        _check_shapes(path, wanted, flatten_paths(params) | flatten_paths(frozen))
        used: set[str] = set()
        take = functools.partial(_take, theirs=wanted, used=used)
        trees = {name: jax.tree_util.tree_map_with_path(take, tree) for name, tree in trees.items()}
        if not used:
            raise ValueError(
                f"{path}: no array of this checkpoint fits this config{''.join(f'; {reason}' for reason in foreign)}: "
                "remove the checkpoint from config.init_from."
            )
        loaded |= used
        reasons = "".join(f"; {reason}" for reason in foreign)
        lines.append(f"{path}: {len(used)} of {len(theirs)} arrays loaded{reasons}")
        if unused := sorted(set(wanted) - used):
            lines.append(f"{path}: ignored arrays that this model does not have: {_summary(unused)}")
    name = "region_embedding"
    if name in params and name not in loaded and "heads/class_embed/kernel" in loaded:
        # the loaded class head was trained without region embeddings: zeros do not change its predictions
        trees["params"][name] = jax.tree.map(jnp.zeros_like, params[name])
    fresh = sorted({**flatten_paths(params), **flatten_paths(frozen)}.keys() - loaded)
    lines += [f"newly initialized: {_summary(fresh)}"] if fresh else []
    return trees["params"], trees["frozen"], lines, loaded


def bring_tokenizer(init_from: Sequence[str], tokenizer: str, workdir: str) -> None:
    """Copy tokenizer.json from a checkpoint of `init_from` to the workdir. A resumed run then needs only the workdir.

    The source is the last checkpoint that has this file and whose config has the same `tokenizer`. If there is none,
    nothing is copied. tokenizer: `config.model.text.tokenizer`. Raises FileNotFoundError, with a message of one line,
    if a folder of `init_from` has no checkpoint.
    """
    kinds = {path: load_config(path).model.text.tokenizer for path in init_from}
    files = [os.path.join(path, TOKENIZER) for path, kind in kinds.items() if kind == tokenizer]
    source = next((file for file in reversed(files) if os.path.exists(file)), None)
    if source is not None:
        with atomic_write(os.path.join(workdir, TOKENIZER)) as temporary:
            shutil.copyfile(source, temporary)


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as e:
        raise ValueError(f"config.init_skip: {text!r} is not a valid regular expression ({e}); correct it.") from e


def _foreign(theirs: ConfigDict, ours: ConfigDict) -> dict[str, re.Pattern]:
    """Return the parts of a checkpoint to skip, as {reason: regex over the paths of the weights}.

    theirs, ours: `config.model` of the checkpoint and of this run.
    """
    parts = {}
    if theirs.backbone.name != ours.backbone.name:
        reason = f"skipped its backbone ({theirs.backbone.name}, but this config has {ours.backbone.name})"
        parts[reason] = re.compile(r"^backbone/")
    if any(theirs.text[field] != ours.text[field] for field in ("name", "vocab_size", "width", "embed_dim")):
        parts["skipped its text encoder, whose config.model.text differs, and weights that depend on it"] = TEXT_SPACE
    return parts


def _check_meaning(source: str, paths: Iterable[str], theirs: ConfigDict, ours: ConfigDict) -> None:
    """Raise ValueError if this config uses loaded weights differently from the config they were trained with.

    Shapes do not always show this: another number of attention heads, for example, changes no shape. source: the
    checkpoint's folder. paths: of the loaded weights. theirs, ours: `config.model` of the checkpoint and of this run.
    """
    read = lambda model, field: functools.reduce(lambda node, name: node[name], field.split("."), model)
    value = lambda model, field: tuple(found) if isinstance(found := read(model, field), (list, tuple)) else found
    for part, fields in MEANING.items():
        for field in fields if any(path.startswith(part) for path in paths) else ():
            if (had := value(theirs, field)) != (has := value(ours, field)):
                raise ValueError(
                    f"{source} was trained with model.{field} = {had!r}, but this config has {has!r}: "
                    f"set config.model.{field} = {had!r}, or skip these weights with config.init_skip=('^{part}',)."
                )


def _check_shapes(source: str, theirs: Mapping[str, jax.Array], ours: Mapping[str, jax.Array]) -> None:
    """Raise ValueError if a loaded array (`theirs`) does not have the shape of the model's array of that name (`ours`).

    Arrays that `_fitted` can adapt to this shape are accepted. source: the checkpoint's folder.
    """
    wrong = [
        f"{name} is {value.shape}, but {ours[name].shape} in this config"
        for name, value in theirs.items()
        if name in ours and _fitted(name, value, ours[name].shape).shape != ours[name].shape
    ]
    if wrong:
        names = ", ".join(f"'^{line.split()[0]}$'" for line in wrong[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{source}: {'; '.join(wrong[:3])}{more}: "
            f"change the config, or skip these arrays, e.g. with config.init_skip=({names},)."
        )


def _take(path: tuple, leaf: jax.Array, theirs: dict[str, jax.Array], used: set[str]) -> jax.Array:
    name = path_name(path)
    if name not in theirs:
        return leaf
    used.add(name)
    return jax.device_put(_fitted(name, theirs[name], leaf.shape).astype(leaf.dtype), leaf.sharding)


def _fitted(name: str, value: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """Adapt an array to `shape` if possible: truncate text positions, resize Swin's position tables to the window.

    Other arrays are returned unchanged. name: the path of the array.
    """
    value = np.asarray(value)
    if name == "text_encoder/positions" and len(value) > shape[0]:
        return value[: shape[0]]
    if name.startswith("backbone/") and name.endswith("/position_bias") and value.shape != shape:
        return resize_table(value, window=(math.isqrt(shape[-2]) + 1) // 2)
    return value


def _summary(paths: list[str]) -> str:
    """Return the number of paths for each prefix of two components, e.g. "decoder/layers (12), heads/box (6)"."""
    groups: dict[str, int] = {}
    for path in paths:
        group = "/".join(path.split("/")[:2])
        groups[group] = groups.get(group, 0) + 1
    return ", ".join(f"{group} ({n})" for group, n in groups.items())
