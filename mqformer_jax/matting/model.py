"""The matting refiner: an image and a mask in, the share of each pixel that the masked object covers (its alpha)
out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.models import layers
from mqformer_jax.models.backbone import make_backbone
from mqformer_jax.models.convnet import ConvLayerNorm

WINDOWS = (17, 41)  # pixels of stride 4: how far the colors of object and ground are gathered from
SEEN = 4 + len(WINDOWS)  # image, guidance, what the colors say


class Level(nnx.Module):
    """One stride of the decoder: what comes from above, the encoder's feature and the pixels, joined; and the
    correction read from it.
    """

    def __init__(self, above: int, feature: int, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.lateral = layers.Conv(feature, width, rngs=rngs, dtype=dtype) if feature else None
        # else it would drown the guidance
        self.norm = layers.layer_norm(width, rngs=rngs, dtype=dtype) if feature else None
        self.join = ConvLayerNorm(above + (width if feature else 0) + SEEN, width, rngs=rngs, dtype=dtype)
        self.block = ConvLayerNorm(width, width, rngs=rngs, dtype=dtype)
        self.head = layers.Conv(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        above: Float[Array, "b h w a"] | None,
        feature: Float[Array, "b h w f"] | None,
        seen: Float[Array, "b h w 6"],
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w 1"]]:
        side = None if feature is None else self.norm(self.lateral(feature))
        x = jax.nn.relu(self.join(jnp.concatenate([part for part in (above, side, seen) if part is not None], -1)))
        x = jax.nn.relu(x + self.block(x))
        return x, self.head(x).astype(jnp.float32)


class MattingRefiner(nnx.Module):
    """Mask-guided matting with progressive refinement, in the spirit of MGMatting (Yu et al., CVPR 2021).

    A U-shaped network over one of our image encoders, which never sees the mask and so may come from any pre-training.
    Every level of the decoder, down to single pixels, sees the image, the guidance and what the colors say (`unmixed`)
    at its stride, and adds its correction to those of the coarser ones. All corrections start at zero: an untrained
    refiner returns its guidance. They count near the guidance's outline alone; elsewhere it is believed, which a few
    matting images can teach no better.

    config: `config.matting`. Its `width` is the channels of the strides from 4 on; stride 2 has half of them, stride 1
        a quarter.
    """

    def __init__(self, config: ConfigDict, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.dtype, self.backbone = dtype, make_backbone(config.backbone, "none", rngs, dtype)
        self.reach = max(1, round(config.reach * config.canvas / 4))  # in pixels of stride 4
        self.blend = nnx.Param(jnp.zeros(len(WINDOWS)))
        coarsest = max(self.backbone.channels)
        self.strides = tuple(coarsest >> k for k in range(coarsest.bit_length()))  # coarsest, ..., 4, 2, 1
        made, above = [], 0
        for stride in self.strides:
            width = max(1, config.width * min(stride, 4) // 4)
            made.append(Level(above, self.backbone.channels.get(stride, 0), width, rngs=rngs, dtype=dtype))
            above = width
        self.levels = nnx.List(made)

    def __call__(
        self, image: Float[Array, "b h w 3"], guidance: Float[Array, "b h w"]
    ) -> dict[int, Float[Array, "b _h _w"]]:
        """image: 0 to 255, sides that are multiples of the coarsest stride. guidance: a hard or soft mask, 0 to 1.

        Returns the alpha, 0 to 1, at each stride of the decoder; the one at stride 1 is the answer, the others are
        there to learn from.
        """
        image = (image - jnp.array(self.backbone.mean)) / jnp.array(self.backbone.std)
        features = self.backbone(image)
        near, said = unmixed(image, guidance, self.reach)
        seen = _pyramid(jnp.concatenate([image, guidance[..., None], said], -1), self.strides)
        gates = _pyramid(near, self.strides)
        alphas, x, correction = {}, None, 0.0
        for stride, level in zip(self.strides, self.levels):
            above = None if x is None else double(x)
            x, change = level(above, features.get(stride), seen[stride].astype(self.dtype))
            correction = change if above is None else double(correction) + change
            mask, colors = seen[stride][..., 3], seen[stride][..., 4:]
            by_color = ((colors - mask[..., None]) * self.blend[...]).sum(-1)
            alphas[stride] = _clip(mask + gates[stride][..., 0] * (by_color + correction[..., 0]))
        return alphas


def unmixed(
    image: Float[Array, "b h w 3"], guidance: Float[Array, "b h w"], reach: int
) -> tuple[Float[Array, "b h w 1"], Float[Array, "b h w k"]]:
    """Where the guidance is in doubt (0 to 1), and the alpha there by color alone, one for each of `WINDOWS`;
    elsewhere the guidance.

    Doubt reaches `reach` pixels of stride 4 from the outline. Beyond, colors are known to be the object's or the
    ground's; a pixel in doubt lies somewhere on the line between the means of those around it (the color line of
    sampling-based matting).
    """
    small = halve(halve(jnp.concatenate([image, (guidance > 0.5).astype(image.dtype)[..., None]], -1)))
    color, inside = small[..., :3], small[..., 3:]
    known = 1.0 - _largest(1.0 - inside, reach), 1.0 - _largest(inside, reach)  # the object, the ground
    known = [(k > 0.999).astype(image.dtype) for k in known]
    near = 1.0 - known[0] - known[1]
    everywhere = [(k * color).sum((1, 2), keepdims=True) / (k.sum((1, 2), keepdims=True) + 1e-6) for k in known]
    said, means = [], [jnp.broadcast_to(mean, color.shape) for mean in everywhere]
    for window in WINDOWS[::-1]:  # where the smaller has nothing known, what the larger has
        counts = [_summed(k, window) for k in known]
        means = [
            jnp.where(n > 0.5, _summed(k * color, window) / jnp.maximum(n, 0.5), m)
            for n, k, m in zip(counts, known, means)
        ]
        over, under = (double(double(m)) for m in means)
        line = over - under
        said.append(jnp.clip(((image - under) * line).sum(-1) / ((line**2).sum(-1) + 0.05), 0, 1))
    near = double(double(near))
    said = jnp.stack(said, -1)
    return near, near * said + (1 - near) * guidance[..., None]


def _largest(x: Float[Array, "b h w c"], reach: int) -> Float[Array, "b h w c"]:
    """Of all pixels no farther than `reach` in rows and columns."""
    for shape in ((1, 2 * reach + 1, 1, 1), (1, 1, 2 * reach + 1, 1)):
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, shape, (1, 1, 1, 1), "SAME")
    return x


def _summed(x: Float[Array, "b h w c"], window: int) -> Float[Array, "b h w c"]:
    for shape in ((1, window, 1, 1), (1, 1, window, 1)):
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, (1, 1, 1, 1), "SAME")
    return x


def _clip(x: Array) -> Array:
    """To 0 ... 1 with the gradient of the identity: a pixel that is wrongly 0 must be able to leave it."""
    return x + jax.lax.stop_gradient(jnp.clip(x, 0, 1) - x)


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """Means of 2 x 2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def double(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Bilinear with pixel centers at halves. As sums of shifted copies: `jax.image.resize` is slow on a CPU."""
    for axis in (1, 2):
        first, last = (
            jax.lax.slice_in_dim(x, *span, axis=axis) for span in ((0, 1), (x.shape[axis] - 1, x.shape[axis]))
        )
        before = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)], axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, x.shape[axis], axis=axis), last], axis)
        pairs = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    return x


def _pyramid(x: Float[Array, "b h w c"], strides: tuple[int, ...]) -> dict[int, Float[Array, "b _h _w c"]]:
    found = {1: x}
    for stride in sorted(strides)[1:]:
        found[stride] = x = halve(x)
    return found
