"""Options of the released Mask DINO models (Li et al., CVPR 2023), which their converted checkpoints need."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from mqformer_jax.arrays import Array
from mqformer_jax.models.heads import Heads, inverse_sigmoid
from mqformer_jax.models.pixel_decoder import Memory
from mqformer_jax.models.queries import Queries


def order_levels(memory: Memory, level_order: str) -> Memory:
    """Return the memory with its levels in the decoder's order (`config.model.level_order`).

    memory: the pixel decoder's output, with its levels from fine to coarse. Mask DINO's name for "fine_to_coarse" is
    the feature order high2low. The order determines the sizes of the proposals (`grid_proposals`) and which sampling
    offsets belong to each level.
    """
    if level_order == "fine_to_coarse":
        return memory
    cuts = np.cumsum([h * w for h, w in memory.shapes])[:-1]
    reverse = lambda x: jnp.concatenate(jnp.split(x, cuts, 1)[::-1], 1)
    return Memory(reverse(memory.tokens), memory.shapes[::-1], reverse(memory.valid))


def initial_anchors(
    proposals: Queries, mask_features: Float[Array, "b h w m"], heads: Heads, box_type: str
) -> Float[Array, "b k 4"]:
    """Return the anchors of the conditional queries (before the sigmoid), without gradients.

    box_type: `config.model.initialize_box_type`. "no" uses the proposed boxes. The other values use boxes around the
    proposed masks (see `mask_boxes`).
    """
    if box_type == "no":
        return jax.lax.stop_gradient(proposals.anchors)
    embed = heads.mask_embed(heads.norm(proposals.content))
    masks = jnp.einsum("bqd,bhwd->bqhw", embed, mask_features.astype(embed.dtype), preferred_element_type=jnp.float32)
    return jax.lax.stop_gradient(inverse_sigmoid(mask_boxes(masks > 0, inclusive=box_type == "mask2box")))


def mask_boxes(masks: Bool[Array, "*n h w"], inclusive: bool) -> Float[Array, "*n 4"]:
    """Return the box around each mask: cx, cy, w, h as fractions of the map.

    Mask DINO has two variants (INITIALIZE_BOX_TYPE). With "mask2box" (`inclusive`), a box ends at the last pixel, and
    an empty mask gives a box of size 0 at (1, 1). With "bitmask", a box ends after the last pixel, and an empty mask
    gives a box of size 0 at (0, 0).
    """

    def side(hit: Bool[Array, "*n m"]) -> tuple[Array, Array]:
        m = hit.shape[-1]
        first, last = jnp.argmax(hit, -1), m - 1 - jnp.argmax(hit[..., ::-1], -1)
        low, high = first / m, (last + (0 if inclusive else 1)) / m
        empty, nowhere = ~hit.any(-1), 1.0 if inclusive else 0.0
        return jnp.where(empty, nowhere, (low + high) / 2), jnp.where(empty, 0.0, high - low)

    (cx, w), (cy, h) = side(masks.any(-2)), side(masks.any(-1))
    return jnp.stack([cx, cy, w, h], -1)
