"""The mixed-query decoder, whose layers exchange information between learnable and conditional queries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from mqformer_jax.arrays import Array
from mqformer_jax.models.deformable_attention import MSDeformAttn
from mqformer_jax.models.heads import Heads, inverse_sigmoid
from mqformer_jax.models.layers import MLP, layer_norm, linear, scan_layers, stack
from mqformer_jax.models.pixel_decoder import Memory
from mqformer_jax.models.queries import Queries


class Attention(nnx.Module):
    """Multi-head attention. Position embeddings are added to queries and keys but not to values, as in DETR.

    zero_out: initialize the output projection to zero.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype: Any, zero_out: bool = False):
        make = lambda **kwargs: linear(width, width, rngs=rngs, dtype=dtype, **kwargs)
        self.query, self.key, self.value = make(), make(), make()
        self.out = make(kernel_init=nnx.initializers.zeros) if zero_out else make()
        self.heads = heads

    def __call__(
        self,
        x: Float[Array, "b q d"],
        x_pos: Float[Array, "b q d"],
        y: Float[Array, "b k d"],
        y_pos: Float[Array, "b k d"],
        mask: Bool[Array, "#b q k"] | None = None,
    ) -> Float[Array, "b q d"]:
        split = lambda t: t.reshape(*t.shape[:2], self.heads, -1)
        attended = jax.nn.dot_product_attention(
            split(self.query(x + x_pos)),
            split(self.key(y + y_pos)),
            split(self.value(y)),
            mask=None if mask is None else mask[:, None],
        )
        return self.out(attended.reshape(x.shape))


class Exchange(nnx.Module):
    """The paper's two cross-attentions, which exchange information between learnable and conditional queries.

    Learnable queries attend to conditional queries, and conditional queries attend to learnable queries. The paper does
    not say where in a layer this happens. Here, both attentions follow self-attention and read the same input. Each is
    a pre-norm residual branch whose output projection starts at zero. A new exchange is therefore the identity, and a
    converted Mask DINO keeps its predictions.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, dtype: Any):
        self.norm_learnable = layer_norm(width, rngs=rngs, dtype=dtype)
        self.norm_conditional = layer_norm(width, rngs=rngs, dtype=dtype)
        self.to_learnable = Attention(width, heads, rngs=rngs, dtype=dtype, zero_out=True)
        self.to_conditional = Attention(width, heads, rngs=rngs, dtype=dtype, zero_out=True)

    def __call__(
        self, x: Float[Array, "b q d"], pos: Float[Array, "b q d"], learnable: int, conditional: int
    ) -> Float[Array, "b q d"]:
        """Return the updated queries. Denoising queries do not change.

        x: the content of the learnable, conditional and denoising queries, in this order. pos: their position
        embeddings. learnable, conditional: the number of queries of each kind.
        """
        parts = np.cumsum([learnable, conditional])
        lx, cx, rest = jnp.split(x, parts, 1)
        lp, cp, _ = jnp.split(pos, parts, 1)
        ln, cn = self.norm_learnable(lx), self.norm_conditional(cx)
        return jnp.concatenate(
            [lx + self.to_learnable(ln, lp, cn, cp), cx + self.to_conditional(cn, cp, ln, lp), rest], 1
        )


class DecoderLayer(nnx.Module):
    """Self-attention -> exchange -> deformable cross-attention to the image -> FFN, post-norm.

    Without the exchange, it is Mask DINO's layer.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn: int,
        levels: int,
        num_sampling_points: int,
        exchange: bool,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
    ):
        norm = lambda: layer_norm(width, rngs=rngs, dtype=dtype)
        self.self_attention = Attention(width, heads, rngs=rngs, dtype=dtype)
        self.exchange = Exchange(width, heads, rngs=rngs, dtype=dtype) if exchange else None
        self.cross_attention = MSDeformAttn(width, heads, levels, num_sampling_points, rngs=rngs, dtype=dtype)
        self.ffn = MLP(width, ffn, width, 2, rngs=rngs, dtype=dtype)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()

    def __call__(
        self,
        x: Float[Array, "b q d"],
        pos: Float[Array, "b q d"],
        reference: Float[Array, "b q levels 4"],
        mask: Bool[Array, "#b q q"],
        counts: tuple[int, int],
        memory: Memory,
    ) -> Float[Array, "b q d"]:
        x = self.norm2(x + self.self_attention(x, pos, x, pos, mask))
        if self.exchange is not None:
            x = self.exchange(x, pos, *counts)
        x = self.norm1(x + self.cross_attention(x + pos, reference, memory.tokens, memory.shapes, memory.valid))
        return self.norm3(x + self.ffn(x))


