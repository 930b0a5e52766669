"""PointRend's sampling of maps at points, as in the original losses: the oracle of supervision on a lattice."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def sample_maps(maps, points):
    """Sample maps [*n h w] at their own points [*n k 2] (x, y in 0..1), with zeros outside: torch's `grid_sample`."""
    h, w = maps.shape[-2:]
    flat = maps.reshape(*maps.shape[:-2], h * w)
    x, y = points[..., 0] * w - 0.5, points[..., 1] * h - 0.5
    total = 0
    for dx in (0, 1):
        for dy in (0, 1):
            xi, yi = jnp.floor(x) + dx, jnp.floor(y) + dy
            weight = (1 - jnp.abs(x - xi)) * (1 - jnp.abs(y - yi))
            inside = (xi >= 0) & (xi < w) & (yi >= 0) & (yi < h)
            index = jnp.clip(yi, 0, h - 1).astype(int) * w + jnp.clip(xi, 0, w - 1).astype(int)
            total += jnp.where(inside, weight, 0.0) * jnp.take_along_axis(flat, index, -1)
    return total


def lattice_points(canvas, stride, offset):
    """The centers of the lattice's pixels as fractions of the canvas: [h w 2] (x, y)."""
    rows, columns = (np.arange(o, side, stride) + 0.5 for o, side in zip(offset, canvas))
    x, y = np.meshgrid(columns / canvas[1], rows / canvas[0])
    return np.stack([x, y], -1).astype(np.float32)
