"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021), in plain JAX.

The operation `ms_deform_attn` has three implementations: "reference" (a gather for each of the four pixels around a
sampling point, its corners), "rows" (for CPUs and GPUs) and "lanes" (for TPUs). The operation is limited by memory
bandwidth. Therefore, "rows" and "lanes" pack the four corners into one row, and one gather reads the whole row. With 32
channels per head, a row has 128 numbers, which is the number of lanes of a TPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from mqformer_jax.arrays import Array
from mqformer_jax.models import layers
from mqformer_jax.parallel.mesh import over_heads

Shapes = Sequence[tuple[int, int]]
PART = 32 << 20  # most bytes of gathered rows' gradients that `_lanes` computes at once; a TPU v5e has 128 MiB on chip


def ms_deform_attn(
    value: Float[Array, "b s heads dh"],
    shapes: Shapes,
    locations: Float[Array, "b q heads levels points 2"],
    weights: Float[Array, "b q heads levels points"],
    implementation: str | None = None,
) -> Float[Array, "b q heads*dh"]:
    """Return weighted sums of bilinear samples of several maps, in float32. Gradients are summed in float32 too.

    value: the pixels of all maps, one map after the other, each row by row. shapes: (h, w) of each map. locations: x, y
    of the sampling points; 0 and 1 are the outer edges of a map. Outside, a map counts as zero (as in torch's
    `grid_sample` with align_corners=False and zero padding). weights: weight of each sampling point. implementation:
    "reference", "rows" or "lanes"; None selects "lanes" on TPUs and "rows" elsewhere.
    """
    if implementation == "reference":
        return _reference(value, shapes, locations, weights)
    batch, queries, heads, *_ = locations.shape
    rows = _pack(value, shapes)
    cell, corners = _corners(locations.astype(jnp.float32), shapes)
    index = cell.reshape(batch, queries, heads, -1)
    corners = (corners * weights[..., None].astype(jnp.float32)).reshape(*index.shape, 4)
    if implementation is None:
        return jax.lax.platform_dependent(rows, index, corners, tpu=_lanes, default=_rows)
    return {"rows": _rows, "lanes": _lanes}[implementation](rows, index, corners)


def _reference(value, shapes, locations, weights):
    """Return the same as `ms_deform_attn`, with one gather for each of the four pixels around a sampling point."""
    batch, queries, heads, *_ = locations.shape
    value, start = value.astype(jnp.float32), 0
    total = jnp.zeros((batch, heads, queries, value.shape[-1]))
    for level, (h, w) in enumerate(shapes):
        maps = value[:, start : start + h * w].transpose(0, 2, 1, 3)  # b heads h*w dh
        start += h * w
        pixel = locations[:, :, :, level].transpose(0, 2, 1, 3, 4) * np.array([w, h], np.float32) - 0.5
        first = jnp.floor(jax.lax.stop_gradient(pixel))
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            x, y = jnp.moveaxis(first + np.array(corner, np.float32), -1, 0)
            share = jnp.prod(1 - jnp.abs(pixel - jnp.stack([x, y], -1)), -1)
            inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
            index = jnp.where(inside, y * w + x, 0).astype(jnp.int32).reshape(batch, heads, -1, 1)
            picked = jnp.take_along_axis(maps, index, 2).reshape(*x.shape, -1)
            share = jnp.where(inside, share, 0) * weights[:, :, :, level].transpose(0, 2, 1, 3)
            total += (picked * share[..., None]).sum(3)
    return total.transpose(0, 2, 1, 3).reshape(batch, queries, -1)


def _pack(value: Float[Array, "b s heads dh"], shapes: Shapes) -> Float[Array, "b cells heads 4*dh"]:
    """Pack the maps into one row per cell and head: (h + 1) * (w + 1) cells per map.

    A cell is the square between four neighboring pixels. Cell (y, x) holds the pixels (y-1, x-1), (y-1, x), (y, x-1),
    (y, x), with zeros outside the map.
    """
    batch, _, heads, dh = value.shape
    packed, start = [], 0
    for h, w in shapes:
        maps = value[:, start : start + h * w].reshape(batch, h, w, heads, dh)
        p = jnp.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
        cells = jnp.concatenate([p[:, :-1, :-1], p[:, :-1, 1:], p[:, 1:, :-1], p[:, 1:, 1:]], -1)
        packed.append(cells.reshape(batch, -1, heads, 4 * dh))
        start += h * w
    return jnp.concatenate(packed, 1)