class Decoder(nnx.Module):
    """A stack of decoder layers. After each layer, the anchor boxes of the queries are refined, as in Mask DINO."""

    def __init__(
        self, width: int, heads: int, ffn: int, layers: int, levels: int, num_sampling_points: int, exchange: bool, *,
        rngs: nnx.Rngs, dtype: Any = jnp.float32, remat: str = "none",
    ):  # fmt: skip
        self.anchor_pos = MLP(2 * width, width, width, 2, rngs=rngs, dtype=dtype)
        self.layers = stack(
            lambda r: DecoderLayer(width, heads, ffn, levels, num_sampling_points, exchange, rngs=r, dtype=dtype),
            layers,
            rngs,
        )
        self.width, self.dtype, self.remat = width, dtype, remat

    def __call__(
        self,
        queries: Queries,
        mask: Bool[Array, "#b q q"],
        counts: tuple[int, int],
        memory: Memory,
        heads: Heads,
    ) -> tuple[Float[Array, "l b q d"], Float[Array, "l b q 4"]]:
        """Return the content (after `heads.norm`) and the boxes of the queries after each layer.

        Boxes are cx, cy, w, h as fractions of the canvas. mask: True where the query of a row may attend to the query
        of a column. counts: numbers of learnable and conditional queries.

        Each layer attends around reference boxes, which the previous layer has refined. No gradients flow from a layer
        to its reference boxes, but the boxes predicted after the layer pass gradients to them (DINO's "look forward
        twice"). Reference boxes are refined from the content before `heads.norm`. Predicted boxes are computed from the
        content after `heads.norm`.
        """

        def layer_step(layer: DecoderLayer, carry, _):
            x, reference = carry
            pos = self.anchor_pos(anchor_embedding(reference, self.width).astype(self.dtype))
            at_levels = jnp.broadcast_to(reference[:, :, None], (*reference.shape[:2], len(memory.shapes), 4))
            x = layer(x, pos, at_levels, mask, counts, memory)
            refined = jax.nn.sigmoid(heads.box(x).astype(jnp.float32) + inverse_sigmoid(reference))
            return (x, jax.lax.stop_gradient(refined)), (x, refined)

        first = jax.nn.sigmoid(queries.anchors)
        _, (contents, references) = scan_layers(
            self.layers, layer_step, (queries.content.astype(self.dtype), first), remat=self.remat
        )
        contents = heads.norm(contents)
        before = jnp.concatenate([first[None], references[:-1]])
        boxes = jax.nn.sigmoid(heads.box(contents).astype(jnp.float32) + inverse_sigmoid(before))
        return contents, boxes


def anchor_embedding(boxes: Float[Array, "b q 4"], width: int) -> Float[Array, "b q e"]:
    """Return the sine embedding of boxes cx, cy, w, h (0 to 1), with width / 2 channels for each of the four numbers.

    The channels are in DAB-DETR's order: those of cy first, then those of cx, w and h.
    """
    half = width // 2
    frequency = 2 * np.pi / 10000.0 ** (2 * (np.arange(half) // 2) / half)
    angle = boxes[..., jnp.array([1, 0, 2, 3]), None] * jnp.asarray(frequency, jnp.float32)
    waves = jnp.stack([jnp.sin(angle[..., 0::2]), jnp.cos(angle[..., 1::2])], -1)
    return waves.reshape(*boxes.shape[:-1], 4 * half)
