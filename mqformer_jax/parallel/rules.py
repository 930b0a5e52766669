"""Sharding rules for parameters, and functions that address the leaves of a tree by path.

A rule is (regex over a parameter's path, mesh axes of the parameter's last dimensions). The first rule that matches
applies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def path_name(path: tuple) -> str:
    """Return a key path of `jax.tree_util` as text, such as "decoder/layers/ffn/0/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def flatten_paths(tree: Any) -> dict[str, Any]:
    """Return {path: leaf} of a tree, with paths such as "decoder/layers/ffn/0/kernel"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def filled(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Return a tree with the structure of `tree` and the values of `leaves`, a dictionary {path: value}.

    The structure of a checkpoint cannot be used instead, because there, entry 10 of a list comes before entry 2.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], tree)


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Return a NamedSharding for each leaf of `tree` (arrays or their shapes).

    The axes of a rule apply to the last dimensions of a leaf. Dimensions before these, such as the axis of scanned
    layers, are not sharded. A dimension that is not divisible by the size of its axis is not sharded either, so
    one list of rules serves every model size. Leaves without a matching rule are replicated.
    """

    def spec(path, leaf):
        shape, name = np.shape(leaf), path_name(path)
        for pattern, axes in rules:
            if re.search(pattern, name) and len(axes) <= len(shape):
                front = (None,) * (len(shape) - len(axes))
                fits = lambda axis, n: axis is not None and n % mesh.shape[axis] == 0
                return NamedSharding(
                    mesh, P(*front, *(a if fits(a, n) else None for a, n in zip(axes, shape[len(front) :])))
                )
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(spec, tree)
