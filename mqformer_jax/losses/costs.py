"""Terms of the matching costs and losses: focal, GIoU, cross entropy and dice at sampled pixels, and projection."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mqformer_jax.arrays import Array

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss, as in RetinaNet and Mask DINO


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the terms in the matching costs and in the losses. The defaults are Mask DINO's.

    projection: weight of `projection_loss`, a loss of targets that have a box but no mask. num_points: average number
    (within about 10 %) of pixels at which a predicted mask is compared with its target (`lattice.point_weights`).
    denoising_masks: whether denoising queries have mask losses (DN "seg" in Mask DINO), or only class and box losses
    (DN "standard").
    """

    class_: float = 4.0
    mask: float = 5.0
    dice: float = 5.0
    box: float = 5.0
    giou: float = 2.0
    projection: float = 0.0
    num_points: int = 12544
    denoising_masks: bool = True

    def total(self, terms: dict[str, Array]) -> Array:
        """Return the weighted sum of the named terms."""
        return sum(value * getattr(self, "class_" if name == "class" else name) for name, value in terms.items())


def focal(logits: Float[Array, " ..."], labels: Float[Array, " ..."]) -> Float[Array, " ..."]:
    """Return the sigmoid focal loss of each element."""
    p = jax.nn.sigmoid(logits)
    cross_entropy = jax.nn.softplus(logits) - logits * labels
    miss = p * (1 - labels) + (1 - p) * labels
    return (ALPHA * labels + (1 - ALPHA) * (1 - labels)) * miss**GAMMA * cross_entropy


def class_cost(logits: Float[Array, "q p"], positive: Float[Array, "n p"]) -> Float[Array, "n q"]:
    """Return the focal cost of assigning each query to each target.

    positive: 1 if the prompt names the target, else 0. The cost for a prompt is the query's focal loss with label 1
    minus its focal loss with label 0. If several prompts name a target, the cost is the mean over these prompts. For a
    single prompt, it equals Mask DINO's cost.
    """
    p = jax.nn.sigmoid(logits)
    yes = ALPHA * (1 - p) ** GAMMA * -jnp.log(p + 1e-8)
    no = (1 - ALPHA) * p**GAMMA * -jnp.log(1 - p + 1e-8)
    share = positive / jnp.maximum(positive.sum(-1, keepdims=True), 1)
    return share @ (yes - no).T


def corners(boxes: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """Convert boxes from cx, cy, w, h to x0, y0, x1, y1."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([center - half, center + half], -1)


def giou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, " ..."]:
    """Return the generalized IoU of the boxes a and b (x0, y0, x1, y1), whose shapes broadcast.

    1e-6 is added to the areas that are denominators (union and enclosing box), as in Mask DINO.
    """
    area = lambda box: jnp.prod(box[..., 2:] - box[..., :2], -1)
    between = lambda low, high: jnp.prod(jnp.maximum(high - low, 0), -1)
    inter = between(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    union = area(a) + area(b) - inter
    hull = between(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def mask_costs(
    logits: Float[Array, "q k"], masks: Float[Array, "n k"], weight: Float[Array, " k"]
) -> tuple[Float[Array, "n q"], Float[Array, "n q"]]:
    """Return the cross entropy and the dice loss of each (target, query) pair, at k pixels that all pairs share.

    logits: mask logits of the queries. masks: target masks, 0 or 1. weight: weight of each pixel; 0 excludes it. The
    cross entropy is the weighted mean over pixels.
    """
    known = masks * weight
    entropy = (jax.nn.softplus(logits) @ weight)[None] - known @ logits.T
    p = jax.nn.sigmoid(logits)
    overlap = 2 * known @ p.T
    dice = 1 - (overlap + 1) / ((p @ weight)[None] + known.sum(-1)[:, None] + 1)
    return entropy / jnp.maximum(weight.sum(), 1), dice


def entropy_and_dice(
    logits: Float[Array, "*n k"], masks: Float[Array, "*n k"], weight: Float[Array, "*n k"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Return the cross entropy and the dice loss of each matched pair, at k pixels.

    logits: mask logits of the pair's query. masks: mask of the pair's target, 0 or 1. weight: weight of each pixel; 0
    excludes it. The cross entropy is the weighted mean over pixels.
    """
    entropy = (jax.nn.softplus(logits) - logits * masks) * weight
    p = jax.nn.sigmoid(logits) * weight
    known = masks * weight
    dice = 1 - (2 * (p * known).sum(-1) + 1) / (p.sum(-1) + known.sum(-1) + 1)
    return entropy.sum(-1) / jnp.maximum(weight.sum(-1), 1), dice


def projection_loss(logits: Float[Array, "*n h w"], boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Return a loss that compares a predicted mask with a box (BoxInst, sec. 3.1; also used by DaTaSeg).

    It is the sum of two dice losses, of the projections of mask and box onto the x and onto the y axis. The projection
    of a mask is its maximum over each column or row. If the box covers a column or row partly, its projection there is
    the covered fraction.

    logits: mask logits. boxes: x0, y0, x1, y1 as fractions of the canvas.
    """
    p = jax.nn.sigmoid(logits)

    def along(shadow: Float[Array, "*n k"], low: Float[Array, "*n"], high: Float[Array, "*n"]) -> Float[Array, "*n"]:
        k = shadow.shape[-1]
        cells = jnp.arange(k, dtype=jnp.float32)
        wanted = jnp.clip(jnp.minimum(high[..., None] * k, cells + 1) - jnp.maximum(low[..., None] * k, cells), 0, 1)
        return 1 - 2 * (shadow * wanted).sum(-1) / ((shadow**2).sum(-1) + (wanted**2).sum(-1) + 1e-5)

    return along(p.max(-2), boxes[..., 0], boxes[..., 2]) + along(p.max(-1), boxes[..., 1], boxes[..., 3])
