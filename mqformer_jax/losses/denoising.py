"""Denoising queries (DN-DETR, Mask DINO): noised copies of the targets, from which the decoder predicts the targets."""

from __future__ import annotations

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Int

from mqformer_jax.arrays import Array
from mqformer_jax.input.batch import Batch
from mqformer_jax.models.queries import DenoisingQueries


@no_type_check  # see `Batch`
@flax.struct.dataclass
class DenoisingTargets:
    """Denoising queries, and for each query the index of the target of which it is a noised copy."""

    queries: DenoisingQueries
    target: Int[Array, "b d"]


def noise_targets(
    key: Array, batch: Batch, num_queries: int, label_noise: float = 0.2, box_noise: float = 0.4
) -> DenoisingTargets:
    """Return `num_queries` denoising queries per image: noised copies of the image's targets, then padding.

    A group has one copy of each target. An image gets as many complete groups as fit, or one truncated group if it has
    more targets than `num_queries`. (In Mask DINO, all images get as many groups as the image with the most targets.)

    The prompt of a copy is a random prompt of the target or, with probability `label_noise`, a random prompt of the
    image. The center of its box moves by up to `box_noise` / 2 times the box's width and height. The width and height
    change by up to `box_noise` times themselves.
    """
    label_key, other_key, flip_key, box_key = jax.random.split(key, 4)
    count = batch.num_targets[:, None]
    index = jnp.arange(num_queries)[None]
    target = index % jnp.maximum(count, 1)
    groups = jnp.maximum(num_queries // jnp.maximum(count, 1), 1)
    valid = index < jnp.minimum(groups * count, num_queries)

    own = jnp.take_along_axis(batch.positive, target[..., None], 1)
    draw = lambda k, allowed: jnp.argmax(jnp.where(allowed, jax.random.uniform(k, own.shape), -1.0), -1)
    other = draw(other_key, jnp.broadcast_to(batch.prompt_valid[:, None], own.shape))
    prompt = jnp.where(jax.random.uniform(flip_key, target.shape) < label_noise, other, draw(label_key, own))

    boxes = jnp.take_along_axis(batch.boxes, target[..., None], 1)
    reach = jnp.concatenate([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
    boxes = jnp.clip(boxes + jax.random.uniform(box_key, boxes.shape, minval=-1.0) * reach * box_noise, 0, 1)
    queries = DenoisingQueries(prompt, boxes, index // jnp.maximum(count, 1), valid)
    return DenoisingTargets(queries, target)
