"""The terms that costs and losses share: focal, L1 and GIoU, point-wise cross entropy and dice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mqformer_jax.arrays import Array

ALPHA, GAMMA = 0.25, 2.0  # RetinaNet's, and Mask DINO's


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the terms, in costs and losses alike; the defaults are Mask DINO's.

    projection: of a loss for targets without a mask (`projection_loss`). num_points: at which masks are compared.
    denoising_masks: whether denoising queries learn masks too (Mask DINO's "seg"), or only classes and boxes
    ("standard").
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
        """Return the weighted sum of terms by their names."""
        return sum(value * getattr(self, "class_" if name == "class" else name) for name, value in terms.items())


def focal(logits: Float[Array, " ..."], labels: Float[Array, " ..."]) -> Float[Array, " ..."]:
    """Sigmoid focal loss, element by element."""
    p = jax.nn.sigmoid(logits)
    cross_entropy = jax.nn.softplus(logits) - logits * labels
    miss = p * (1 - labels) + (1 - p) * labels
    return (ALPHA * labels + (1 - ALPHA) * (1 - labels)) * miss**GAMMA * cross_entropy


def class_cost(logits: Float[Array, "q p"], positive: Float[Array, "n p"]) -> Float[Array, "n q"]:
    """Focal cost of naming a target by its prompts: what the label "yes" costs less what "no" would; the mean where
    several prompts name it (with one, Mask DINO's)."""
    p = jax.nn.sigmoid(logits)
    yes = ALPHA * (1 - p) ** GAMMA * -jnp.log(p + 1e-8)
    no = (1 - ALPHA) * p**GAMMA * -jnp.log(1 - p + 1e-8)
    share = positive / jnp.maximum(positive.sum(-1, keepdims=True), 1)
    return share @ (yes - no).T


def corners(boxes: Float[Array, "... 4"]) -> Float[Array, "... 4"]:
    """cx, cy, w, h to x0, y0, x1, y1."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([center - half, center + half], -1)


def giou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, " ..."]:
    """Generalized IoU of x0, y0, x1, y1 boxes that broadcast together; 1e-6 on both denominators (Mask DINO)."""
    area = lambda box: jnp.prod(box[..., 2:] - box[..., :2], -1)
    between = lambda low, high: jnp.prod(jnp.maximum(high - low, 0), -1)
    inter = between(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    union = area(a) + area(b) - inter
    hull = between(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def mask_costs(
    logits: Float[Array, "q k"], masks: Float[Array, "n k"], weight: Float[Array, " k"]
) -> tuple[Float[Array, "n q"], Float[Array, "n q"]]:
    """Cross entropy and dice of every query against every target at k shared points; `weight` 0 leaves a point out."""
    known = masks * weight
    entropy = (jax.nn.softplus(logits) @ weight)[None] - known @ logits.T
    p = jax.nn.sigmoid(logits)
    overlap = 2 * known @ p.T
    dice = 1 - (overlap + 1) / ((p @ weight)[None] + known.sum(-1)[:, None] + 1)
    return entropy / jnp.maximum(weight.sum(), 1), dice


def mask_losses(
    logits: Float[Array, "*n k"], masks: Float[Array, "*n k"], weight: Float[Array, "*n k"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Cross entropy (mean over points) and dice of matched pairs, each at its own k points."""
    entropy = (jax.nn.softplus(logits) - logits * masks) * weight
    p = jax.nn.sigmoid(logits) * weight
    known = masks * weight
    dice = 1 - (2 * (p * known).sum(-1) + 1) / (p.sum(-1) + known.sum(-1) + 1)
    return entropy.sum(-1) / jnp.maximum(weight.sum(-1), 1), dice


def projection_loss(logits: Float[Array, "*n h w"], boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """How far masks are from filling their boxes (x0, y0, x1, y1, fractions of the canvas) from side to side and from
    top to bottom.

    What a box says of a mask, and all that it says: the mask's shadow on either axis is the box's. Dice of both
    shadows, as BoxInst (sec. 3.1) has it and DaTaSeg takes it; a row or column that the box covers in part is wanted in
    part.
    """
    p = jax.nn.sigmoid(logits)

    def along(shadow: Float[Array, "*n k"], low: Float[Array, "*n"], high: Float[Array, "*n"]) -> Float[Array, "*n"]:
        k = shadow.shape[-1]
        cells = jnp.arange(k, dtype=jnp.float32)
        wanted = jnp.clip(jnp.minimum(high[..., None] * k, cells + 1) - jnp.maximum(low[..., None] * k, cells), 0, 1)
        return 1 - 2 * (shadow * wanted).sum(-1) / ((shadow**2).sum(-1) + (wanted**2).sum(-1) + 1e-5)

    return along(p.max(-2), boxes[..., 0], boxes[..., 2]) + along(p.max(-1), boxes[..., 1], boxes[..., 3])
