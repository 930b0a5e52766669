"""One Hungarian matching over both kinds of query at every stage, and one loss over what it pairs (paper sec. 3.3).

What a loss may assume is explicit in the Batch: a (query, prompt) pair is taught where the query was matched to a
target that the prompt names, where all that the prompt names in this image is labelled, or where the target is known to
be none of it (`Batch.negative`); nothing else is. A target without a mask has no mask cost and no mask loss. Pixels
where nothing is known count nowhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from mqformer_jax.arrays import Array
from mqformer_jax.input.batch import Batch
from mqformer_jax.losses import costs
from mqformer_jax.losses.matcher import UNUSABLE, match
from mqformer_jax.losses.points import sample_bits, sample_features, sample_maps, uncertain_points
from mqformer_jax.models.mqformer import Outputs, Predictions
from mqformer_jax.models.queries import Noised

TERMS = ("class", "mask", "dice", "box", "giou")  # and "projection", where it has a weight
Copies = tuple[Noised, Int[Array, "b d"]]  # denoising queries, and the target each is a copy of


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of the five terms, in costs and loss alike, and the points a mask is compared at (Mask DINO's values).

    projection: of a sixth, in the loss only, for targets without a mask (`costs.projection_loss`).
    """

    class_: float = 4.0
    mask: float = 5.0
    dice: float = 5.0
    box: float = 5.0
    giou: float = 2.0
    projection: float = 0.0
    points: int = 12544
    noised_masks: bool = (
        True  # denoising queries restore masks too (Mask DINO's "seg"), or classes and boxes alone ("standard")
    )

    def total(self, terms: dict[str, Array]) -> Array:
        return sum(value * getattr(self, "class_" if name == "class" else name) for name, value in terms.items())


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Pairs:
    """r pairs of a query and a target at s stages of one image, and which queries may be taught what is absent.

    Rows that are not `valid` are padding. A query that is neither in a valid pair nor in `teach` enters no loss.
    """

    query: Int[Array, "s r"]
    target: Int[Array, "s r"]
    valid: Bool[Array, "s r"]
    teach: Bool[Array, "s q"]


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Counts:
    """What losses are divided by, as in the originals: targets, and noised copies, in the whole global batch of all
    devices.

    At least one each, so that an empty batch divides by something.
    """

    targets: Int[Array, ""]
    copies: Int[Array, ""]

    @classmethod
    def of(cls, batch: Batch, copies: Copies | None) -> Counts:
        total = lambda x: jnp.maximum(x.sum(), 1)
        return cls(total(batch.num_targets), total(batch.num_targets if copies is None else copies[0].valid))


def image_keys(key: Array, images: int) -> Key[Array, "b 3"]:
    """Keys for the points of each image: those of the costs, of the losses, of the denoising losses."""
    return jnp.stack([jax.random.split(k, images) for k in jax.random.split(key, 3)], 1)


