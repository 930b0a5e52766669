"""ResNet-50 and -101 (He et al., CVPR 2016) with frozen BatchNorm, as the DETR family uses them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from mqformer_jax.arrays import Array
from mqformer_jax.models import layers

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


ConvBatchNorm = functools.partial(layers.ConvNorm, norm=layers.frozen_batch_norm, kernel_init=layers.he_fan_out)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut, which is a projection if the number of channels changes."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, *, stride_in_1x1: bool, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        make = functools.partial(ConvBatchNorm, rngs=rngs, dtype=dtype)
        middle = outputs // 4
        self.conv1 = make(inputs, middle, 1, stride if stride_in_1x1 else 1)
        self.conv2 = make(middle, middle, 3, 1 if stride_in_1x1 else stride)
        self.conv3 = make(middle, outputs, 1)
        self.shortcut = make(inputs, outputs, 1, stride) if inputs != outputs else None

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = jax.nn.relu(self.conv1(x))
        y = self.conv3(jax.nn.relu(self.conv2(y)))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Stage(nnx.Module):
    """The blocks of one resolution. All blocks but the first have the same shape, so they run as a stack."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        stride: int,
        *,
        stride_in_1x1: bool,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        make = functools.partial(Bottleneck, stride_in_1x1=stride_in_1x1, dtype=dtype)
        self.first = make(inputs, outputs, stride, rngs=rngs)
        self.rest = layers.stack(lambda keys: make(outputs, outputs, rngs=keys), blocks - 1, rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return layers.scan_layers(self.rest, lambda block, x, _: (block(x), None), self.first(x))[0]


class ResNet(nnx.Module):
    """ResNet with features at strides 4, 8, 16 and 32.

    depth: 50 or 101. stride_in_1x1: whether the stride of a stage is in the first 1x1 convolution (as in Microsoft's
    original weights, detectron2's "R-50") or in the 3x3 convolution (as in torchvision, the default). `channels` is
    {stride: number of channels} of the features.
    """

    channels = {4: 256, 8: 512, 16: 1024, 32: 2048}
    mean, std = layers.IMAGENET_MEAN, layers.IMAGENET_STD

    def __init__(self, depth: int, *, stride_in_1x1: bool = False, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        if depth not in BLOCKS:
            raise ValueError(f"ResNet depth {depth}: it must be one of {sorted(BLOCKS)}; change backbone.name.")
        self.stem = ConvBatchNorm(3, 64, 7, 2, rngs=rngs, dtype=dtype)
        widths = [64, *self.channels.values()]
        self.stages = nnx.List(
            Stage(i, o, n, 1 if k == 0 else 2, stride_in_1x1=stride_in_1x1, rngs=rngs, dtype=dtype)
            for k, (i, o, n) in enumerate(zip(widths[:-1], widths[1:], BLOCKS[depth]))
        )

    def __call__(
        self, image: Float[Array, "b h w 3"], keys: Key[Array, " b"] | None = None
    ) -> dict[int, Float[Array, "b _h _w _c"]]:
        """Return {stride: feature}. image: normalized; its sides are multiples of 32."""
        x = jax.nn.relu(self.stem(image))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        features = {}
        for stride, stage in zip(self.channels, self.stages):
            features[stride] = x = stage(x)
        return features
