"""The targets of one image, in the form that costs and losses use."""

from __future__ import annotations

from typing import no_type_check

import flax.struct
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, UInt8

from mqformer_jax.arrays import Array
from mqformer_jax.input.batch import Batch
from mqformer_jax.losses.points import sample_bits


@no_type_check  # see `Batch`
@flax.struct.dataclass
class ImageTargets:
    """n targets and p prompts of one image; rows from `num_targets` on are padding.

    exhaustive: valid prompts whose objects in the image are all labeled. canvas: height and width in pixels. For the
    other fields, see `Batch`.
    """

    num_targets: Int[Array, ""]
    size: Int[Array, " 2"]
    boxes: Float[Array, "n 4"]
    positive: Bool[Array, "n p"]
    negative: Bool[Array, "n p"]
    exhaustive: Bool[Array, " p"]
    has_mask: Bool[Array, " n"]
    masks: UInt8[Array, " m"]
    windows: Int[Array, "n 5"]
    ignore: UInt8[Array, "h w8"]
    canvas: tuple[int, int] = flax.struct.field(pytree_node=False)

    @classmethod
    def of_batch(cls, batch: Batch) -> ImageTargets:
        """Return the targets of all images: arrays with a leading batch axis, for `jax.vmap`."""
        return cls(
            num_targets=batch.num_targets,
            size=batch.size,
            boxes=batch.boxes,
            positive=batch.positive,
            negative=batch.negative,
            exhaustive=batch.prompt_valid & batch.prompt_exhaustive,
            has_mask=batch.has_mask,
            masks=batch.masks,
            windows=batch.windows,
            ignore=batch.ignore,
            canvas=batch.image.shape[1:3],
        )

    @property
    def extent(self) -> Float[Array, " 2"]:
        """Return the valid part of the canvas as fractions (x, y)."""
        h, w = self.canvas
        return self.size[::-1].astype(jnp.float32) / jnp.array([w, h], jnp.float32)

    def inside(self, shape: tuple[int, int]) -> Bool[Array, "h w"]:
        """Return which cells of a map of this shape have their center in the valid part of the canvas."""
        x, y = ((jnp.arange(n) + 0.5) / n < extent for n, extent in zip(shape[::-1], self.extent))
        return y[:, None] & x

    def sample_masks(self, rows: Int[Array, "*n"], points: Float[Array, "*n k 2"]) -> Float[Array, "*n k"]:
        """Return the masks of the targets `rows`, each at its own points (x, y as fractions of the canvas)."""
        return sample_bits(self.masks, self.windows[rows], self.canvas, points)

    def sample_ignore(self, points: Float[Array, "*n k 2"]) -> Float[Array, "*n k"]:
        """Return the ignored fraction (0 to 1) at each point. Points near the border read the outermost pixel."""
        h, w = self.canvas
        margin = 0.5 / jnp.array([w, h], jnp.float32)
        everywhere = jnp.broadcast_to(jnp.array([0, 0, 0, h, w // 8]), (*points.shape[:-2], 5))
        return sample_bits(self.ignore.reshape(-1), everywhere, (h, w), jnp.clip(points, margin, 1 - margin))
