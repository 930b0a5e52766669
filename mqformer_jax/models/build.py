"""Build a model from a config, as a graph and plain trees of arrays."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.models.mqformer import MQFormer


def build_model(config: ConfigDict, seed: Array | int = 0) -> tuple[nnx.GraphDef, Any, Any]:
    """Return a newly initialized model as (graph, trainable parameters, frozen constants).

    The parameters and the constants (the values of frozen BatchNorms) are nested dicts of arrays.
    `nnx.merge(graph, parameters, constants)` returns the model. config: `config.model`. seed: an integer or a key.
    """
    graph, params, frozen = nnx.split(MQFormer(config, rngs=nnx.Rngs(seed)), nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


def abstract_model(config: ConfigDict) -> tuple[nnx.GraphDef, Any, Any]:
    """Return the same as `build_model`, with the shape and dtype of each array instead of its values."""
    return jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))
