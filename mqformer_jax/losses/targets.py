"""The targets of an image as arrays for the matching costs and losses, unpacked from a `Batch`."""

from __future__ import annotations

from typing import no_type_check

import flax.struct
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mqformer_jax.arrays import Array
from mqformer_jax.input.batch import Batch
from mqformer_jax.losses import lattice


@no_type_check  # see `Batch`
@flax.struct.dataclass
class ImageTargets:
    """The n targets and p prompts of one image. Targets from index `num_targets` on are padding.

    exhaustive: whether the prompt is valid and all its objects in the image are labeled. offset: row and column of the
    lattice's pixel in its square (see losses/lattice.py). masks: the target masks at the pixels of the lattice. inside:
    whether a pixel of the lattice is inside the image. known: whether it is inside the image and not ignored. canvas:
    height and width of the padded image in pixels. For the remaining fields, see `Batch`.
    """

    num_targets: Int[Array, ""]
    size: Int[Array, " 2"]
    boxes: Float[Array, "n 4"]
    positive: Bool[Array, "n p"]
    negative: Bool[Array, "n p"]
    exhaustive: Bool[Array, " p"]
    has_mask: Bool[Array, " n"]
    offset: Int[Array, " 2"]
    masks: Bool[Array, "n h w"]
    inside: Bool[Array, "h w"]
    known: Bool[Array, "h w"]
    canvas: tuple[int, int] = flax.struct.field(pytree_node=False)

    @classmethod
    def of_batch(cls, batch: Batch) -> ImageTargets:
        """Return the targets of all images: arrays with a leading batch axis, for `jax.vmap`."""
        canvas = batch.image.shape[1:3]
        stride = canvas[0] // batch.masks.shape[2]
        width = canvas[1] // stride
        rows, columns = (
            stride * jnp.arange(side // stride) + batch.offset[:, i, None] < batch.size[:, i, None]
            for i, side in enumerate(canvas)
        )
        inside = rows[:, :, None] & columns[:, None]
        same = ("num_targets", "size", "boxes", "positive", "negative", "has_mask", "offset")
        return cls(
            **{name: getattr(batch, name) for name in same},
            exhaustive=batch.prompt_valid & batch.prompt_exhaustive,
            masks=lattice.unpack(batch.masks, width),
            inside=inside,
            known=inside & ~lattice.unpack(batch.ignore, width),
            canvas=canvas,
        )

    def on_lattice(self, features: Float[Array, "h2 w2 d"]) -> Float[Array, "h w d"]:
        """Return the mask features at the pixels of the lattice, the grid on which masks are compared."""
        stride = self.canvas[0] // self.known.shape[-2]
        return lattice.at_offset(features, self.offset, stride, self.canvas[0] // features.shape[0])

    def centers_inside(self, shape: tuple[int, int]) -> Bool[Array, "h w"]:
        """Return which cells of a map of this shape (height, width) have their center inside the image."""
        rows, columns = (
            (jnp.arange(n) + 0.5) * (side / n) < valid for n, side, valid in zip(shape, self.canvas, self.size)
        )
        return rows[:, None] & columns
