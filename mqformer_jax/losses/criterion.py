"""The loss over matched pairs of queries and targets (paper sec. 3.3) and over denoising queries.

A query has one class label for each prompt. It is positive if the query is matched to a target that the prompt names.
Otherwise it is negative if all objects of the prompt in the image are labeled, or if the query's target is known to be
something else (`Batch.negative`). In all other cases, and for an unmatched query in an ignored area, the label is
unknown and has no loss. A target without a mask has no mask cost, and no mask loss except `projection_loss`. Ignored
pixels are excluded.
"""

from __future__ import annotations

import functools
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from mqformer_jax.arrays import Array
from mqformer_jax.input.batch import Batch
from mqformer_jax.losses import costs, lattice
from mqformer_jax.losses.assignment import Pairs, match_queries
from mqformer_jax.losses.costs import LossWeights
from mqformer_jax.losses.denoising import DenoisingTargets
from mqformer_jax.losses.targets import ImageTargets
from mqformer_jax.models.mqformer import Outputs, Predictions

MASK_TERMS = ("mask", "dice", "projection")
Terms = dict[str, Float[Array, " s"]]  # the loss terms of one image by name, each with one value per stage


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Normalizers:
    """Denominators of the losses: the numbers of targets and denoising queries in the global batch of all devices.

    Both numbers are at least 1, so that a batch without targets causes no division by zero.
    """

    targets: Int[Array, ""]
    denoising: Int[Array, ""]

    @classmethod
    def of(cls, batch: Batch, denoising: DenoisingTargets | None) -> Normalizers:
        """Return the numbers of targets and denoising queries of a global batch."""
        total = lambda x: jnp.maximum(x.sum(), 1)
        return cls(total(batch.num_targets), total(batch.num_targets if denoising is None else denoising.queries.valid))


def image_keys(key: Array, images: int) -> Key[Array, "b 3"]:
    """Return three random keys per image, to draw pixels for the matching costs, losses and denoising losses."""
    return jnp.stack([jax.random.split(k, images) for k in jax.random.split(key, 3)], 1)


def criterion(
    keys: Key[Array, "b 3"],
    outputs: Outputs,
    batch: Batch,
    denoising: DenoisingTargets | None,
    normalizers: Normalizers,
    weights: LossWeights,
) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
    """Return the loss of a part of the global batch, the part's metrics, and the metrics of each image.

    keys: the part's rows of `image_keys`. normalizers: those of the global batch, so that the losses and metrics of the
    parts sum to those of the global batch.

    The loss is the sum over all terms and stages. The metrics of the part are the terms of the last stage, the loss of
    the denoising queries ("denoising", if there are any), the total loss ("total") and the table of
    `taken_by_learnable` ("taken"). The metric of an image is its loss without denoising queries, divided by the image's
    number of targets ("per_image").
    """
    targets = ImageTargets.of_batch(batch)
    is_region = ~jnp.any(batch.positive & ~batch.is_region[:, None], -1)  # targets that only region prompts name
    pairs = match_queries(keys[:, 0], outputs, targets, is_region, weights)
    terms = batch_losses(keys[:, 1], outputs.matching, outputs.mask_features, targets, pairs, weights)
    loss = weights.total(jax.tree.map(jnp.sum, terms)) / normalizers.targets
    metrics = {name: value[:, -1].sum() / normalizers.targets for name, value in terms.items()}

    if denoising is not None:
        copies = denoising_pairs(denoising, outputs.denoising.boxes.shape[0])
        restored = batch_losses(keys[:, 2], outputs.denoising, outputs.mask_features, targets, copies, weights)
        if not weights.denoising_masks:
            restored = {name: v for name, v in restored.items() if name not in MASK_TERMS}
        metrics["denoising"] = weights.total(jax.tree.map(jnp.sum, restored)) / normalizers.denoising
        loss = loss + metrics["denoising"]

    per_image = weights.total({name: value.sum(1) for name, value in terms.items()}) / jnp.maximum(batch.num_targets, 1)
    metrics |= {"total": loss, "taken": taken_by_learnable(pairs, targets, is_region, outputs.num_learnable)}
    return loss, (metrics, {"per_image": per_image})


def denoising_pairs(denoising: DenoisingTargets, stages: int) -> Pairs:
    """Return each denoising query and its target as a pair, the same pairs at each of `stages` prediction stages.

    Stages are the predictions from the initial queries and after each decoder layer. The returned arrays have a leading
    axis b.
    """
    per_stage = lambda x: jnp.broadcast_to(x[:, None], (len(x), stages, *x.shape[1:]))
    target, valid = denoising.target, per_stage(denoising.queries.valid)
    query = jnp.broadcast_to(jnp.arange(target.shape[1]), target.shape)
    return Pairs(per_stage(query), per_stage(target), valid, valid)


def taken_by_learnable(
    pairs: Pairs, targets: ImageTargets, is_region: Bool[Array, "b n"], num_learnable: int
) -> Int[Array, "2 2"]:
    """Count the targets that are matched to learnable queries at the last stage.

    is_region: whether each target is a region rather than an instance. Returns a table with one row for instances and
    one for regions. Its columns are the number of targets matched to learnable queries, and the number of all targets.
    """
    real = jnp.arange(is_region.shape[1]) < targets.num_targets[:, None]
    kinds = jnp.stack([real & ~is_region, real & is_region])
    learnable = (pairs.query[:, -1] < num_learnable) & pairs.valid[:, -1]
    return jnp.stack([(kinds & learnable).sum((1, 2)), kinds.sum((1, 2))], -1)


