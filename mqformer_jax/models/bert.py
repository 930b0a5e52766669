"""The text encoder BERT (Devlin et al., NAACL 2019), used for MiniLM.

As in sentence-transformers, the vector of a text is the mean of the output vectors of its tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from mqformer_jax.arrays import Array
from mqformer_jax.models import layers


class BertBlock(nnx.Module):
    """Post-norm self-attention and an MLP with the exact GELU. `qkv` computes queries, keys, values, in that order."""

    def __init__(self, width: int, heads: int, norm_eps: float, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.heads = heads
        self.qkv = layers.linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.out = layers.linear(width, width, rngs=rngs, dtype=dtype)
        self.norm1 = layers.layer_norm(width, norm_eps, rngs=rngs, dtype=dtype)
        self.fc1 = layers.linear(width, 4 * width, rngs=rngs, dtype=dtype)
        self.fc2 = layers.linear(4 * width, width, rngs=rngs, dtype=dtype)
        self.norm2 = layers.layer_norm(width, norm_eps, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "n l c"], real: Bool[Array, "n l"]) -> Float[Array, "n l c"]:
        """Return the updated tokens. real: False for padding, which no token attends to."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), mask=real[:, None, None])
        x = self.norm1(x + self.out(attended.reshape(x.shape)))
        return self.norm2(x + self.fc2(jax.nn.gelu(self.fc1(x), approximate=False)))


class BertTextEncoder(nnx.Module):
    """BERT text encoder, which maps token ids to one vector of size `width` per text, without normalization.

    MiniLM-L6 has vocab_size 30522, width 384, heads 12 and depth 6. context: largest number of tokens of a text.
    positions: number of rows of the position table. Rows beyond `context` are unused; they are kept so that a
    checkpoint can be exported completely. norm_eps: epsilon of the LayerNorms. Raises ValueError if `context` is larger
    than `positions`.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        width: int,
        heads: int,
        depth: int,
        *,
        positions: int = 512,
        norm_eps: float = 1e-12,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        if context > positions:
            raise ValueError(
                f"config.model.text.context = {context}: BERT has {positions} positions; set context to at most that."
            )
        table = lambda rows: nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, width)))
        self.dtype = dtype
        self.tokens, self.positions, self.types = table(vocab_size), table(positions), table(2)
        self.norm = layers.layer_norm(width, norm_eps, rngs=rngs, dtype=dtype)
        self.blocks = layers.stack(lambda keys: BertBlock(width, heads, norm_eps, rngs=keys, dtype=dtype), depth, rngs)

    def __call__(self, tokens: Int[Array, "*n l"]) -> Float[Array, "*n width"]:
        """Return the vector of each text: the mean of its tokens' outputs, or zero if the text is all padding.

        tokens: ids of [CLS], the word pieces and [SEP], padded with 0 to a common length.
        """
        flat = tokens.reshape(-1, tokens.shape[-1])
        real = flat != 0
        x = self.tokens[...][flat] + self.positions[: flat.shape[1]] + self.types[0]
        x = self.norm(x.astype(self.dtype))
        x, _ = layers.scan_layers(self.blocks, lambda block, x, _: (block(x, real), None), x)
        share = real / jnp.maximum(real.sum(-1, keepdims=True), 1)
        mean = jnp.einsum("nl,nlc->nc", share, x, preferred_element_type=jnp.float32)
        return mean.astype(self.dtype).reshape(*tokens.shape[:-1], -1)
