"""The terms of matching costs and losses: focal, GIoU, point-wise cross entropy and dice, projection."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mqformer_jax.arrays import Array

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss, as in RetinaNet and Mask DINO


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the terms, for both matching costs and losses. The defaults are Mask DINO's.

    projection: weight of the loss of targets without a mask (`projection_loss`). num_points: average number of pixels
    at which masks are compared (`lattice.point_weights`). denoising_masks: whether denoising queries have mask losses
    (Mask DINO's "seg"), or only class and box losses ("standard").
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

    The cost of a prompt is its focal loss with label 1 minus its focal loss with label 0. If several prompts name a
    target, the cost is the mean over them. With one prompt, it is Mask DINO's cost.
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
    """Return the generalized IoU of boxes (x0, y0, x1, y1) that broadcast together.

    1e-6 is added to both denominators, as in Mask DINO.
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
    """Return the cross entropy (mean over pixels) and dice loss of every query and target, at k shared pixels.

    weight: of each pixel; 0 excludes a pixel.
    """
    known = masks * weight
    entropy = (jax.nn.softplus(logits) @ weight)[None] - known @ logits.T
    p = jax.nn.sigmoid(logits)
    overlap = 2 * known @ p.T
    dice = 1 - (overlap + 1) / ((p @ weight)[None] + known.sum(-1)[:, None] + 1)
    return entropy / jnp.maximum(weight.sum(), 1), dice


def mask_losses(
    logits: Float[Array, "*n k"], masks: Float[Array, "*n k"], weight: Float[Array, "*n k"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Return the cross entropy (mean over pixels) and dice loss of matched pairs at k pixels.

    weight: of each pixel; 0 excludes a pixel.
    """
    entropy = (jax.nn.softplus(logits) - logits * masks) * weight
    p = jax.nn.sigmoid(logits) * weight
    known = masks * weight
    dice = 1 - (2 * (p * known).sum(-1) + 1) / (p.sum(-1) + known.sum(-1) + 1)
    return entropy.sum(-1) / jnp.maximum(weight.sum(-1), 1), dice


def projection_loss(logits: Float[Array, "*n h w"], boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Return the sum of two dice losses, which compare the projections of a mask and its box onto the x and y axes.

    A box determines the projections of its mask and nothing else (BoxInst, sec. 3.1; also used by DaTaSeg). If the
    box covers a row or column partly, the target there is the covered fraction.

    boxes: x0, y0, x1, y1 as fractions of the canvas.
    """
    p = jax.nn.sigmoid(logits)

    def along(shadow: Float[Array, "*n k"], low: Float[Array, "*n"], high: Float[Array, "*n"]) -> Float[Array, "*n"]:
        k = shadow.shape[-1]
        cells = jnp.arange(k, dtype=jnp.float32)
        wanted = jnp.clip(jnp.minimum(high[..., None] * k, cells + 1) - jnp.maximum(low[..., None] * k, cells), 0, 1)
        return 1 - 2 * (shadow * wanted).sum(-1) / ((shadow**2).sum(-1) + (wanted**2).sum(-1) + 1e-5)

    return along(p.max(-2), boxes[..., 0], boxes[..., 2]) + along(p.max(-1), boxes[..., 1], boxes[..., 3])