def criterion(
    keys: Key[Array, "b 3"], outputs: Outputs, batch: Batch, copies: Copies | None, counts: Counts, weights: Weights
) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
    """The loss of some images of a global batch, and metrics of the whole and by image.

    keys: `image_keys` of the global batch, these images' rows. copies: what the denoising queries are and which target
        each copies
    (`noise_targets`). counts: of the global batch, so that the losses (and the metrics) of its parts sum to its own.

    Terms are summed over stages. Metrics that sum over the parts: the terms of the last layer, the whole loss; targets
    that learnable queries took, and all targets, for [instances, regions] (`taken` [2, 2]). By image: the loss by its
    own number of targets (`per_image`).
    """
    b, n = batch.boxes.shape[:2]
    stages = outputs.matching.boxes.shape[0]
    per_stage = lambda x: jnp.broadcast_to(x[:, None], (b, stages, *x.shape[1:]))
    draw = lambda k: functools.partial(uncertain_points, k, k=weights.points)
    losses = jax.vmap(lambda k, *image: _losses(draw(k), *image, weights.projection > 0), in_axes=(0, 1, 0, 0, 0))

    points = jax.vmap(lambda k, image: jax.random.uniform(k, (weights.points, 2)) * _extent(image))(keys[:, 0], batch)
    total, excused = jax.vmap(_matching_costs, in_axes=(0, 1, 0, 0, None))(
        points, jax.lax.stop_gradient(outputs.matching), jax.lax.stop_gradient(outputs.mask_features), batch, weights
    )
    region = ~jnp.any(batch.positive & ~batch.prompt_region[:, None], -1)  # no class of several segments names it
    if outputs.decoupled:
        total = jnp.where(_of_the_other_kind(region, outputs)[:, None], UNUSABLE, total)
    assigned = jax.vmap(jax.vmap(match, in_axes=(0, None)))(total, batch.num_targets)
    real = jnp.arange(n) < batch.num_targets[:, None]
    query, taken_by_a_query = jnp.maximum(assigned, 0), per_stage(real)
    if outputs.decoupled:  # where a kind has too few queries, targets go without
        taken_by_a_query &= jnp.take_along_axis(total, query[..., None], -1)[..., 0] < UNUSABLE
    pairs = Pairs(query, jnp.broadcast_to(jnp.arange(n), assigned.shape), taken_by_a_query, ~excused)
    terms = losses(keys[:, 1], outputs.matching, outputs.mask_features, batch, pairs)
    loss = weights.total(jax.tree.map(jnp.sum, terms)) / counts.targets
    metrics = {name: value[:, -1].sum() / counts.targets for name, value in terms.items()}

    if copies is not None:
        noised, target = copies
        stages = outputs.denoising.boxes.shape[0]
        slot = jnp.broadcast_to(jnp.arange(target.shape[1]), target.shape)
        copied = Pairs(per_stage(slot), per_stage(target), per_stage(noised.valid), per_stage(noised.valid))
        noise = losses(keys[:, 2], outputs.denoising, outputs.mask_features, batch, copied)
        if not weights.noised_masks:
            noise = {name: value for name, value in noise.items() if name not in ("mask", "dice", "projection")}
        metrics["denoising"] = weights.total(jax.tree.map(jnp.sum, noise)) / counts.copies
        loss = loss + metrics["denoising"]

    per_image = weights.total({name: value.sum(1) for name, value in terms.items()}) / jnp.maximum(batch.num_targets, 1)
    kinds = jnp.stack([real & ~region, real & region])
    learnable = (query[:, -1] < outputs.num_learnable) & pairs.valid[:, -1]
    taken = jnp.stack([(kinds & learnable).sum((1, 2)), kinds.sum((1, 2))], -1)
    return loss, ({**metrics, "total": loss, "taken": taken}, {"per_image": per_image})


def _of_the_other_kind(region: Bool[Array, "b n"], outputs: Outputs) -> Bool[Array, "b n q"]:
    """The pairs that OpenSeeD's hard split forbids: instances to learnable queries, regions to conditional ones."""
    learnable = jnp.arange(outputs.matching.boxes.shape[2]) < outputs.num_learnable
    return region[..., None] != learnable


def _extent(batch: Batch) -> Float[Array, " 2"]:
    """The valid part of one image's canvas as fractions (x, y)."""
    h, w = batch.image.shape[:2]
    return batch.size[::-1].astype(jnp.float32) / jnp.array([w, h], jnp.float32)


def _inside(batch: Batch, shape: tuple[int, int]) -> Bool[Array, "h w"]:
    """The cells of a map of one canvas whose centre is in the image, not in the padding."""
    x, y = ((jnp.arange(n) + 0.5) / n < extent for n, extent in zip(shape[::-1], _extent(batch)))
    return y[:, None] & x