def batch_losses(
    keys: Key[Array, " b"],
    predictions: Predictions,
    features: Float[Array, "b h w d"],
    targets: ImageTargets,
    pairs: Pairs,
    weights: LossWeights,
) -> dict[str, Float[Array, "b s"]]:
    """Return the terms of `image_losses` for every image. targets, pairs: with a leading axis b."""

    one_image = functools.partial(image_losses, weights=weights)
    return jax.vmap(one_image, in_axes=(0, 1, 0, 0, 0))(keys, predictions, features, targets, pairs)


def image_losses(
    key: Key[Array, ""],
    predictions: Predictions,
    features: Float[Array, "h w d"],
    targets: ImageTargets,
    pairs: Pairs,
    weights: LossWeights,
) -> Terms:
    """Return the loss terms of one image at each stage, before they are weighted.

    The class term is a sum over queries and prompts, all other terms are sums over pairs. features: the mask features.
    """
    return {
        "class": class_loss(predictions.class_logits, targets, pairs),
        **mask_losses(key, predictions.mask_embed, features, targets, pairs, weights),
        **box_losses(predictions.boxes, targets, pairs),
    }


def class_loss(class_logits: Float[Array, "s q p"], targets: ImageTargets, pairs: Pairs) -> Float[Array, " s"]:
    """Return the focal loss at each stage: the sum over all (query, prompt) combinations whose label is known.

    The module's docstring explains which labels are positive, negative and unknown.
    """
    stages, valid = jnp.arange(pairs.query.shape[0])[:, None], pairs.valid[..., None]
    of_queries = lambda empty, values: empty.at[stages, pairs.query].max(values)  # scatter from pairs to queries
    nothing = jnp.zeros(class_logits.shape, bool)
    labels = of_queries(nothing, targets.positive[pairs.target] & valid)
    negative = of_queries(nothing, targets.negative[pairs.target] & valid)
    matched = of_queries(jnp.zeros(pairs.supervise_absent.shape, bool), pairs.valid)
    known = labels | negative | (targets.exhaustive & (matched | pairs.supervise_absent)[..., None])
    return jnp.where(known, costs.focal(class_logits, labels.astype(jnp.float32)), 0.0).sum((1, 2))


def box_losses(boxes: Float[Array, "s q 4"], targets: ImageTargets, pairs: Pairs) -> Terms:
    """Return the L1 and GIoU losses of the boxes at each stage, summed over pairs."""
    boxes, wanted = _of_pairs(boxes, pairs), targets.boxes[pairs.target]
    giou = costs.giou(costs.corners(boxes), costs.corners(wanted))
    return {
        "box": (jnp.abs(boxes - wanted).sum(-1) * pairs.valid).sum(1),
        "giou": ((1 - giou) * pairs.valid).sum(1),
    }


def mask_losses(
    key: Key[Array, ""],
    mask_embed: Float[Array, "s q d"],
    features: Float[Array, "h w d"],
    targets: ImageTargets,
    pairs: Pairs,
    weights: LossWeights,
) -> Terms:
    """Return the mask losses at each stage, summed over pairs.

    Targets with a mask have a cross entropy and a dice loss. Targets without a mask have a projection loss, which is
    left out if its weight is 0. Stages are computed one by one, and again in the backward pass, because the mask logits
    of all stages would need gigabytes.
    """
    drawn = lattice.draw_pixels(key, targets.inside, weights.num_points)
    on_lattice = targets.on_lattice(features).astype(mask_embed.dtype)

    @jax.checkpoint
    def stage(inputs: tuple[Float[Array, "r d"], Int[Array, " r"], Bool[Array, " r"]]) -> dict[str, Float[Array, ""]]:
        embed, target, valid = inputs
        product = functools.partial(jnp.einsum, "rd,hwd->rhw", embed, preferred_element_type=jnp.float32)
        logits = product(on_lattice)
        weight = lattice.point_weights(drawn, jax.lax.stop_gradient(logits))
        pixels = lambda x: x.reshape(*target.shape, -1)
        masks = targets.masks[target].astype(jnp.float32)
        entropy, dice = costs.entropy_and_dice(pixels(logits), pixels(masks), pixels(weight * targets.known))
        with_mask = valid & targets.has_mask[target]
        terms = {"mask": (entropy * with_mask).sum(), "dice": (dice * with_mask).sum()}
        if weights.projection > 0:
            cells = targets.centers_inside(features.shape[:2])
            inside = jnp.where(cells, product(features.astype(embed.dtype)), -jnp.inf)
            projection = costs.projection_loss(inside, costs.corners(targets.boxes[target]))
            terms["projection"] = (projection * (valid & ~with_mask)).sum()
        return terms

    return jax.lax.map(stage, (_of_pairs(mask_embed, pairs), pairs.target, pairs.valid))


def _of_pairs(values: Float[Array, "s q d"], pairs: Pairs) -> Float[Array, "s r d"]:
    """Return one row per pair: the row of `values` that belongs to the pair's query. values: one row per query."""
    return jnp.take_along_axis(values, pairs.query[..., None], 1)
