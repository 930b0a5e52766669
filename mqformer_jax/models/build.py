"""Build a model from a config, as plain pytrees."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.models.mqformer import MQFormer


def build_model(config: ConfigDict, seed: Array | int = 0) -> tuple[nnx.GraphDef, Any, Any]:
    """Return a fresh model as (graph, trainable parameters, frozen constants); both trees are nested dicts.

    config: `config.model`.
    """
    graph, params, frozen = nnx.split(MQFormer(config, rngs=nnx.Rngs(seed)), nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


def abstract_model(config: ConfigDict) -> tuple[nnx.GraphDef, Any, Any]:
    """Return the same as `build_model`, with the shape and dtype of each array instead of its values."""
    return jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))
