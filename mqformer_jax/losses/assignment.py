"""Assign queries to targets: at each stage, one Hungarian matching over learnable and conditional queries together.

See sec. 3.3 of the paper.
"""

from __future__ import annotations

import functools
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from mqformer_jax.arrays import Array
from mqformer_jax.losses import costs, lattice
from mqformer_jax.losses.costs import LossWeights
from mqformer_jax.losses.matcher import INVALID_COST, match
from mqformer_jax.losses.targets import ImageTargets
from mqformer_jax.models.mqformer import Outputs, Predictions


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Pairs:
    """The matched (query, target) pairs of one image: r pairs at each of s stages.

    query, target: indices. valid: False for pairs that are padding. supervise_absent: for each query, whether it is a
    negative example for all exhaustive prompts if it is unmatched. (All objects of an exhaustive prompt are labeled in
    the image.) If False, the query has no loss if it is unmatched.
    """

    query: Int[Array, "s r"]
    target: Int[Array, "s r"]
    valid: Bool[Array, "s r"]
    supervise_absent: Bool[Array, "s q"]


def match_queries(
    keys: Key[Array, " b"],
    outputs: Outputs,
    targets: ImageTargets,
    is_region: Bool[Array, "b n"],
    weights: LossWeights,
) -> Pairs:
    """Return the (query, target) pairs with the least total cost, at every stage of every image.

    keys: one random key per image, to draw the pixels at which masks are compared. targets: with a leading axis b.
    is_region: whether only region prompts (see `Prompt`) name the target. The returned arrays have a leading axis b.
    """
    predictions, features = jax.lax.stop_gradient((outputs.matching, outputs.mask_features))
    samples = jax.vmap(functools.partial(shared_samples, num_points=weights.num_points))(keys, features, targets)
    cost, in_ignored_area = jax.vmap(matching_costs, in_axes=(0, 1, 0, None))(samples, predictions, targets, weights)
    if outputs.decoupled:
        cost = jnp.where(_of_the_other_kind(is_region, outputs)[:, None], INVALID_COST, cost)
    assigned = jax.vmap(jax.vmap(match, in_axes=(0, None)))(cost, targets.num_targets)

    query, rows = jnp.maximum(assigned, 0), jnp.arange(assigned.shape[-1])
    valid = jnp.broadcast_to((rows < targets.num_targets[:, None])[:, None], assigned.shape)
    if outputs.decoupled:  # if there are too few queries of a kind, some of its targets stay unmatched
        valid &= jnp.take_along_axis(cost, query[..., None], -1)[..., 0] < INVALID_COST
    return Pairs(query, jnp.broadcast_to(rows, assigned.shape), valid, ~in_ignored_area)


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Samples:
    """The k pixels of one image at which the matching compares all masks.

    features: the mask features at these pixels. masks: the masks of the n targets, 0 or 1. known: 1 for labeled pixels.
    ignored: 1 for unlabeled pixels of the image. Padding has 0 in `known` and in `ignored`.
    """

    features: Float[Array, "k d"]
    masks: Float[Array, "n k"]
    known: Float[Array, " k"]
    ignored: Float[Array, " k"]


def shared_samples(
    key: Key[Array, ""], features: Float[Array, "h w d"], targets: ImageTargets, num_points: int
) -> Samples:
    """Return the samples at about `num_points` pixels of an image's lattice (see losses/lattice.py).

    They are every k-th row and column from a random start. k is 1 if the lattice has only about `num_points` pixels.
    """
    step = lattice.step_of(targets.known.shape, num_points)
    start = jax.random.randint(key, (2,), 0, step)
    pixels = lambda x: lattice.every(x, step, start, x.ndim - 2).astype(jnp.float32).reshape(*x.shape[:-2], -1)
    sampled = lattice.every(targets.on_lattice(features), step, start, 0)
    return Samples(
        sampled.reshape(-1, features.shape[-1]),
        pixels(targets.masks),
        pixels(targets.known),
        pixels(targets.inside & ~targets.known),
    )


def matching_costs(
    samples: Samples,
    predictions: Predictions,
    targets: ImageTargets,
    weights: LossWeights,
) -> tuple[Float[Array, "s n q"], Bool[Array, "s q"]]:
    """Return the costs of all (target, query) pairs of one image, and which queries lie mostly in an ignored area.

    A query whose mask lies mostly in an ignored area may have found an unlabeled object (in a crowd or a void area).
    It is therefore not a negative example for any prompt. The masks of the queries are computed at the `samples` only,
    as products of the mask embeddings and the sampled features.
    """

    def stage(p: Predictions) -> tuple[Float[Array, "n q"], Bool[Array, " q"]]:
        logits = jnp.einsum(
            "qd,kd->qk", p.mask_embed, samples.features.astype(p.mask_embed.dtype), preferred_element_type=jnp.float32
        )
        entropy, dice = costs.mask_costs(logits, samples.masks, samples.known)
        terms = {
            "class": costs.class_cost(p.class_logits, targets.positive.astype(jnp.float32)),
            "mask": jnp.where(targets.has_mask[:, None], entropy, 0.0),
            "dice": jnp.where(targets.has_mask[:, None], dice, 0.0),
            "box": jnp.abs(targets.boxes[:, None] - p.boxes[None]).sum(-1),
            "giou": -costs.giou(costs.corners(targets.boxes)[:, None], costs.corners(p.boxes)[None]),
        }
        p_mask = jax.nn.sigmoid(logits)
        return weights.total(terms), p_mask @ samples.ignored > 0.5 * p_mask @ (samples.known + samples.ignored)

    return jax.vmap(stage)(predictions)


def _of_the_other_kind(is_region: Bool[Array, "b n"], outputs: Outputs) -> Bool[Array, "b n q"]:
    """Return which (target, query) pairs OpenSeeD's hard split forbids.

    The split matches regions only to learnable queries, and instances only to conditional queries. is_region: whether
    the target is a region.
    """
    learnable = jnp.arange(outputs.matching.boxes.shape[2]) < outputs.num_learnable
    return is_region[..., None] != learnable