def _corners(
    locations: Float[Array, "b q heads levels points 2"], shapes: Shapes
) -> tuple[Int[Array, "b q heads levels points"], Float[Array, "b q heads levels points 4"]]:
    """Return the index of the cell around each sampling point (see `_pack`), and the bilinear weights of its pixels.

    Points more than one pixel outside the map are clipped to one pixel outside. There, all weight falls on the zeros
    with which the map is padded.
    """
    size = np.array([(w, h) for h, w in shapes], np.float32)[:, None]
    pixel = jnp.clip(locations * size - 0.5, -1.0, size)
    first = jnp.minimum(jnp.floor(jax.lax.stop_gradient(pixel)), size - 1)
    right, down = jnp.moveaxis(pixel - first, -1, 0)
    column, row = jnp.moveaxis(first.astype(jnp.int32) + 1, -1, 0)
    corner = jnp.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], -1)
    cells = np.array([(h + 1) * (w + 1) for h, w in shapes])
    offset, width = np.cumsum(cells) - cells, np.array([w + 1 for _, w in shapes])
    return offset[:, None] + row * width[:, None] + column, corner


def _pick(rows: Float[Array, "b r c"], index: Int[Array, "b ..."]) -> Float[Array, "b ... c"]:
    picked = jax.vmap(lambda r, i: r.at[i].get(mode="clip"))(rows, index.reshape(index.shape[0], -1))
    return picked.reshape(*index.shape, -1)


@jax.custom_vjp
def _gather(rows: Float[Array, "b r c"], index: Int[Array, "b ..."]) -> Float[Array, "b ... c"]:
    """Return the rows at `index` in float32, so that their gradients are summed in float32 too."""
    return _pick(rows, index).astype(jnp.float32)


def _scatter(
    total: Float[Array, "b r c"], index: Int[Array, "b ..."], gradient: Float[Array, "b ... c"]
) -> Float[Array, "b r c"]:
    """Return `total` plus the gradients of the gathered rows, each added to the row at its index."""
    flat = index.reshape(index.shape[0], -1)
    add = jax.vmap(lambda t, i, g: t.at[i].add(g, mode="clip"))
    return add(total, flat, gradient.reshape(*flat.shape, -1))


def _gather_backward(residuals, gradient):
    rows, index = residuals
    return _scatter(jnp.zeros(rows.shape, jnp.float32), index, gradient).astype(rows.dtype), None


_gather.defvjp(lambda rows, index: (_gather(rows, index), (rows, index)), _gather_backward)


