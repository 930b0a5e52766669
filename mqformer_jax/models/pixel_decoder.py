"""The segmentation encoder, a deformable transformer: Mask DINO's pixel decoder (Li et al., CVPR 2023)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from mqformer_jax.arrays import Array
from mqformer_jax.models import layers
from mqformer_jax.models.deformable_attention import MSDeformAttn, Shapes

Tokens = Float[Array, "b s c"]
Features = dict[int, Float[Array, "b _h _w _c"]]  # {stride: feature}


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Memory:
    """The encoded image: tokens of several levels, each level row by row.

    shapes: height and width of each level. valid: whether a token's cell touches the image. Tokens in the padding are
    masked in attention.
    """

    tokens: Tokens
    shapes: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)
    valid: Bool[Array, "b s"]


ConvGroupNorm = functools.partial(layers.ConvNorm, norm=layers.group_norm)


class EncoderLayer(nnx.Module):
    """Deformable self-attention over the tokens of all levels, then an MLP; post-norm."""

    def __init__(
        self,
        width: int,
        heads: int,
        levels: int,
        num_sampling_points: int,
        ffn: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.attention = MSDeformAttn(width, heads, levels, num_sampling_points, rngs=rngs, dtype=dtype)
        self.norm1 = layers.layer_norm(width, rngs=rngs, dtype=dtype)
        self.ffn = layers.MLP(width, ffn, width, 2, rngs=rngs, dtype=dtype)
        self.norm2 = layers.layer_norm(width, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Tokens,
        position: Tokens,
        reference: Float[Array, "b s levels 2"],
        shapes: Shapes,
        valid: Bool[Array, "b s"],
    ) -> Tokens:
        x = self.norm1(x + self.attention(x + position, reference, x, shapes, valid))
        return self.norm2(x + self.ffn(x))


class MaskFeatures(nnx.Module):
    """Layer that computes the mask features.

    It resizes the finest level of the memory to the mask stride and merges the result with the backbone's feature of
    that stride. It does this even if the finest level already has the mask stride, as Mask DINO does with five levels.
    """

    def __init__(self, width: int, lateral: int, mask_dim: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        make = functools.partial(ConvGroupNorm, use_bias=False, rngs=rngs, dtype=dtype)
        self.lateral, self.merge = make(lateral, width, 1), make(width, width, 3)
        self.project = layers.Conv(width, mask_dim, rngs=rngs, dtype=dtype)

    def __call__(self, finest: Float[Array, "b h w c"], features: Features, stride: int) -> Float[Array, "b h2 w2 d"]:
        side = self.lateral(features[stride])
        return self.project(jax.nn.relu(self.merge(side + _resize(finest, side.shape[1:3]))))


class PixelDecoder(nnx.Module):
    """Encoder that turns backbone features into memory (tokens of several strides) and mask features.

    channels: {stride: number of channels} of the backbone's features. width: number of channels of the memory.
    strides: strides of the memory's levels, from fine to coarse, each double the one before. Levels coarser than the
    backbone's features are computed by 3x3 convolutions of stride 2. depth: number of encoder layers, each with `heads`
    heads, `num_sampling_points` per head and level, and `ffn` hidden channels. mask_dim, mask_stride: number of
    channels and stride of the mask features; the backbone must have this stride. remat: see `scan_layers`.
    """

    def __init__(
        self,
        channels: dict[int, int],
        width: int,
        heads: int,
        num_sampling_points: int,
        depth: int,
        ffn: int,
        strides: Sequence[int] = (8, 16, 32, 64),
        mask_dim: int = 256,
        mask_stride: int = 4,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
    ):
        strides = tuple(strides)
        if (
            mask_stride not in channels
            or strides[0] not in channels
            or strides != tuple(strides[0] << k for k in range(len(strides)))
        ):
            raise ValueError(
                f"config.model.strides = {strides}, mask_stride = {mask_stride}: each stride must be double the one "
                f"before, and the first stride and mask_stride must be strides of the backbone, {tuple(channels)}."
            )
        self.strides, self.mask_stride, self.coarsest, self.remat = strides, mask_stride, max(channels), remat
        make = functools.partial(ConvGroupNorm, use_bias=True, rngs=rngs, dtype=dtype)
        inputs = [channels.get(s, channels[self.coarsest] if s == 2 * self.coarsest else width) for s in strides]
        self.input_proj = nnx.List(
            make(i, width, 1) if s in channels else make(i, width, 3, 2) for s, i in zip(strides, inputs)
        )
        self.level_embed = nnx.Param(jax.random.normal(rngs.params(), (len(strides), width)))
        self.layers = layers.stack(
            lambda keys: EncoderLayer(width, heads, len(strides), num_sampling_points, ffn, rngs=keys, dtype=dtype),
            depth,
            rngs,
        )
        self.mask_features = MaskFeatures(width, channels[mask_stride], mask_dim, rngs=rngs, dtype=dtype)

    def __call__(
        self, features: Features, size: Int[Array, "b 2"], canvas: tuple[int, int]
    ) -> tuple[Memory, Float[Array, "b h w d"]]:
        """Return the memory, with its levels in the order of `strides`, and the mask features.

        features: {stride: feature}. size: height and width of each image's valid part in pixels. canvas: height and
        width of the padded images in pixels.
        """
        if any(side % self.coarsest for side in canvas):
            raise ValueError(
                f"canvas {canvas[0]}x{canvas[1]}: its sides must be multiples of the backbone's stride "
                f"{self.coarsest}; change config.data.canvas."
            )
        maps = self._levels(features)
        shapes = tuple(m.shape[1:3] for m in maps)
        counts = [jnp.minimum(-(-size // s), np.array(hw)) for s, hw in zip(self.strides, shapes)]
        grids = [_Grid(count, hw) for count, hw in zip(counts, shapes)]
        flat = lambda parts: jnp.concatenate([p.reshape(p.shape[0], -1, *p.shape[3:]) for p in parts], 1)
        x, valid = flat(maps), flat([g.valid for g in grids])
        width = x.shape[-1]
        position = flat([g.sine(width) + self.level_embed[k] for k, g in enumerate(grids)]).astype(x.dtype)
        ratios = jnp.stack([count / np.array(hw) for count, hw in zip(counts, shapes)], 1)[:, :, ::-1]
        reference = flat([g.center for g in grids])[:, :, None] * ratios[:, None]

        step = lambda layer, x, _: (layer(x, position, reference, shapes, valid), None)
        tokens, _ = layers.scan_layers(self.layers, step, x, remat=self.remat)
        finest = tokens[:, : shapes[0][0] * shapes[0][1]].reshape(-1, *shapes[0], width)
        return Memory(tokens, shapes, valid), self.mask_features(finest, features, self.mask_stride)

    def _levels(self, features: Features) -> list[Float[Array, "b _h _w c"]]:
        """Return one map for each of `strides`, with the number of channels of the memory.

        The first level that is coarser than the backbone's features is computed from the coarsest of them. Each further
        level is computed from the level before it.
        """
        maps = []
        for stride, project in zip(self.strides, self.input_proj):
            beyond = features[self.coarsest] if stride == 2 * self.coarsest else maps[-1] if maps else None
            maps.append(project(features.get(stride, beyond)))
        return maps


class _Grid:
    """The cells of one level of the memory.

    count [b, 2]: the numbers of rows and columns that touch each image. shape: (h, w) of the level, with padding.
    """

    def __init__(self, count: Int[Array, "b 2"], shape: tuple[int, int]):
        self.shape = shape
        self.rows, self.columns = (jnp.arange(n)[None] for n in shape)
        self.height, self.width = count[:, :1], count[:, 1:]
        self.valid = (self.rows < self.height)[:, :, None] & (self.columns < self.width)[:, None, :]

    @property
    def center(self) -> Float[Array, "b h w 2"]:
        """Return x, y of each cell's center, scaled so that the valid part spans 0 to 1."""
        y, x = (self.rows + 0.5) / self.height, (self.columns + 0.5) / self.width
        return self._pair(x[:, None, :, None], y[:, :, None, None])

    def sine(self, width: int) -> Float[Array, "b h w c"]:
        """Return DETR's sine position encoding: width / 2 channels for y, then as many for x.

        Positions are scaled so that the valid part spans 0 to 2 pi.
        """
        y, x = (_waves(i, n, width // 2) for i, n in ((self.rows, self.height), (self.columns, self.width)))
        return self._pair(y[:, :, None], x[:, None])

    def _pair(self, a: Float[Array, "b ..."], b: Float[Array, "b ..."]) -> Float[Array, "b h w c"]:
        full = lambda v: jnp.broadcast_to(v, (v.shape[0], *self.shape, v.shape[-1]))
        return jnp.concatenate([full(a), full(b)], -1)


def _waves(index: Int[Array, "1 n"], count: Int[Array, "b 1"], channels: int) -> Float[Array, "b n channels"]:
    """Return alternating sines and cosines of each cell's position. Padding gets the values of the last valid cell."""
    place = jnp.minimum(index + 1, count) / (count + 1e-6) * (2 * math.pi)
    wavelength = 10000.0 ** (2 * (np.arange(channels) // 2) / channels)
    angle = place[..., None] / wavelength.astype(np.float32)
    return jnp.where(np.arange(channels) % 2 == 0, jnp.sin(angle), jnp.cos(angle))


def _resize(x: Float[Array, "b h w c"], shape: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Resize bilinearly (align_corners=False) with two matmuls, since `jax.image.resize` is very slow on CPU."""
    rows, columns = (_interpolation(n, m) for n, m in zip(x.shape[1:3], shape))
    return jnp.einsum("Hh,Ww,bhwc->bHWc", rows.astype(x.dtype), columns.astype(x.dtype), x, precision="highest")


def _interpolation(n: int, m: int) -> np.ndarray:
    """Return the [m, n] matrix that resizes a row of n pixels to m pixels by linear interpolation.

    A new pixel whose center lies before the first or after the last old center has the value of the nearest old pixel.
    """
    place = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(n))).astype(np.float32)
