"""Object queries: learnable ones, conditional ones selected from the image, and noised targets for denoising."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from mqformer_jax.arrays import Array
from mqformer_jax.models.heads import Heads, Prompts, inverse_sigmoid
from mqformer_jax.models.layers import layer_norm
from mqformer_jax.models.pixel_decoder import Memory

OUTSIDE = 1e4  # box logit of an invalid proposal (in padding or near the border); its sigmoid is 1 in float32


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Queries:
    """q object queries.

    content: feature vectors. anchors: logits (inverse sigmoid) of boxes cx, cy, w, h as fractions of the canvas.
    """

    content: Float[Array, "b q d"]
    anchors: Float[Array, "b q 4"]


def concatenate(*parts: Queries) -> Queries:
    """Join the queries of all parts, with their content converted to float32."""
    content = jnp.concatenate([part.content.astype(jnp.float32) for part in parts], 1)
    return Queries(content, jnp.concatenate([part.anchors for part in parts], 1))


@no_type_check  # see `Batch`
@flax.struct.dataclass
class DenoisingQueries:
    """Noised copies of targets, from which the decoder predicts the targets. `losses.denoising` creates them.

    prompt: index of a prompt of the target, or of the random prompt that label noise puts in its place. boxes: noised
    boxes, cx, cy, w, h as fractions of the canvas. group: copies of different groups do not attend to each other.
    valid: false for padding.
    """

    prompt: Int[Array, "b d"]
    boxes: Float[Array, "b d 4"]
    group: Int[Array, "b d"]
    valid: Bool[Array, "b d"]


class LearnableQueries(nnx.Module):
    """n queries whose content and anchors (4-d) are parameters.

    The paper does not say where the anchors come from. Here they are learned. They start as large boxes spread over the
    image, since the paper's learnable queries mostly predict stuff. The decoder passes gradients to them. (OpenSeeD
    stops these gradients, and its anchors hardly change in training.)
    """

    def __init__(self, n: int, width: int, *, rngs: nnx.Rngs):
        self.content = nnx.Param(jax.random.normal(rngs.params(), (n, width)))
        side = int(np.ceil(np.sqrt(n)))
        grid = (np.stack(np.divmod(np.arange(n), side)[::-1], -1) + 0.5) / side
        self.anchors = nnx.Param(
            inverse_sigmoid(jnp.concatenate([jnp.asarray(grid, jnp.float32), jnp.full((n, 2), 0.5)], -1))
        )

    def __call__(self, batch: int) -> Queries:
        """Return the queries for a batch of images."""
        content, anchors = self.content[...], self.anchors[...]
        return Queries(
            jnp.broadcast_to(content, (batch, *content.shape)), jnp.broadcast_to(anchors, (batch, *anchors.shape))
        )


class ConditionalQueries(nnx.Module):
    """Queries from the k tokens of the memory that score best against any prompt (Mask DINO's two-stage selection).

    learned: take only the anchors from the tokens; the content is a parameter (Mask DINO's LEARN_TGT).
    """

    def __init__(self, k: int, width: int, learned: bool = False, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.k = k
        self.proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, rngs=rngs)
        self.content = nnx.Param(jax.random.normal(rngs.params(), (k, width))) if learned else None

    def __call__(self, memory: Memory, heads: Heads, prompts: Prompts) -> Queries:
        """Return the proposals: the k best tokens and their boxes, with gradients.

        memory: its levels must have the decoder's order.
        """
        grid = grid_proposals(memory.shapes)
        inside = (jnp.all((grid > 0.01) & (grid < 0.99), -1) & memory.valid)[..., None]
        tokens, anchors = jnp.where(inside, memory.tokens, 0), jnp.where(inside, inverse_sigmoid(grid), OUTSIDE)
        project = lambda x: self.norm(self.proj(x))
        # The choice has no gradient. The chosen tokens are projected again, so that only they have a backward pass.
        best = jnp.max(heads.scores(project(jax.lax.stop_gradient(tokens)), prompts), -1)
        _, index = jax.lax.top_k(jax.lax.stop_gradient(best), self.k)
        chosen = lambda x: jnp.take_along_axis(x, index[..., None], 1)
        content = project(chosen(tokens))
        return Queries(content, heads.box(content).astype(jnp.float32) + chosen(anchors))

    def initial_content(self, proposals: Queries) -> Float[Array, "b k d"]:
        """Return the decoder's initial content: the proposals' content, or the parameter if the content is learned.

        The proposals' content gets no gradients from the decoder, because the proposals have a loss of their own.
        """
        if self.content is None:
            return jax.lax.stop_gradient(proposals.content)
        return jnp.broadcast_to(self.content[...], proposals.content.shape)


def grid_proposals(shapes: tuple[tuple[int, int], ...]) -> Float[np.ndarray, "s 4"]:
    """Return one box cx, cy, w, h per token, as fractions of the canvas.

    A box has the center of the token's cell, and sides of 0.05 * 2^level. Levels count from 0 in the order of `shapes`.
    Mask DINO counts from the coarsest level, so that stride 64 has the smallest proposals; its checkpoints need this.
    """
    levels = []
    for level, (h, w) in enumerate(shapes):
        y, x = np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")
        side = np.full(h * w, 0.05 * 2**level)
        levels.append(np.stack([x.ravel(), y.ravel(), side, side], -1))
    return np.concatenate(levels).astype(np.float32)
