"""Compare masks on a lattice: one pixel of each square of pixels, at an offset drawn for each image and step.

Mask2Former and Mask DINO compare masks at random points (PointRend). Reading single values at random places is slow on
a TPU, and so are its gradient (a scatter) and the choice of uncertain points (a sort). Here, the pixels of a mask that
lie on the lattice arrive as bits, and the predictions there are the product of the mask embeddings and the mask
features, interpolated once per image. Every pixel is on the lattice with the same probability, and the pixels of one
step cover the image evenly. Points are chosen by weights, 0 for most pixels. The paper says nothing on this.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key, UInt8

from mqformer_jax.arrays import Array

OVERSAMPLE, UNCERTAIN = 3.0, 0.75  # as in Mask2Former: candidates per point, and the share of uncertain points
_BITS = 15  # of a bfloat16 without its sign


def at_offset(
    features: Float[Array, "h w d"], offset: Int[Array, " 2"], stride: int, feature_stride: int
) -> Float[Array, "h2 w2 d"]:
    """Interpolate a map at one pixel of each `stride` x `stride` pixels of the image.

    offset: row and column of the pixel in its square. feature_stride: pixels per cell of the map, a multiple of
    `stride`. Equals PointRend's sampling at the centers of these pixels: bilinear, with zeros outside the map.
    """
    for axis in (0, 1):
        size, shape = features.shape[axis], list(features.shape)
        around = jnp.pad(features, [(1, 1) if i == axis else (0, 0) for i in range(3)])
        before = jax.lax.slice_in_dim(around, 0, size, axis=axis)
        after = jax.lax.slice_in_dim(around, 2, size + 2, axis=axis)
        parts = []
        for first in range(0, feature_stride, stride):
            # distance from the cell's center, in cells
            distance = ((offset[axis] + first + 0.5) / feature_stride - 0.5).astype(features.dtype)
            near = 1 - jnp.abs(distance)
            parts.append(near * features + jnp.maximum(-distance, 0) * before + jnp.maximum(distance, 0) * after)
        shape[axis] *= len(parts)
        features = jnp.stack(parts, axis + 1).reshape(shape)
    return features


def unpack(bits: UInt8[Array, "*n h w8"], width: int) -> Bool[Array, "*n h w"]:
    """Return the first `width` pixels of each row of bits (`np.packbits`)."""
    pixels = (bits[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8)) & 1
    return pixels.reshape(*bits.shape[:-1], -1)[..., :width].astype(bool)


def step_of(shape: tuple[int, int], num_points: int) -> int:
    """Return the step between the rows and columns of a lattice of this shape that leaves about `num_points` pixels."""
    return max(1, int((shape[0] * shape[1] / num_points) ** 0.5))


def every(x: Array, step: int, start: Int[Array, " 2"], axis: int) -> Array:
    """Keep the rows and columns start, start + step, ... of a map. axis: of the rows; that of the columns follows."""
    for i in (0, 1):
        size = x.shape[axis + i] - x.shape[axis + i] % step
        parts = [jax.lax.slice_in_dim(x, first, size, step, axis=axis + i) for first in range(step)]
        x = parts[0] if step == 1 else jax.lax.select_n(jnp.broadcast_to(start[i], parts[0].shape), *parts)
    return x


def point_weights(
    key: Key[Array, ""], logits: Float[Array, "*n h w"], inside: Bool[Array, "h w"], num_points: int
) -> Float[Array, "*n h w"]:
    """Return how often each pixel counts in the loss of each mask: 0, 1 or 2 (PointRend on a lattice).

    `OVERSAMPLE * num_points` pixels are candidates, drawn at random for all masks of the image. Of these, each mask
    takes the quarter with the smallest |logit|, that is, three quarters of `num_points`. The last quarter are pixels
    drawn at random. All numbers are on average, for an image that fills the canvas. A lattice with fewer pixels than
    candidates has as many fewer points.

    inside: pixels of the image; others count 0.
    """
    size = inside.size
    points = min(num_points, size / OVERSAMPLE)
    draws = jax.random.uniform(key, (2, *inside.shape))
    candidates = inside & (draws[0] * size < OVERSAMPLE * points)
    uniform = inside & (draws[1] * size < (1 - UNCERTAIN) * points)
    magnitude = jax.lax.bitcast_convert_type(jnp.abs(logits).astype(jnp.bfloat16), jnp.uint16)
    magnitude = jnp.where(candidates, magnitude, jnp.uint16(1 << _BITS))
    limit = _quantile(magnitude, candidates, UNCERTAIN / OVERSAMPLE, step_of(inside.shape, num_points))
    return (magnitude <= limit).astype(jnp.float32) + uniform


def _quantile(values: Array, candidates: Bool[Array, "h w"], fraction: float, step: int) -> Array:
    """Return the smallest limit such that at least this fraction of the candidates' values are at most the limit.

    values: uint16 [*n h w], below 2^15 for candidates and above for others. Only every `step`-th row and column is
    read. The bits of the limit are found one by one, from the highest.
    """
    values, candidates = values[..., ::step, ::step], candidates[::step, ::step]
    wanted = fraction * candidates.sum()

    def next_bit(i, limit):
        lower = limit - (jnp.uint16(1) << (_BITS - 1 - i).astype(jnp.uint16))
        enough = (values <= lower).sum((-2, -1), keepdims=True) >= wanted
        return jnp.where(enough, lower, limit)

    highest = jnp.full((*values.shape[:-2], 1, 1), (1 << _BITS) - 1, jnp.uint16)
    return jax.lax.fori_loop(0, _BITS, next_bit, highest)