@jax.checkpoint
def _rows(
    rows: Float[Array, "b cells heads c"], index: Int[Array, "b q heads n"], corners: Float[Array, "b q heads n 4"]
) -> Float[Array, "b q heads*c//4"]:
    """Return the weighted sum over points and corners, as one vector-matrix product per query and head.

    With three levels and four points, each query gathers 48 times as many numbers as it returns. The backward pass
    gathers the rows again, which is faster than storing them.
    """
    batch, _, heads, lanes = rows.shape
    split = (*index.shape[:3], -1, lanes // 4)
    flat = index * heads + np.arange(heads)[:, None]
    picked = _gather(rows.reshape(batch, -1, lanes), flat).reshape(split)
    weights = corners.reshape(*index.shape[:3], 1, -1)
    summed = jnp.matmul(weights, picked, precision="highest", preferred_element_type=jnp.float32)
    return summed.reshape(*index.shape[:2], -1)


def _lanes(
    rows: Float[Array, "b cells heads c"], index: Int[Array, "b q heads n"], corners: Float[Array, "b q heads n 4"]
) -> Float[Array, "b q heads*c//4"]:
    """Return the same as `_rows`, with a memory layout for TPUs (slow on CPUs).

    The gathered rows cause most of the memory traffic. Several measures keep it low. A lane is one number of a row.

    - Heads are processed one by one, and queries in parts, so that the rows of a head, their gradient, and the rows
      gathered for a part of the queries fit into on-chip memory together.
    - The last two axes of the gathered rows are queries and lanes, so that no reshape moves data. If they were points
      and lanes, the 12 points of three levels would be padded to 16, a multiple of the eight rows of a tile.
    - Matmuls with matrices of zeros and ones repeat the four corner weights over lanes and sum the corners. So the axis
      of lanes is never split.
    - Barriers fix the layout of the rows and their gradients. Without them, XLA converts or broadcasts the rows in
      memory in separate passes.
    - The backward pass gathers the rows again, which is faster than storing them.
    """
    batch, queries, heads, points = index.shape
    parts = _parts(queries, batch * points * rows.shape[-1] * 4)
    split = lambda x: x.reshape(batch, parts, queries // parts, *x.shape[2:])
    index, corners = split(index).transpose(3, 1, 0, 4, 2), split(corners).transpose(3, 1, 0, 4, 5, 2)
    summed = _weigh_rows(rows.transpose(2, 0, 1, 3), index, corners)
    return summed.transpose(2, 1, 3, 0, 4).reshape(batch, queries, -1)


def _parts(queries: int, size: int) -> int:
    """Return into how many parts of equal size to split the queries, so that a part has at most `PART` bytes.

    size: bytes of the gradients of the rows that one head gathers for one query. If the number of queries has no
    suitable divisor, all queries are one part.
    """
    tile = 8  # rows of a tile
    fits = lambda parts: queries % (parts * tile) == 0 and queries // parts * size <= PART
    return 1 if queries * size <= PART else next(filter(fits, range(2, queries // tile + 1)), 1)


@jax.custom_vjp
def _weigh_rows(
    rows: Float[Array, "heads b r c"], index: Int[Array, "heads p b n q"], corners: Float[Array, "heads p b n 4 q"]
) -> Float[Array, "heads p b q dh"]:
    return _weigh_forward(rows, index, corners)[0]


def _weigh_forward(rows, index, corners):
    lanes = rows.shape[-1]

    def head(inputs):
        rows, *of_parts = inputs

        def part(inputs):
            index, corners = inputs
            picked = jax.lax.optimization_barrier(_pick(rows, index))
            summed = (picked * _widen(corners, lanes)).sum(1)
            return jnp.einsum("bql,ld->bqd", summed, _fold(lanes), precision="highest")

        return jax.lax.map(part, tuple(of_parts))

    return jax.lax.map(head, (rows, index, corners)), (rows, index, corners)


def _weigh_backward(residuals, gradient):
    """Return the gradients of the rows and of the corner weights."""
    lanes = residuals[0].shape[-1]

    def head(inputs):
        rows, *of_parts = inputs

        def part(total, inputs):
            index, corners, gradient = inputs
            picked = jax.lax.optimization_barrier(_pick(rows, index))
            gradient = jnp.einsum("bqd,ld->bql", gradient, _fold(lanes), precision="highest")[:, None]
            of_corners = jnp.einsum("bnql,kl->bnkq", picked * gradient, _ones(lanes), precision="highest")
            of_picked = jax.lax.optimization_barrier(_widen(corners, lanes) * gradient)
            return _scatter(total, index, of_picked), of_corners

        total, of_corners = jax.lax.scan(part, jnp.zeros_like(rows, jnp.float32), tuple(of_parts))
        return total.astype(rows.dtype), of_corners

    of_rows, of_corners = jax.lax.map(head, (*residuals, gradient))
    return of_rows, None, of_corners


_weigh_rows.defvjp(_weigh_forward, _weigh_backward)


def _widen(corners: Float[Array, "b n 4 q"], lanes: int) -> Float[Array, "b n q lanes"]:
    """Repeat each corner's weight over the corner's lanes: the `lanes` / 4 numbers of a row that belong to it."""
    return jnp.einsum("bnkq,kl->bnql", corners, _ones(lanes), precision="highest")


def _ones(lanes: int) -> Float[np.ndarray, "4 lanes"]:
    """Return a 0/1 matrix. A product with it repeats each of four corner weights for all channels of this corner."""
    return np.kron(np.eye(4), np.ones((1, lanes // 4))).astype(np.float32)


def _fold(lanes: int) -> Float[np.ndarray, "lanes dh"]:
    """Return the 0/1 matrix that sums the four corners: the four lanes of each channel."""
    return np.kron(np.ones((4, 1)), np.eye(lanes // 4)).astype(np.float32)


class MSDeformAttn(nnx.Module):
    """Attention of each query to learned locations around its reference point or box, in each of `levels` maps.

    Each head has `num_sampling_points` locations per map. Offsets and weights are computed in float32 for any `dtype`,
    as in Mask DINO's mixed precision. Initially, each head samples in its own direction with equal weights: 1 to
    `num_sampling_points` pixels from a reference point, or at equal steps from the center of a reference box to its
    edge.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        levels: int,
        num_sampling_points: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        if width % heads:
            raise ValueError(
                f"config.model.width = {width} must be divisible by config.model.heads = {heads}: change one of them."
            )
        self.heads, self.levels, self.num_sampling_points = heads, levels, num_sampling_points
        zeros, samples = nnx.initializers.zeros, heads * levels * num_sampling_points
        star = jnp.asarray(_star(heads, levels, num_sampling_points))
        self.sampling_offsets = layers.linear(
            width, 2 * samples, kernel_init=zeros, bias_init=lambda *_: star, rngs=rngs
        )
        self.attention_weights = layers.linear(width, samples, kernel_init=zeros, rngs=rngs)
        self.value_proj = layers.linear(width, width, rngs=rngs, dtype=dtype)
        self.output_proj = layers.linear(width, width, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        query: Float[Array, "b q c"],
        reference: Float[Array, "b q levels d"],
        memory: Float[Array, "b s c"],
        shapes: Shapes,
        valid: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b q c"]:
        """Return the attended values.

        reference: a point x, y (d = 2) or a box cx, cy, w, h (d = 4), as fractions of each map. Around a point, the
        unit of the learned offsets is one pixel of the map. Around a box, an offset of `num_sampling_points` reaches
        from the center to the edge of the box. memory: the tokens of all maps; tokens that are not `valid` count as
        zero. shapes: (h, w) of each map.
        """
        value = self.value_proj(memory)
        if valid is not None:
            value = jnp.where(valid[..., None], value, 0)
        split = (*query.shape[:2], self.heads, self.levels, self.num_sampling_points)
        offsets = self.sampling_offsets(query).reshape(*split, 2)
        weights = self.attention_weights(query).reshape(*split[:3], -1)
        weights = jax.nn.softmax(weights).reshape(split)
        reference = reference.astype(jnp.float32)[:, :, None, :, None]
        if reference.shape[-1] == 2:
            locations = reference + offsets / np.array(shapes, np.float32)[:, None, ::-1]
        else:
            locations = reference[..., :2] + offsets / self.num_sampling_points * reference[..., 2:] * 0.5
        value = value.reshape(*value.shape[:2], self.heads, -1)
        sample = over_heads(
            lambda value, locations, weights: ms_deform_attn(value, shapes, locations, weights), self.heads
        )
        sampled = sample(value, locations, weights).astype(self.output_proj.dtype)
        return self.output_proj(checkpoint_name(sampled, layers.SAMPLED))


def _star(heads: int, levels: int, num_sampling_points: int) -> np.ndarray:
    """Return the initial offsets x, y of all sampling points as a flat array.

    Head i samples in the direction of the angle 2 pi i / heads. For its point k (from 0), max(|x|, |y|) is k + 1.
    """
    angle = np.arange(heads) * (2 * math.pi / heads)
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    direction /= np.abs(direction).max(-1, keepdims=True)
    grid = direction[:, None, None] * np.arange(1, num_sampling_points + 1)[:, None]
    return np.broadcast_to(grid, (heads, levels, num_sampling_points, 2)).astype(np.float32).reshape(-1)