def _unknown(batch: Batch, points: Float[Array, "*n k 2"]) -> Float[Array, "*n k"]:
    """How much of each point of one image is unlabelled; at the very edge the outermost pixel speaks for itself."""
    h, w = batch.image.shape[:2]
    margin = 0.5 / jnp.array([w, h], jnp.float32)
    everywhere = jnp.broadcast_to(jnp.array([0, 0, 0, h, w // 8]), (*points.shape[:-2], 5))
    return sample_bits(batch.ignore.reshape(-1), everywhere, (h, w), jnp.clip(points, margin, 1 - margin))


def _matching_costs(
    points: Float[Array, "k 2"],
    predictions: Predictions,
    features: Float[Array, "h w d"],
    batch: Batch,
    weights: Weights,
) -> tuple[Float[Array, "s n q"], Bool[Array, "s q"]]:
    """The cost of every pair of one image, and the queries whose mask lies mostly where nothing is known.

    Such a query may have found an unlabelled object (a crowd, a void), so its silence is not taught. All masks are read
    at the same points; a mask embedding times sampled features is the sampled mask, so no mask is ever drawn.
    """
    n = batch.boxes.shape[0]
    sampled = sample_features(features, points)
    masks = sample_bits(batch.masks, batch.windows, batch.image.shape[:2], jnp.broadcast_to(points, (n, *points.shape)))
    unknown = _unknown(batch, points)

    def stage(p: Predictions):
        logits = jnp.einsum(
            "qd,kd->qk", p.mask_embed, sampled.astype(p.mask_embed.dtype), preferred_element_type=jnp.float32
        )
        entropy, dice = costs.mask_costs(logits, masks, 1 - unknown)
        boxes, wanted = p.boxes, batch.boxes
        terms = {
            "class": costs.class_cost(p.class_logits, batch.positive.astype(jnp.float32)),
            "mask": jnp.where(batch.has_mask[:, None], entropy, 0.0),
            "dice": jnp.where(batch.has_mask[:, None], dice, 0.0),
            "box": jnp.abs(wanted[:, None] - boxes[None]).sum(-1),
            "giou": -costs.giou(costs.corners(wanted)[:, None], costs.corners(boxes)[None]),
        }
        p_mask = jax.nn.sigmoid(logits)
        return weights.total(terms), p_mask @ unknown > 0.5 * p_mask.sum(-1)

    return jax.vmap(stage)(predictions)


def _losses(
    draw: Callable,
    predictions: Predictions,
    features: Float[Array, "h w d"],
    batch: Batch,
    pairs: Pairs,
    project: bool = False,
) -> dict[str, Float[Array, " s"]]:
    """Each term of one image, summed over its pairs (the class term: over its queries and prompts), stage by stage.

    draw: mask logits [s r h w] and the image's extent to the points [s r k 2] at which masks are compared. project:
        with "projection".
    """
    valid = pairs.valid.astype(jnp.float32)
    take = lambda x: jnp.take_along_axis(x, pairs.query[..., None], 1)

    named = batch.positive[pairs.target] & pairs.valid[..., None]
    rows = jnp.arange(pairs.query.shape[0])[:, None]
    labels = jnp.zeros(predictions.class_logits.shape, bool).at[rows, pairs.query].max(named)
    matched = jnp.zeros(pairs.teach.shape, bool).at[rows, pairs.query].max(pairs.valid)
    exhaustive = batch.prompt_valid & batch.prompt_exhaustive
    denied = jnp.zeros_like(labels).at[rows, pairs.query].max(batch.negative[pairs.target] & pairs.valid[..., None])
    known = labels | denied | (exhaustive & (matched | pairs.teach)[..., None])
    class_ = jnp.where(known, costs.focal(predictions.class_logits, labels.astype(jnp.float32)), 0.0).sum((1, 2))

    boxes, wanted = take(predictions.boxes), batch.boxes[pairs.target]
    box = (jnp.abs(boxes - wanted).sum(-1) * valid).sum(1)
    giou = ((1 - costs.giou(costs.corners(boxes), costs.corners(wanted))) * valid).sum(1)

    embed = take(predictions.mask_embed)
    logits = jnp.einsum("srd,hwd->srhw", embed, features.astype(embed.dtype), preferred_element_type=jnp.float32)
    points = draw(jax.lax.stop_gradient(logits), _extent(batch))
    unknown = _unknown(batch, points)
    masks = sample_bits(batch.masks, batch.windows[pairs.target], batch.image.shape[:2], points)
    entropy, dice = costs.mask_losses(sample_maps(logits, points), masks, 1 - unknown)
    with_mask = valid * batch.has_mask[pairs.target]
    terms = {
        "class": class_,
        "mask": (entropy * with_mask).sum(1),
        "dice": (dice * with_mask).sum(1),
        "box": box,
        "giou": giou,
    }
    if project:
        drawn = jnp.where(_inside(batch, logits.shape[-2:]), logits, -jnp.inf)
        terms["projection"] = (costs.projection_loss(drawn, costs.corners(wanted)) * (valid - with_mask)).sum(1)
    return terms
