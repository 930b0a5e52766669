"""The losses of the matting refiner: L1 distances of alphas and of their Laplacian pyramids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mqformer_jax.arrays import Array
from mqformer_jax.matting.model import halve

BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def matting_loss(
    alphas: dict[int, Float[Array, "b _h _w"]],
    target: Float[Array, "b h w"],
    weight: Float[Array, "b h w"],
    coarse: float = 0.25,
) -> dict[str, Float[Array, ""] | float]:
    """Return the terms of the refiner's loss. The loss is their sum.

    alphas: {stride: alpha}. The alpha at stride 1 is the final prediction.
    weight: the weight of each pixel, which is 0 on padding and larger near partly covered pixels.
    coarse: the weight of the L1 term of each alpha at a larger stride. The target is averaged to the same stride (deep
        supervision, as in MGMatting).
    """
    terms = {"l1": _l1(alphas[1], target, weight), "coarse": 0.0}
    inside = (weight > 0).astype(jnp.float32)
    terms["laplacian"] = laplacian_loss(alphas[1] * inside, target * inside)
    t, w = target[..., None], weight[..., None]
    for stride in sorted(alphas)[1:]:
        t, w = halve(t), halve(w)
        terms["coarse"] += coarse * _l1(alphas[stride], t[..., 0], w[..., 0])
    return terms


def _l1(a: Array, b: Array, weight: Array) -> Float[Array, ""]:
    return (weight * jnp.abs(a - b)).sum() / jnp.maximum(weight.sum(), 1.0)


def laplacian_loss(a: Float[Array, "b h w"], b: Float[Array, "b h w"], levels: int = 5) -> Float[Array, ""]:
    """Return the L1 distance of the Laplacian pyramids of `a` and `b`. Level i = 0, 1, ... has the weight 2^i.

    Source: Hou and Liu, ICCV 2019. A level is the difference between an image and its 5 x 5 binomial blur. Every second
    pixel of the blurred image forms the image of the next level. Differences are summed over all levels and divided by
    the b * h * w pixels of the input. Height and width must be at least 3 << (levels - 1).
    """
    x, total = a - b, 0.0  # the pyramid is linear: one pyramid of the difference is enough
    for i in range(levels):
        blurred = _blur(_blur(x, 1), 2)
        total += 2**i * jnp.abs(x - blurred).sum()
        x = blurred[:, ::2, ::2]
    return total / a.size


def _blur(x: Float[Array, "b h w"], axis: int) -> Float[Array, "b h w"]:
    side = x.shape[axis]
    around = jnp.pad(x, [(2, 2) if k == axis else (0, 0) for k in range(3)], mode="reflect")
    return sum(share * jax.lax.slice_in_dim(around, k, k + side, axis=axis) for k, share in enumerate(BINOMIAL))
