"""Denoising queries (DN-DETR, Mask DINO): noised copies of the targets that the decoder must restore."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Int

from mqformer_jax.arrays import Array
from mqformer_jax.input.batch import Batch
from mqformer_jax.models.queries import Noised


def noise_targets(
    key: Array, batch: Batch, slots: int, flip: float = 0.2, jitter: float = 0.4
) -> tuple[Noised, Int[Array, "b d"]]:
    """Fill `slots` queries an image with noised copies of its targets; also the target each slot copies.

    As many whole groups of all targets as fit (at least one, cut where the targets outnumber the slots); the count is
    an image's own where Mask DINO takes the batch's largest. A copy claims one of its target's prompts, with chance
    `flip` any other prompt of the image instead; its centre moves by up to `jitter` half sizes, its size by `jitter` of
    itself.
    """
    label_key, other_key, flip_key, box_key = jax.random.split(key, 4)
    count = batch.num_targets[:, None]
    slot = jnp.arange(slots)[None]
    target = slot % jnp.maximum(count, 1)
    groups = jnp.maximum(slots // jnp.maximum(count, 1), 1)
    valid = slot < jnp.minimum(groups * count, slots)

    own = jnp.take_along_axis(batch.positive, target[..., None], 1)
    draw = lambda k, allowed: jnp.argmax(jnp.where(allowed, jax.random.uniform(k, own.shape), -1.0), -1)
    other = draw(other_key, jnp.broadcast_to(batch.prompt_valid[:, None], own.shape))
    prompt = jnp.where(jax.random.uniform(flip_key, target.shape) < flip, other, draw(label_key, own))

    boxes = jnp.take_along_axis(batch.boxes, target[..., None], 1)
    reach = jnp.concatenate([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
    boxes = jnp.clip(boxes + jax.random.uniform(box_key, boxes.shape, minval=-1.0) * reach * jitter, 0, 1)
    return Noised(prompt, boxes, slot // jnp.maximum(count, 1), valid), target
