"""Swin Transformer (Liu et al., ICCV 2021) as a detection backbone: for any image size, with normalized features."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from mqformer_jax.arrays import Array
from mqformer_jax.models import layers

HEAD_WIDTH = 32  # channels of an attention head, in every stage of every size
STRIDES = (4, 8, 16, 32)
# `Drop` is the drop path of one block: the rate, and one key per image for each of the block's two branches. `Drops` is
# that of n blocks.
Drop = tuple[Float[Array, ""], Key[Array, "2 b"]]
Drops = tuple[Float[Array, " n"], Key[Array, "n 2 b"]]

normal = nnx.initializers.normal(0.02)


class Size(NamedTuple):
    """Size of a Swin Transformer.

    width: channels of the first stage, doubled in each next stage. depths: blocks of each stage, even numbers.
    """

    width: int
    depths: tuple[int, int, int, int]


SIZES = {
    "t": Size(96, (2, 2, 6, 2)),
    "s": Size(96, (2, 2, 18, 2)),
    "b": Size(128, (2, 2, 18, 2)),
    "l": Size(192, (2, 2, 18, 2)),
}


class PatchEmbed(nnx.Module):
    """Layer that embeds each 4 x 4 patch of pixels. The image is padded with zeros to a multiple of 4."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.dtype = dtype
        self.kernel = nnx.Param(normal(rngs.params(), (4, 4, 3, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width))
        self.norm = layers.layer_norm(width, rngs=rngs, dtype=dtype)

    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b h4 w4 c"]:
        patches = to_windows(pad(image.astype(self.dtype), 4), 4)
        kernel = self.kernel[...].reshape(48, -1).astype(self.dtype)
        return self.norm(patches.reshape(*patches.shape[:3], 48) @ kernel + self.bias[...].astype(self.dtype))


class PatchMerge(nnx.Module):
    """Layer that merges each 2 x 2 pixels into one pixel with twice the channels.

    The four pixels are concatenated in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column).
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.norm = layers.layer_norm(4 * width, rngs=rngs, dtype=dtype)
        self.reduction = layers.linear(4 * width, 2 * width, use_bias=False, kernel_init=normal, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        quads = to_windows(pad(x, 2), 2)
        quads = quads.reshape(*quads.shape[:3], 2, 2, -1).swapaxes(3, 4)
        return self.reduction(self.norm(quads.reshape(*quads.shape[:3], -1)))


class Block(nnx.Module):
    """Pre-norm attention inside windows, then an MLP. `qkv` computes queries, keys and values, in that order.

    shift: offset of the windows to the right and down, in pixels of the feature map. position_bias:
    [(2 window - 1)^2, heads], a bias for each offset (rows, columns) of a query from a key, row by row.
    """

    def __init__(self, width: int, window: int, shift: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.window, self.shift = window, shift
        make = lambda i, o: layers.linear(i, o, kernel_init=normal, rngs=rngs, dtype=dtype)
        self.norm1 = layers.layer_norm(width, rngs=rngs, dtype=dtype)
        self.qkv = make(width, 3 * width)
        self.out = make(width, width)
        self.position_bias = nnx.Param(normal(rngs.params(), ((2 * window - 1) ** 2, width // HEAD_WIDTH), jnp.float32))
        self.norm2 = layers.layer_norm(width, rngs=rngs, dtype=dtype)
        self.fc1 = make(width, 4 * width)
        self.fc2 = make(4 * width, width)

    def __call__(self, x: Float[Array, "b h w c"], drop: Drop | None = None) -> Float[Array, "b h w c"]:
        branches = (
            lambda x: self.attend(self.norm1(x)),
            lambda x: self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False)),
        )
        for k, branch in enumerate(branches):
            y = branch(x)
            x = x + (y if drop is None else drop_path(y, drop[0], drop[1][k]))
        return x

    def attend(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the window attention.

        The feature map is padded with zeros on the right and at the bottom to whole windows. Shifted windows wrap
        around, but pixels from opposite borders do not attend to each other.
        """
        height, width = x.shape[1:3]
        x = jnp.roll(pad(x, self.window), (-self.shift, -self.shift), (1, 2))
        windows = to_windows(x, self.window)
        q, k, v = jnp.moveaxis(self.qkv(windows).reshape(*windows.shape[:-1], 3, -1, HEAD_WIDTH), -3, 0)
        scores = jnp.einsum("...qhd,...khd->...hqk", q * HEAD_WIDTH**-0.5, k, preferred_element_type=jnp.float32)
        scores += unfold_bias(self.position_bias[...], self.window)
        if self.shift:
            scores += jnp.where(neighbors(*x.shape[1:3], self.window, self.shift), 0.0, -100.0)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        mixed = jnp.einsum("...hqk,...khd->...qhd", weights, v).reshape(windows.shape)
        y = jnp.roll(from_windows(self.out(mixed), self.window), (self.shift, self.shift), (1, 2))
        return y[:, :height, :width]


class Pair(nnx.Module):
    """A block with plain windows, then a block with windows shifted by half their side. A stage is a stack of pairs."""

    def __init__(self, width: int, window: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.plain = Block(width, window, 0, rngs=rngs, dtype=dtype)
        self.shifted = Block(width, window, window // 2, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"], drops: tuple[Drop, Drop] | None = None) -> Float[Array, "b h w c"]:
        plain, shifted = (None, None) if drops is None else drops
        return self.shifted(self.plain(x, plain), shifted)


class Swin(nnx.Module):
    """Swin Transformer with features at strides 4, 8, 16 and 32, each with its own LayerNorm.

    size: "t", "s", "b" or "l", or a `Size`.
    window: side of the attention windows (7 for weights pre-trained at 224 pixels, 12 at 384).
    drop_path: probability in training that an image skips a branch of the last block. The probability grows linearly
        over the blocks, from 0 at the first block.
    remat: see `scan_layers` ("layers" halves Swin-L's memory at 1024 x 1024).
    """

    mean, std = layers.IMAGENET_MEAN, layers.IMAGENET_STD

    def __init__(
        self, size: str | Size, window: int = 7, drop_path: float = 0.0, remat: str = "none", *, rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):  # fmt: skip
        if isinstance(size, str) and size not in SIZES:
            raise ValueError(f"Swin size {size!r}: it must be one of {', '.join(SIZES)}; change backbone.name.")
        self.size = SIZES[size] if isinstance(size, str) else size
        self.drop_path, self.remat = drop_path, remat
        widths = list(self.channels.values())
        pairs = lambda width, depth: layers.stack(
            lambda keys: Pair(width, window, rngs=keys, dtype=dtype), depth // 2, rngs
        )
        self.embed = PatchEmbed(widths[0], rngs=rngs, dtype=dtype)
        self.stages = nnx.List(pairs(width, depth) for width, depth in zip(widths, self.size.depths))
        self.merges = nnx.List(PatchMerge(width, rngs=rngs, dtype=dtype) for width in widths[:-1])
        self.norms = nnx.List(layers.layer_norm(width, rngs=rngs, dtype=dtype) for width in widths)

    @property
    def channels(self) -> dict[int, int]:
        return {stride: self.size.width * stride // 4 for stride in STRIDES}

    def __call__(
        self, image: Float[Array, "b h w 3"], keys: Key[Array, " b"] | None = None
    ) -> dict[int, Float[Array, "b _h _w _c"]]:
        """Return {stride: feature}.

        image: normalized, of any size. The sides of a feature are the image's sides divided by the stride and rounded
        up. keys: one per image, for drop path; None in evaluation.
        """
        x, features = self.embed(image), {}
        for k, (stride, stage) in enumerate(zip(STRIDES, self.stages)):
            x = self.merges[k - 1](x) if k else x
            x, _ = layers.scan_layers(
                stage, lambda pair, x, drops: (pair(x, drops), None), x, self.drops(k, keys), self.remat
            )
            features[stride] = self.norms[k](x)
        return features

    def drops(self, stage: int, keys: Key[Array, " b"] | None) -> tuple[Drops, Drops] | None:
        """Return the drop path rates and keys of a stage's plain blocks and of its shifted blocks, one row per `Pair`.

        Returns None if drop path is off.
        """
        if keys is None or self.drop_path == 0:
            return None
        depths = self.size.depths
        blocks = slice(sum(depths[:stage]), sum(depths[: stage + 1]))
        rates = jnp.linspace(0, self.drop_path, sum(depths))[blocks]
        keys = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, (sum(depths), 2))[blocks])(keys), 0, 2)
        return (rates[0::2], keys[0::2]), (rates[1::2], keys[1::2])


def pad(x: Float[Array, "b h w c"], multiple: int) -> Float[Array, "b h2 w2 c"]:
    """Pad with zeros at the bottom and on the right until both sides are multiples of `multiple`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, -x.shape[2] % multiple), (0, 0)))


def to_windows(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b rows columns t c"]:
    """Split an image into windows of t = side^2 pixels, row by row. The image's sides must be multiples of `side`.

    The batch stays a separate axis, which preserves its sharding.
    """
    b, h, w, c = x.shape
    return (
        x.reshape(b, h // side, side, w // side, side, c)
        .swapaxes(2, 3)
        .reshape(b, h // side, w // side, side * side, c)
    )


def from_windows(windows: Float[Array, "b rows columns t c"], side: int) -> Float[Array, "b h w c"]:
    """Join windows into an image: the inverse of `to_windows`."""
    b, rows, columns, _, c = windows.shape
    return windows.reshape(b, rows, columns, side, side, c).swapaxes(2, 3).reshape(b, rows * side, columns * side, c)


def unfold_bias(table: Float[Array, "offsets heads"], window: int) -> Float[Array, "heads t t"]:
    """Return the attention bias of each (query, key) pair of a window with t = window^2 pixels.

    table: relative position biases, see `Block.position_bias`. The function looks up the vertical offset first and the
    horizontal offset second. It gathers 2 window^2 slices (and scatters as many in the gradient); the usual lookup with
    a single index gathers window^4 rows.
    """
    offset = np.arange(window)[:, None] - np.arange(window) + window - 1  # [query, key]
    # query row, key row, query column, key column
    grid = table.reshape(2 * window - 1, 2 * window - 1, -1)[offset][:, :, offset]
    return grid.transpose(4, 0, 2, 1, 3).reshape(-1, window**2, window**2)


def neighbors(height: int, width: int, window: int, shift: int) -> Array:
    """Return the attention mask of shifted windows: bool [rows, columns, 1, t, t] for windows of t pixels.

    It is False for a query and a key that share a window only because the windows wrap around the image. It is computed
    from one small mask for rows and one for columns, so that the compiled program contains no large constant.
    """

    def along(length: int) -> Array:
        at = jnp.arange(length)
        region = (1 * (at >= length - window) + (at >= length - shift)).reshape(-1, window)
        return region[:, :, None] == region[:, None, :]

    rows, columns = along(height), along(width)
    same = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return same.reshape(len(rows), len(columns), 1, window**2, window**2)


def drop_path(
    branch: Float[Array, "b h w c"], rate: Float[Array, ""], keys: Key[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Apply stochastic depth (Huang et al., ECCV 2016).

    For each image, set the branch to zero with probability `rate`; otherwise scale it, which preserves the mean.
    """
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, (1, 1, 1)))(keys)
    return branch * (keep / (1 - rate)).astype(branch.dtype)


def resize_table(table: Float[np.ndarray, "*n offsets heads"], window: int) -> Float[np.ndarray, "*n offsets2 heads"]:
    """Resize relative position bias tables for windows of side `window`.

    A window of side w has (2 w - 1)^2 relative offsets; the table has one row for each. The interpolation is bicubic
    (a = -0.75), with corners not aligned and edges repeated, as in torch's `F.interpolate(..., mode="bicubic")`.
    """
    old, new = round(table.shape[-2] ** 0.5), 2 * window - 1
    if old == new:
        return table
    at = (np.arange(new) + 0.5) * old / new - 0.5
    resample = np.zeros((new, old))
    for tap in range(-1, 3):
        source = np.floor(at).astype(int) + tap
        np.add.at(resample, (np.arange(new), source.clip(0, old - 1)), _cubic(np.abs(at - source)))
    grid = table.reshape(*table.shape[:-2], old, old, -1)
    return (
        np.einsum("ai,bj,...ijh->...abh", resample, resample, grid)
        .reshape(*table.shape[:-2], new * new, -1)
        .astype(table.dtype)
    )


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Return the cubic convolution kernel of R. Keys (1981) with a = -0.75, for distances up to 2."""
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)
