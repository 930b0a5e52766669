"""A model from a config, as plain pytrees."""

from __future__ import annotations

from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.models.mqformer import MQFormer


def build_model(config: ConfigDict, seed: Array | int = 0) -> tuple[nnx.GraphDef, Any, Any]:
    """The model as (graph, trained parameters, frozen constants); plain pytrees from here on."""
    graph, params, frozen = nnx.split(MQFormer(config.model, rngs=nnx.Rngs(seed)), nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)
