"""Sample masks at points, so that losses need not read every pixel (PointRend; Mask2Former)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from mqformer_jax.arrays import Array


def _corners(points: Float[Array, "... 2"], h: int, w: int):
    """Return the four pixels around each point as (x, y, bilinear weight); the weight is zero outside the map."""
    x, y = points[..., 0] * w - 0.5, points[..., 1] * h - 0.5
    x0, y0 = jnp.floor(x), jnp.floor(y)
    corners = []
    for dx in (0, 1):
        for dy in (0, 1):
            xi, yi = x0 + dx, y0 + dy
            weight = (1 - jnp.abs(x - xi)) * (1 - jnp.abs(y - yi))
            inside = (xi >= 0) & (xi < w) & (yi >= 0) & (yi < h)
            xi, yi = jnp.clip(xi, 0, w - 1).astype(jnp.int32), jnp.clip(yi, 0, h - 1).astype(jnp.int32)
            corners.append((xi, yi, jnp.where(inside, weight, 0.0)))
    return corners


def sample_maps(maps: Float[Array, "*n h w"], points: Float[Array, "*n k 2"]) -> Float[Array, "*n k"]:
    """Sample each map at its own points (x, y in 0..1): torch's `grid_sample(align_corners=False)`, zero outside.

    The maps are indexed as one flat array, since `take_along_axis` would build an index over every axis for each point.
    """
    *n, h, w = maps.shape
    flat, start = maps.reshape(-1), h * w * np.arange(math.prod(n), dtype=np.int32).reshape(*n, 1)
    return sum(wt * flat[start + y * w + x] for x, y, wt in _corners(points, h, w))


def sample_features(features: Float[Array, "h w d"], points: Float[Array, "k 2"]) -> Float[Array, "k d"]:
    """Sample a feature map at points (x, y in 0..1), zero outside."""
    h, w, d = features.shape
    flat = features.reshape(h * w, d)
    return sum(wt[:, None].astype(flat.dtype) * flat[y * w + x] for x, y, wt in _corners(points, h, w))


def sample_bits(
    bits: UInt8[Array, " m"], windows: Int[Array, "*n 5"], canvas: tuple[int, int], points: Float[Array, "*n k 2"]
) -> Float[Array, "*n k"]:
    """Sample bit-packed masks, each at its own points. Only the bytes that are read are unpacked.

    windows: location of each mask in `bits` and on the canvas (height, width), see `Batch.windows`. A mask is zero
    outside its window.
    """
    start, top, left, height, width = (windows[..., i, None] for i in range(5))

    def pixel(x, y):
        row, column = y - top, x // 8 - left
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        byte = bits[jnp.where(inside, start + row * width + column, 0)]
        return (((byte >> (7 - x % 8).astype(jnp.uint8)) & 1) * inside).astype(jnp.float32)

    return sum(wt * pixel(x, y) for x, y, wt in _corners(points, *canvas))


def least(values: Float[Array, "*n m"], k: int) -> Int[Array, "*n k"]:
    """Return the indices of the k smallest of m numbers >= 0, in any order. Ties go to the first."""
    by_sorting = lambda x: jax.lax.top_k(-x, k)[1]
    return jax.lax.platform_dependent(values, cpu=lambda x: _least_by_counting(x, k), default=by_sorting)


def _least_by_counting(values: Float[Array, "*n m"], k: int) -> Int[Array, "*n k"]:
    """Return the same as `least`, by bisection for the k-th smallest: on CPU, 3.5 times as fast as XLA's top-k.

    The bisection runs on bit patterns, which have the same order as the floats.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = (bits <= middle[..., None]).sum(-1) >= k
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    n = values.shape[:-1]
    _, last = jax.lax.fori_loop(0, 32, halve, (jnp.full(n, -1), jnp.full(n, np.iinfo(np.int32).max - 1)))
    below, equal = bits < last[..., None], bits == last[..., None]
    taken = below | (equal & (jnp.cumsum(equal, -1) <= k - below.sum(-1, keepdims=True)))
    find = lambda counts: jnp.searchsorted(counts, jnp.arange(1, k + 1, dtype=counts.dtype))
    return jnp.vectorize(find, signature="(m)->(k)")(jnp.cumsum(taken, -1))


def uncertain_points(
    key: Array,
    logits: Float[Array, "*n h w"],
    extent: Float[Array, " 2"],
    k: int,
    oversample: float = 3.0,
    share: float = 0.75,
) -> Float[Array, "*n k 2"]:
    """Return k points per map: a `share` of uncertain points, the rest uniformly random (PointRend).

    The uncertain points are those with the smallest |logit| among `oversample * k` random points. extent: the valid
    part of the canvas as fractions (x, y); all points lie inside it.
    """
    n = logits.shape[:-2]
    candidate_key, rest_key = jax.random.split(key)
    candidates = jax.random.uniform(candidate_key, (*n, int(k * oversample), 2)) * extent
    chosen = int(share * k)
    index = least(jnp.abs(sample_maps(logits, candidates)), chosen)
    uncertain = jnp.take_along_axis(candidates, index[..., None], -2)
    return jnp.concatenate([uncertain, jax.random.uniform(rest_key, (*n, k - chosen, 2)) * extent], -2)
