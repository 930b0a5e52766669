"""Layers that all parts of the model share.

Parameters are float32. A module computes in `dtype` and returns arrays of this type. Images are NHWC, kernels HWIO.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float

from mqformer_jax.arrays import Array

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of pixels, RGB, 0 to 255
xavier = nnx.initializers.xavier_uniform()
he_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Frozen(nnx.Variable):
    """A constant that is saved and restored together with the parameters, but never trained."""


def linear(inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, **kwargs: Any) -> nnx.Linear:
    """Return a dense layer with a Xavier-uniform kernel and a zero bias, as in DETR.

    With dtype float32, TPUs and GPUs multiply in full float32 precision. By default, they would round the factors.
    """
    precision = "highest" if jnp.dtype(dtype) == jnp.float32 else None
    defaults: dict[str, Any] = {"kernel_init": xavier, "precision": precision}
    return nnx.Linear(inputs, outputs, rngs=rngs, dtype=dtype, **{**defaults, **kwargs})


def layer_norm(width: int, eps: float = 1e-5, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> nnx.LayerNorm:
    """Return a LayerNorm over the last axis (the channels of each pixel, for NHWC) with torch's eps."""
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs, dtype=dtype)


def group_norm(width: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> nnx.GroupNorm:
    """Return a GroupNorm with 32 groups, or gcd(32, width) groups if the width is not a multiple of 32."""
    groups = math.gcd(32, width)
    return nnx.GroupNorm(width, num_groups=groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs, dtype=dtype)


class Conv(nnx.Module):
    """A square convolution of odd `size` with torch's symmetric padding (XLA's "SAME" differs at stride 2).

    Size 1 is computed as a strided slice and a matmul, which is twice as fast on CPU.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 1,
        stride: int = 1,
        *,
        use_bias: bool = True,
        kernel_init: nnx.Initializer = xavier,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        self.stride, self.dtype = stride, dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (size, size, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        x, kernel, step = x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride
        if kernel.shape[0] == 1:
            y = x[:, ::step, ::step] @ kernel[0, 0]
        else:
            y = _convolve(x, kernel) if step == 1 else _strided(x, kernel, step)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _strided(x: Float[Array, "b h w i"], kernel: Float[Array, "s s i o"], stride: int) -> Float[Array, "b h2 w2 o"]:
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def _convolve(x: Float[Array, "b h w i"], kernel: Float[Array, "s s i o"]) -> Float[Array, "b h w o"]:
    """Convolve with stride 1. On CPU, the gradients are custom: XLA's gradients are ten times slower inside a scan."""
    return _strided(x, kernel, 1)


def _gradients(inputs: tuple[Array, Array], g: Float[Array, "b h w o"]) -> tuple[Array, Array]:
    by_xla = lambda x, kernel, g: jax.vjp(lambda *a: _strided(*a, 1), x, kernel)[1](g)
    return jax.lax.platform_dependent(*inputs, g, cpu=_gradients_on_cpu, default=by_xla)


def _gradients_on_cpu(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
    """Return the gradients of x (convolution with the flipped kernel) and of the kernel (a matmul per element)."""
    (h, w), size = x.shape[1:3], kernel.shape[0]
    around = jnp.pad(x, ((0, 0), *[(size // 2,) * 2] * 2, (0, 0)))
    places = [around[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    products = jnp.stack([jnp.einsum("bhwi,bhwo->io", place, g) for place in places])
    return _strided(g, kernel[::-1, ::-1].swapaxes(2, 3), 1), products.reshape(kernel.shape)


_convolve.defvjp(lambda x, kernel: (_strided(x, kernel, 1), (x, kernel)), _gradients)


class FrozenBatchNorm(nnx.Module):
    """BatchNorm with constant statistics and affine map, as in detectron2's backbones. The default eps is torch's."""

    def __init__(self, width: int, *, eps: float = 1e-5, dtype: DTypeLike = jnp.float32):
        self.eps, self.dtype = eps, dtype
        self.scale, self.bias = Frozen(jnp.ones(width)), Frozen(jnp.zeros(width))
        self.mean, self.var = Frozen(jnp.zeros(width)), Frozen(jnp.ones(width))

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.eps)
        shift = self.bias[...] - self.mean[...] * scale
        return (x * scale + shift).astype(self.dtype)


def frozen_batch_norm(width: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> FrozenBatchNorm:
    """Return a FrozenBatchNorm. rngs: unused; the signature is that of `layer_norm` and `group_norm`."""
    return FrozenBatchNorm(width, dtype=dtype)


class ConvNorm(nnx.Module):
    """A convolution followed by a norm. norm: `group_norm`, `layer_norm` or `frozen_batch_norm`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: int = 1,
        *,
        norm: Callable[..., nnx.Module],
        use_bias: bool = False,
        kernel_init: nnx.Initializer = xavier,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.conv = Conv(
            inputs, outputs, size, stride, use_bias=use_bias, kernel_init=kernel_init, rngs=rngs, dtype=dtype
        )
        self.norm = norm(outputs, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return self.norm(self.conv(x))


class MLP(nnx.Module):
    """A stack of `layers` dense layers with ReLU between them."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, layers: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ):
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self.layers = nnx.List(linear(i, o, rngs=rngs, dtype=dtype) for i, o in zip(widths[:-1], widths[1:]))

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def stack(make: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """Create n modules and return them as one module, whose arrays have a leading axis n. `scan_layers` runs it."""
    graph, state = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key))))(jax.random.split(rngs.params(), n))
    return nnx.merge(graph, state)


SAMPLED = "sampled"  # name of the values that deformable attention samples; they are small but slow to recompute
_saved = jax.checkpoint_policies.save_only_these_names(SAMPLED)
REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _saved
    ),
    "layers": _saved,
}


def scan_layers(
    stacked: nnx.Module,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Run `carry, y = body(layer, carry, x)` for each layer of a `stack`. Return the last carry and the stacked ys.

    All layers share one compiled body. xs: a tree whose arrays have one row per layer, or None. remat
    (`config.model.remat`): the activations that are stored for the backward pass, which recomputes all others. "none"
    stores all activations, "dots" the results of matmuls with weights, "layers" only the input of each layer. The last
    two also store the values that deformable attention samples.
    """
    graph, state = nnx.split(stacked)

    def step(carry: Any, layer_and_x: tuple[Any, Any]) -> tuple[Any, Any]:
        layer, x = layer_and_x
        return body(nnx.merge(graph, layer), carry, x)

    step = step if remat == "none" else jax.checkpoint(step, prevent_cse=False, policy=REMAT[remat])
    return jax.lax.scan(step, carry, (state, xs))
