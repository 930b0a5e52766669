"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021), in plain JAX.

The op is bound by memory, so the four pixels around a sampling point lie side by side in one row and come with one gather.
With 32 channels a head that row has 128 numbers, the width of a TPU's lane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mqformer_jax.models import layers

Shapes = Sequence[tuple[int, int]]


def ms_deform_attn(
    value: Float[Array, "b s heads dh"],
    shapes: Shapes,
    locations: Float[Array, "b q heads levels points 2"],
    weights: Float[Array, "b q heads levels points"],
) -> Float[Array, "b q heads*dh"]:
    """Weighted sum of bilinear samples of several maps.

    value: the maps, row by row, one after the other. shapes: (h, w) of each. locations: x, y, where 0 and 1 are the outer edges
    of a map; outside it the value is zero (torch's `grid_sample` with align_corners=False and zero padding). Returns float32.
    """
    batch, queries, heads, _, points, _ = locations.shape
    dh = value.shape[-1]
    rows, index, corners = [], [], []
    offset = start = 0
    for level, (h, w) in enumerate(shapes):
        rows.append(_pack(value[:, start : start + h * w].reshape(batch, h, w, heads, dh)))
        cell, corner = _corners(locations[:, :, :, level].astype(jnp.float32), h, w)
        index.append(offset + cell)
        corners.append(corner)
        start, offset = start + h * w, offset + (h + 1) * (w + 1)
    index = jnp.stack(index, 3) * heads + np.arange(heads)[:, None, None]
    picked = _gather(jnp.concatenate(rows, 1).reshape(batch, -1, 4 * dh), index.reshape(batch, -1))
    picked = picked.reshape(batch, queries, heads, -1, 4 * dh)
    corners = (jnp.stack(corners, 3) * weights[..., None].astype(jnp.float32)).reshape(batch, queries, heads, -1, 4)
    folded = jax.lax.platform_dependent(picked, corners, tpu=_fold_in_lanes, default=_fold)
    return folded.reshape(batch, queries, heads * dh)


def _pack(maps: Float[Array, "b h w heads dh"]) -> Float[Array, "b cells heads 4*dh"]:
    """Row (y, x) holds the pixels (y-1, x-1), (y-1, x), (y, x-1), (y, x), zeros outside: (h + 1) * (w + 1) rows."""
    p = jnp.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
    packed = jnp.concatenate([p[:, :-1, :-1], p[:, :-1, 1:], p[:, 1:, :-1], p[:, 1:, 1:]], -1)
    return packed.reshape(packed.shape[0], -1, *packed.shape[3:])


def _corners(location: Float[Array, "... 2"], h: int, w: int) -> tuple[Int[Array, "..."], Float[Array, "... 4"]]:
    """The packed row of each point and the bilinear weights of its four pixels.

    A point is moved to at most one pixel outside the map; there its whole weight lies on the zeros around the map.
    """
    size = np.array([w, h], np.float32)
    pixel = jnp.clip(location * size - 0.5, -1.0, size)
    first = jnp.minimum(jnp.floor(jax.lax.stop_gradient(pixel)), size - 1)
    right, down = jnp.moveaxis(pixel - first, -1, 0)
    column, row = jnp.moveaxis(first.astype(jnp.int32) + 1, -1, 0)
    corner = jnp.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], -1)
    return row * (w + 1) + column, corner


def _gather(rows: Float[Array, "b r c"], index: Int[Array, "b n"]) -> Float[Array, "b n c"]:
    return jax.vmap(lambda r, i: r.at[i].get(mode="clip"))(rows, index)


def _fold(picked: Float[Array, "... n 4*dh"], corners: Float[Array, "... n 4"]) -> Float[Array, "... dh"]:
    """Sum over points and corners, each corner's block of dh numbers times its weight."""
    picked = picked.reshape(*corners.shape, -1)
    return jnp.einsum("...nkd,...nk->...d", picked, corners, precision="highest", preferred_element_type=jnp.float32)


def _fold_in_lanes(picked: Float[Array, "... n 4*dh"], corners: Float[Array, "... n 4"]) -> Float[Array, "... dh"]:
    """The same without a reshape, which on TPU would split the lanes: half the traffic there, six times the time on CPU.

    Matmuls with zeros and ones widen the weights to the rows, and fold the corners of the sum.
    """
    dh = picked.shape[-1] // 4
    widen, fold = np.kron(np.eye(4), np.ones((1, dh))), np.kron(np.ones((4, 1)), np.eye(dh))
    wide = jnp.matmul(corners, widen.astype(np.float32), precision="highest")
    return jnp.matmul((picked * wide).sum(-2), fold.astype(np.float32), precision="highest")


class MSDeformAttn(nnx.Module):
    """Each query looks at `points` learned places around its reference, in each of `levels` maps.

    Offsets and weights are computed in float32 whatever `dtype`, as Mask DINO does under mixed precision. At the start every
    query looks along `heads` directions, 1 to `points` pixels out, with equal weights.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        if width % heads:
            raise ValueError(f"MSDeformAttn: width {width} is not a multiple of heads {heads}.")
        self.heads, self.levels, self.points = heads, levels, points
        zeros, samples = nnx.initializers.zeros, heads * levels * points
        star = jnp.asarray(_star(heads, levels, points))
        self.sampling_offsets = layers.linear(width, 2 * samples, kernel_init=zeros, bias_init=lambda *_: star, rngs=rngs)
        self.attention_weights = layers.linear(width, samples, kernel_init=zeros, rngs=rngs)
        self.value_proj = layers.linear(width, width, rngs=rngs, dtype=dtype)
        self.output_proj = layers.linear(width, width, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        query: Float[Array, "b q c"],
        reference: Float[Array, "b q levels 2|4"],
        memory: Float[Array, "b s c"],
        shapes: Shapes,
        valid: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b q c"]:
        """reference: x, y or cx, cy, w, h as fractions of each map; offsets count in pixels of the map around a point, and in
        half-sizes of the box over `points` around a box. memory: the maps' tokens; those not `valid` count as zero."""
        value = self.value_proj(memory)
        if valid is not None:
            value = jnp.where(valid[..., None], value, 0)
        split = (*query.shape[:2], self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).reshape(*split, 2)
        weights = self.attention_weights(query).reshape(*split[:3], -1)
        weights = jax.nn.softmax(weights).reshape(split)
        reference = reference.astype(jnp.float32)[:, :, None, :, None]
        if reference.shape[-1] == 2:
            locations = reference + offsets / np.array(shapes, np.float32)[:, None, ::-1]
        else:
            locations = reference[..., :2] + offsets / self.points * reference[..., 2:] * 0.5
        value = value.reshape(*value.shape[:2], self.heads, -1)
        return self.output_proj(ms_deform_attn(value, shapes, locations, weights))


def _star(heads: int, levels: int, points: int) -> np.ndarray:
    """Initial offsets: head i points in direction 2 pi i / heads, scaled to the unit square; point k lies k + 1 out."""
    angle = np.arange(heads) * (2 * math.pi / heads)
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    direction /= np.abs(direction).max(-1, keepdims=True)
    grid = direction[:, None, None] * np.arange(1, points + 1)[:, None]
    return np.broadcast_to(grid, (heads, levels, points, 2)).astype(np.float32).reshape(-1)
