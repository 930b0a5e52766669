"""The prediction heads for classes (scored against text), masks and boxes, shared by proposals and decoder layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from mqformer_jax.arrays import Array
from mqformer_jax.models.layers import MLP, layer_norm

PADDING_LOGIT = -30.0  # the class logit of a prompt that is padding
FOCAL_PRIOR = -4.0  # scores start near 2 % instead of 50 %, which shortens early training


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The embedded prompts of a batch of images; `valid` is false for padding."""

    embeddings: Float[Array, "b p e"]
    valid: Bool[Array, "b p"]


class Heads(nnx.Module):
    """Heads that predict the class, the mask embedding and the box of each query.

    width, text_dim, mask_dim: sizes of a query, a prompt embedding and a mask embedding.

    The class logit of a query for a prompt is cosine(query, prompt) * exp(logit_scale) + logit_bias. The paper mentions
    only a dot product; cosine and scale follow X-Decoder and OpenSeeD. The bias starts at a low prior probability (as
    in RetinaNet), which saves about a thousand steps with the focal loss. (OpenSeeD has no bias, so its converted
    weights set it to zero.) Without `cosine`, the logit is the dot product without normalization, as converted Mask
    DINO weights need.
    """

    def __init__(
        self, width: int, text_dim: int, mask_dim: int, cosine: bool = True, *, rngs: nnx.Rngs, dtype: Any = jnp.float32
    ):
        self.cosine = cosine
        self.norm = layer_norm(width, rngs=rngs)
        self.class_embed = nnx.Linear(width, text_dim, use_bias=not cosine, dtype=dtype, rngs=rngs)
        self.mask_embed = MLP(width, width, mask_dim, 3, rngs=rngs, dtype=dtype)
        self.box = MLP(width, width, 4, 3, rngs=rngs)
        last = self.box.layers[-1]
        last.kernel[...] = jnp.zeros_like(last.kernel[...])  # boxes start at their anchors (Deformable DETR)
        self.logit_scale = nnx.Param(jnp.float32(math.log(1 / 0.07))) if cosine else None
        self.logit_bias = nnx.Param(jnp.float32(FOCAL_PRIOR)) if cosine else None

    def scores(self, queries: Float[Array, "*s b q d"], prompts: Prompts) -> Float[Array, "*s b q p"]:
        """Return class logits in float32. Prompts that are padding get -30, because -inf would give NaN gradients."""
        query, text = self.class_embed(queries), prompts.embeddings
        if self.cosine:
            query, text = normalize(query), normalize(text)
        logits = jnp.einsum("...bqe,bpe->...bqp", query, text.astype(query.dtype), preferred_element_type=jnp.float32)
        if self.cosine:
            # the scale is clipped as in CLIP
            logits = logits * jnp.exp(jnp.clip(self.logit_scale[...], max=math.log(100.0))) + self.logit_bias[...]
        return jnp.where(prompts.valid[:, None], logits, PADDING_LOGIT)

    def __call__(
        self, queries: Float[Array, "*s b q d"], prompts: Prompts
    ) -> tuple[Float[Array, "*s b q p"], Float[Array, "*s b q m"]]:
        """Normalize the queries, then return their class logits and mask embeddings."""
        queries = self.norm(queries)
        return self.scores(queries, prompts), self.mask_embed(queries)


def normalize(x: Float[Array, "... e"]) -> Float[Array, "... e"]:
    """Return unit vectors, computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, -1, keepdims=True) + 1e-12)).astype(x.dtype)


def inverse_sigmoid(x: Float[Array, " ..."], eps: float = 1e-5) -> Float[Array, " ..."]:
    """Return log(x / (1 - x)), with x and 1 - x clipped to at least eps, as in Mask DINO."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1 - x, eps))
