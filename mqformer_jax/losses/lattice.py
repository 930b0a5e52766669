"""Compare masks on a lattice: one pixel of each square of pixels, at an offset drawn for each image and step.

Mask2Former and Mask DINO compare masks at random points (PointRend). This is slow on a TPU: it reads single values at
random places, its gradient is a scatter, and it sorts points to find the uncertain ones.

Here, a batch contains the target masks only at the pixels of the lattice, as bits. The predicted masks are computed at
the same pixels, as products of the mask embeddings and the mask features, which are interpolated once per image. Every
pixel is on the lattice with the same probability, and the pixels of one step cover the image evenly. Points are chosen
by a weight for each pixel, which is 0 for most pixels. The paper does not say at which points masks are compared.
"""

from __future__ import annotations

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key, UInt8

from mqformer_jax.arrays import Array

OVERSAMPLE, UNCERTAIN = 3.0, 0.75  # as in Mask2Former: candidates per point, and fraction of points that are uncertain
_BITS = 15  # number of bits of a bfloat16 without the sign


def at_offset(
    features: Float[Array, "h w d"], offset: Int[Array, " 2"], stride: int, feature_stride: int
) -> Float[Array, "h2 w2 d"]:
    """Interpolate a feature map at one pixel of each square of `stride` x `stride` image pixels.

    offset: row and column of the pixel in its square. feature_stride: side of a cell of the feature map in image
    pixels, a multiple of `stride`. The result equals PointRend's sampling at the centers of these pixels: bilinear
    interpolation, with zeros outside the map.
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
    """Unpack the bits written by `np.packbits`. Return the first `width` pixels of each row."""
    pixels = (bits[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8)) & 1
    return pixels.reshape(*bits.shape[:-1], -1)[..., :width].astype(bool)


def step_of(shape: tuple[int, int], num_points: int) -> int:
    """Return k such that a lattice of this shape has about `num_points` pixels in every k-th row and column."""
    return max(1, int((shape[0] * shape[1] / num_points) ** 0.5))


def every(x: Array, step: int, start: Int[Array, " 2"], axis: int) -> Array:
    """Return every `step`-th row and column of a map, from row `start[0]` and column `start[1]` on.

    axis: the axis of the rows; the next one is the axis of the columns. Rows and columns beyond the last multiple of
    `step` are dropped.
    """
    for i in (0, 1):
        size = x.shape[axis + i] - x.shape[axis + i] % step
        parts = [jax.lax.slice_in_dim(x, first, size, step, axis=axis + i) for first in range(step)]
        x = parts[0] if step == 1 else jax.lax.select_n(jnp.broadcast_to(start[i], parts[0].shape), *parts)
    return x


@no_type_check  # see `Batch`
@flax.struct.dataclass
class DrawnPixels:
    """Pixels of an image's lattice that are drawn at random, the same for all masks of the image.

    candidates: pixels of which the uncertain ones count. uniform: pixels that count in any case. step: the limit of
    uncertainty is estimated from every `step`-th row and column.
    """

    candidates: Bool[Array, "h w"]
    uniform: Bool[Array, "h w"]
    step: int = flax.struct.field(pytree_node=False)


def draw_pixels(key: Key[Array, ""], inside: Bool[Array, "h w"], num_points: int) -> DrawnPixels:
    """Draw `OVERSAMPLE * num_points` candidates, and a quarter of `num_points` pixels that count in any case.

    These numbers are averages, for an image that fills the canvas. If the lattice has fewer than
    `OVERSAMPLE * num_points` pixels, all pixels are candidates, and a third of their number replaces `num_points`.

    inside: True for pixels of the image; others are not drawn.
    """
    size = inside.size
    points = min(num_points, size / OVERSAMPLE)
    draws = jax.random.uniform(key, (2, *inside.shape))
    candidates = draws[0] * size < OVERSAMPLE * points
    uniform = draws[1] * size < (1 - UNCERTAIN) * points
    return DrawnPixels(inside & candidates, inside & uniform, step_of(inside.shape, num_points))


def point_weights(drawn: DrawnPixels, logits: Float[Array, "*n h w"]) -> Float[Array, "*n h w"]:
    """Return the weight of each pixel in the loss of each mask: 0, 1 or 2 (PointRend on a lattice).

    For each mask, the quarter of the candidates with the smallest |logit| gets weight 1. The weight of the `uniform`
    pixels increases by 1. The sum of the weights is about the `num_points` of `draw_pixels`.
    """
    magnitude = jax.lax.bitcast_convert_type(jnp.abs(logits).astype(jnp.bfloat16), jnp.uint16)
    magnitude = jnp.where(drawn.candidates, magnitude, jnp.uint16(1 << _BITS))
    limit = _quantile(magnitude, drawn.candidates, UNCERTAIN / OVERSAMPLE, drawn.step)
    return (magnitude <= limit).astype(jnp.float32) + drawn.uniform


def _quantile(values: Array, candidates: Bool[Array, "h w"], fraction: float, step: int) -> Array:
    """Return a quantile of the candidates' values, one for each map.

    It is the smallest limit that at least `fraction` of these values do not exceed. It is found bit by bit, starting
    with the highest bit.

    values: uint16 [*n h w], less than 2^15 for candidates and 2^15 for all other pixels. Only every `step`-th row and
    column is read.
    """
    values, candidates = values[..., ::step, ::step], candidates[::step, ::step]
    wanted = fraction * candidates.sum()

    def next_bit(i, limit):
        lower = limit - (jnp.uint16(1) << (_BITS - 1 - i).astype(jnp.uint16))
        enough = (values <= lower).sum((-2, -1), keepdims=True) >= wanted
        return jnp.where(enough, lower, limit)

    highest = jnp.full((*values.shape[:-2], 1, 1), (1 << _BITS) - 1, jnp.uint16)
    return jax.lax.fori_loop(0, _BITS, next_bit, highest)
