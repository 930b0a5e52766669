"""The matting refiner: predict an object's alpha (the fraction of each pixel it covers) from an image and a mask."""

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

WINDOWS = (17, 41)  # sides of the windows in which colors are averaged, in pixels at stride 4
INPUT_CHANNELS = 4 + len(WINDOWS)  # image, guidance, and an alpha estimated from colors for each window


class Level(nnx.Module):
    """One stride of the decoder. It fuses the coarser level, the encoder's features and the inputs.

    It returns its features and a correction of alpha. above: channels of the coarser level. feature: channels of the
    encoder's features, 0 if the encoder has none at this stride.
    """

    def __init__(self, above: int, feature: int, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.lateral = layers.Conv(feature, width, rngs=rngs, dtype=dtype) if feature else None
        # without normalization, the features outweigh the guidance
        self.norm = layers.layer_norm(width, rngs=rngs, dtype=dtype) if feature else None
        self.join = ConvLayerNorm(above + (width if feature else 0) + INPUT_CHANNELS, width, rngs=rngs, dtype=dtype)
        self.block = ConvLayerNorm(width, width, rngs=rngs, dtype=dtype)
        self.head = layers.Conv(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        above: Float[Array, "b h w a"] | None,
        feature: Float[Array, "b h w f"] | None,
        inputs: Float[Array, "b h w 6"],
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w 1"]]:
        side = None if feature is None else self.norm(self.lateral(feature))
        x = jax.nn.relu(self.join(jnp.concatenate([part for part in (above, side, inputs) if part is not None], -1)))
        x = jax.nn.relu(x + self.block(x))
        return x, self.head(x).astype(jnp.float32)


class MattingRefiner(nnx.Module):
    """Mask-guided matting with progressive refinement, in the spirit of MGMatting (Yu et al., CVPR 2021).

    This is a U-shaped network on an image encoder. The mask (the "guidance") is not an input of the encoder, so any
    pre-trained encoder can be used. The inputs of each level of the decoder, down to stride 1, are the image, the
    guidance and alphas estimated from colors (see `unmixed`), all at the level's stride. Each level adds a correction
    to the corrections of the coarser levels. All corrections start at zero, so an untrained refiner returns its
    guidance. Corrections apply only near the outline of the guidance. Elsewhere the guidance is kept, because training
    on a few matting images cannot improve it.

    config: `config.matting`. Its `width` is the number of channels at stride 4 and above; stride 2 has half of them,
        stride 1 a quarter.
    """

    def __init__(self, config: ConfigDict, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.dtype, self.backbone = dtype, make_backbone(config.backbone, "none", rngs, dtype)
        self.reach = max(1, round(config.reach * config.canvas / 4))  # in pixels at stride 4
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
        """Return {stride: alpha} with alphas of 0 to 1. The alpha at stride 1 is the final prediction.

        Training has a loss at every stride. image: 0 to 255; its sides are multiples of the coarsest stride. guidance:
        a hard or soft mask, 0 to 1.
        """
        image = (image - jnp.array(self.backbone.mean)) / jnp.array(self.backbone.std)
        features = self.backbone(image)
        near, color_alphas = unmixed(image, guidance, self.reach)
        inputs = _pyramid(jnp.concatenate([image, guidance[..., None], color_alphas], -1), self.strides)
        gates = _pyramid(near, self.strides)
        alphas, x, correction = {}, None, 0.0
        for stride, level in zip(self.strides, self.levels):
            above = None if x is None else double(x)
            x, change = level(above, features.get(stride), inputs[stride].astype(self.dtype))
            correction = change if above is None else double(correction) + change
            mask, estimates = inputs[stride][..., 3], inputs[stride][..., 4:]
            by_color = ((estimates - mask[..., None]) * self.blend[...]).sum(-1)
            alphas[stride] = _clip(mask + gates[stride][..., 0] * (by_color + correction[..., 0]))
        return alphas


def unmixed(
    image: Float[Array, "b h w 3"], guidance: Float[Array, "b h w"], reach: int
) -> tuple[Float[Array, "b h w 1"], Float[Array, "b h w k"]]:
    """Return a map of how uncertain the guidance is (0 to 1), and one alpha for each of the k `WINDOWS`.

    Pixels within `reach` pixels (at stride 4) of the guidance's outline are uncertain. All other pixels are known to be
    object or background. At uncertain pixels, the alphas are estimated from colors, as in sampling-based matting: the
    pixel's color is projected on the line between the mean colors of the known object pixels and of the known
    background pixels in the window. At known pixels, the alphas equal the guidance.
    """
    small = halve(halve(jnp.concatenate([image, (guidance > 0.5).astype(image.dtype)[..., None]], -1)))
    color, inside = small[..., :3], small[..., 3:]
    known = 1.0 - _largest(1.0 - inside, reach), 1.0 - _largest(inside, reach)  # object, background
    known = [(k > 0.999).astype(image.dtype) for k in known]
    near = 1.0 - known[0] - known[1]
    everywhere = [(k * color).sum((1, 2), keepdims=True) / (k.sum((1, 2), keepdims=True) + 1e-6) for k in known]
    color_alphas, means = [], [jnp.broadcast_to(mean, color.shape) for mean in everywhere]
    for window in WINDOWS[::-1]:  # a window without known pixels uses the mean color of the next larger window
        counts = [_summed(k, window) for k in known]
        means = [
            jnp.where(n > 0.5, _summed(k * color, window) / jnp.maximum(n, 0.5), m)
            for n, k, m in zip(counts, known, means)
        ]
        over, under = (double(double(m)) for m in means)
        line = over - under
        color_alphas.append(jnp.clip(((image - under) * line).sum(-1) / ((line**2).sum(-1) + 0.05), 0, 1))
    near = double(double(near))
    return near, near * jnp.stack(color_alphas, -1) + (1 - near) * guidance[..., None]


def _largest(x: Float[Array, "b h w c"], reach: int) -> Float[Array, "b h w c"]:
    """Return the maximum over the pixels within `reach` rows and columns."""
    for shape in ((1, 2 * reach + 1, 1, 1), (1, 1, 2 * reach + 1, 1)):
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, shape, (1, 1, 1, 1), "SAME")
    return x


def _summed(x: Float[Array, "b h w c"], window: int) -> Float[Array, "b h w c"]:
    for shape in ((1, window, 1, 1), (1, 1, window, 1)):
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, (1, 1, 1, 1), "SAME")
    return x


def _clip(x: Array) -> Array:
    """Clip to 0 ... 1, but with the gradient of the identity, so that clipped pixels also have a gradient."""
    return x + jax.lax.stop_gradient(jnp.clip(x, 0, 1) - x)


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """Halve height and width by averaging 2 x 2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def double(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Double height and width like bilinear `jax.image.resize`, which is slower on a CPU."""
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
