"""Text encoders, which map token ids [*n, l] to one vector per text [*n, embed_dim], without normalization.

- `TextEncoder`: CLIP's text encoder (Radford et al., ICML 2021), a causal transformer. The vector is its output at the
  end token.
- `BertTextEncoder` (bert.py): BERT, used for MiniLM.
- `ClassTable`: one vector per class, for converted checkpoints without a text encoder.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.models import layers
from mqformer_jax.models.bert import BertTextEncoder

orthogonal, zeros = nnx.initializers.orthogonal(), nnx.initializers.zeros


def make_text_encoder(
    config: ConfigDict, rngs: nnx.Rngs, dtype: DTypeLike
) -> TextEncoder | BertTextEncoder | ClassTable:
    """Return the text encoder that `config` (`config.model.text`) describes."""
    c = config
    if c.name == "classes":
        return ClassTable(len(c.classes), c.embed_dim, rngs=rngs)
    if c.name == "bert":
        return BertTextEncoder(
            c.vocab_size, c.context, c.width, c.heads, c.layers, norm_eps=c.norm_eps, rngs=rngs, dtype=dtype
        )
    return TextEncoder(
        c.vocab_size, c.context, c.width, c.heads, c.layers, c.embed_dim, c.norm_eps, rngs=rngs, dtype=dtype
    )


class TextBlock(nnx.Module):
    """Pre-norm causal self-attention and an MLP with QuickGELU. `qkv` computes queries, keys and values, in that order.

    The outputs of the attention and of the MLP start at zero. `TextEncoder` changes this for its first attention.
    """

    def __init__(self, width: int, heads: int, norm_eps: float, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.heads = heads
        self.norm1 = layers.layer_norm(width, norm_eps, rngs=rngs, dtype=dtype)
        self.qkv = layers.linear(width, 3 * width, kernel_init=_near_uniform_attention, rngs=rngs, dtype=dtype)
        self.out = layers.linear(width, width, kernel_init=zeros, rngs=rngs, dtype=dtype)
        self.norm2 = layers.layer_norm(width, norm_eps, rngs=rngs, dtype=dtype)
        self.fc1 = layers.linear(width, 4 * width, rngs=rngs, dtype=dtype)
        self.fc2 = layers.linear(4 * width, width, kernel_init=zeros, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "n l c"]) -> Float[Array, "n l c"]:
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        x = x + self.out(jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True).reshape(x.shape))
        y = self.fc1(self.norm2(x))
        return x + self.fc2(y * jax.nn.sigmoid(1.702 * y))


class TextEncoder(nnx.Module):
    """CLIP's text encoder, which maps token ids to one vector per text, without normalization.

    Sizes of CLIP ViT-B: vocab_size 49408, context 77, width 512, heads 8, depth 12, embed_dim 512. norm_eps: of the
    LayerNorms; OpenSeeD's is 1e-12.

    A new encoder starts as a bag of words: the first attention averages the words of a text, and the outputs of all
    later attentions and MLPs start at zero. So each word that distinguishes two texts contributes equally to the
    difference of their embeddings, for any seed. With Xavier kernels instead, the cosine of "the red star" and "the
    blue star" is 0.9 on average, and the contribution of each word depends on the seed.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        width: int,
        heads: int,
        depth: int,
        embed_dim: int,
        norm_eps: float = 1e-5,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        normal = jax.random.normal
        self.dtype = dtype
        self.tokens = nnx.Param(0.02 * normal(rngs.params(), (vocab_size, width)))
        self.positions = nnx.Param(0.002 * normal(rngs.params(), (context, width)))
        self.blocks = layers.stack(lambda keys: TextBlock(width, heads, norm_eps, rngs=keys, dtype=dtype), depth, rngs)
        out = self.blocks.out.kernel
        out[...] = out[...].at[0].set(orthogonal(rngs.params(), (width, width)))
        self.norm = layers.layer_norm(width, norm_eps, rngs=rngs, dtype=dtype)
        self.projection = layers.linear(
            width, embed_dim, use_bias=False, kernel_init=orthogonal, rngs=rngs, dtype=dtype
        )

    def __call__(self, tokens: Int[Array, "*n l"]) -> Float[Array, "*n embed_dim"]:
        """Return one vector per text.

        tokens: from a `Tokenizer`; zeros after the end token may be cut off. The vector is the output at the end token,
        which is the token with the highest id (as in OpenAI's code).
        """
        flat = tokens.reshape(-1, tokens.shape[-1])
        x = (self.tokens[...][flat] + self.positions[: flat.shape[1]]).astype(self.dtype)
        x, _ = layers.scan_layers(self.blocks, lambda block, x, _: (block(x), None), x)
        x = x[jnp.arange(len(x)), flat.argmax(-1)]
        return self.projection(self.norm(x)).reshape(*tokens.shape[:-1], -1)


def _near_uniform_attention(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """Return an initial `qkv` kernel, with small kernels of queries and keys and an orthogonal kernel of values."""
    width = shape[0]
    some, other = jax.random.split(key)
    queries_keys = 0.3 * layers.xavier(some, (width, 2 * width), dtype)
    return jnp.concatenate([queries_keys, orthogonal(other, (width, width), dtype)], 1)


class ClassTable(nnx.Module):
    """A table of one vector per class, for closed-set checkpoints. Token k stands for row k - 1; 0 is padding."""

    def __init__(self, classes: int, embed_dim: int, *, rngs: nnx.Rngs):
        self.rows = nnx.Param(0.02 * jax.random.normal(rngs.params(), (classes, embed_dim)))

    def __call__(self, tokens: Int[Array, "*n 1"]) -> Float[Array, "*n embed_dim"]:
        """Return the rows of the tokens. Padding (0) reads the first row; such prompts are not valid."""
        return self.rows[...][jnp.maximum(tokens[..., 0] - 1, 0)]
