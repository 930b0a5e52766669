"""Where object queries come from: learned ones, conditional ones read off the image, noised targets for denoising."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from mqformer_jax.arrays import Array
from mqformer_jax.models.heads import Heads, inverse_sigmoid
from mqformer_jax.models.layers import layer_norm

OUTSIDE = 1e4  # the logit of a proposal that is no proposal (padding, or off the image): its sigmoid is 1 in float32


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Noised:
    """Noised copies of targets, to be restored (made by `losses.denoising`).

    prompt: which prompt the copy claims to be. boxes: cx, cy, w, h in 0..1. group: copies see their own group only.
    valid: false for padding.
    """

    prompt: Int[Array, "b d"]
    boxes: Float[Array, "b d 4"]
    group: Int[Array, "b d"]
    valid: Bool[Array, "b d"]


class LearnableQueries(nnx.Module):
    """n queries that are parameters: content and a 4-d anchor each.

    Where the anchors come from is unpublished. Ours are learned, start large and spread over the image, since what
    these queries come to own in the paper is mostly stuff. Never detached (OpenSeeD detaches them, and they hardly
    learn).
    """

    def __init__(self, n: int, width: int, *, rngs: nnx.Rngs):
        self.content = nnx.Param(jax.random.normal(rngs.params(), (n, width)))
        side = int(np.ceil(np.sqrt(n)))
        grid = (np.stack(np.divmod(np.arange(n), side)[::-1], -1) + 0.5) / side
        self.anchors = nnx.Param(
            inverse_sigmoid(jnp.concatenate([jnp.asarray(grid, jnp.float32), jnp.full((n, 2), 0.5)], -1))
        )

    def __call__(self, batch: int) -> tuple[Float[Array, "b n d"], Float[Array, "b n 4"]]:
        """Content and anchors (before the sigmoid) for a batch."""
        content, anchors = self.content[...], self.anchors[...]
        return jnp.broadcast_to(content, (batch, *content.shape)), jnp.broadcast_to(anchors, (batch, *anchors.shape))


class ConditionalQueries(nnx.Module):
    """The k tokens of the encoded image that score best against any prompt (Mask DINO's two-stage selection).

    learned: take only anchors from the image; content is a parameter (Mask DINO's LEARN_TGT).
    """

    def __init__(self, k: int, width: int, learned: bool = False, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.k = k
        self.proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, rngs=rngs)
        self.content = nnx.Param(jax.random.normal(rngs.params(), (k, width))) if learned else None

    def __call__(
        self,
        memory: Float[Array, "b s d"],
        shapes: tuple[tuple[int, int], ...],
        valid: Bool[Array, "b s"],
        heads: Heads,
        text: Float[Array, "b p e"],
        prompt_valid: Bool[Array, "b p"],
    ) -> tuple[Float[Array, "b k d"], Float[Array, "b k 4"]]:
        """The best k tokens and their boxes (before the sigmoid); both still carry gradients.

        `shapes` and tokens are in the decoder's order.
        """
        proposals = grid_proposals(shapes)
        inside = (jnp.all((proposals > 0.01) & (proposals < 0.99), -1) & valid)[..., None]
        tokens = self.norm(self.proj(jnp.where(inside, memory, 0)))
        boxes = heads.box(tokens).astype(jnp.float32) + jnp.where(inside, inverse_sigmoid(proposals), OUTSIDE)
        best = jnp.max(heads.scores(tokens, text, prompt_valid), -1)
        _, index = jax.lax.top_k(jax.lax.stop_gradient(best), self.k)
        return jnp.take_along_axis(tokens, index[..., None], 1), jnp.take_along_axis(boxes, index[..., None], 1)

    def start(self, tokens: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        """What the decoder starts from: the tokens, cut from the gradient (they learn from their own loss), or the
        parameter.
        """
        return (
            jax.lax.stop_gradient(tokens) if self.content is None else jnp.broadcast_to(self.content[...], tokens.shape)
        )


def mask_boxes(masks: Bool[Array, "*n h w"], inclusive: bool) -> Float[Array, "*n 4"]:
    """The box around each mask: cx, cy, w, h as fractions of the map.

    Mask DINO has two ways (INITIALIZE_BOX_TYPE): "mask2box" ends at the last pixel (`inclusive`) and puts an empty mask
    at 1 without extent, "bitmask" ends after it and puts an empty mask at 0.
    """

    def side(hit: Bool[Array, "*n m"]) -> tuple[Array, Array]:
        m = hit.shape[-1]
        first, last = jnp.argmax(hit, -1), m - 1 - jnp.argmax(hit[..., ::-1], -1)
        low, high = first / m, (last + (0 if inclusive else 1)) / m
        empty, nowhere = ~hit.any(-1), 1.0 if inclusive else 0.0
        return jnp.where(empty, nowhere, (low + high) / 2), jnp.where(empty, 0.0, high - low)

    (cx, w), (cy, h) = side(masks.any(-2)), side(masks.any(-1))
    return jnp.stack([cx, cy, w, h], -1)


def grid_proposals(shapes: tuple[tuple[int, int], ...]) -> Float[np.ndarray, "s 4"]:
    """One box a token: its cell's centre and 0.05 * 2^level, all as fractions of the canvas, levels counted in the
    order given.

    Mask DINO counts the coarsest level first, so stride 64 has the smallest proposals: a quirk its checkpoints need.
    """
    levels = []
    for level, (h, w) in enumerate(shapes):
        y, x = np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")
        side = np.full(h * w, 0.05 * 2**level)
        levels.append(np.stack([x.ravel(), y.ravel(), side, side], -1))
    return np.concatenate(levels).astype(np.float32)
