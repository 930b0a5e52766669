"""What the matting refiner learns from: the distance of alphas, pixel by pixel and band by band of their
frequencies.
"""

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
    """The terms of the refiner's loss; their sum is the loss.

    alphas: {stride: alpha}, of which 1 is the answer. weight: of each pixel, 0 on padding, more where the matte is hard
        to tell.
    coarse: the weight of each coarser alpha, which meets the target at its own resolution (MGMatting's deep
        supervision).
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
    """The sum over levels i = 0, 1, ... of 2^i times the L1 distance of the Laplacian pyramids' level i (Hou and Liu,
    ICCV 2019).

    A level is what a 5 x 5 binomial blur takes away; every second pixel of the blurred image makes the next. In units
    of mean
    absolute error: distances are summed and divided by the b * h * w pixels of the input. The least side is 3 <<
        (levels - 1).
    """
    x, total = a - b, 0.0  # the pyramid is linear: the difference of two is that of their difference
    for i in range(levels):
        blurred = _blur(_blur(x, 1), 2)
        total += 2**i * jnp.abs(x - blurred).sum()
        x = blurred[:, ::2, ::2]
    return total / a.size


def _blur(x: Float[Array, "b h w"], axis: int) -> Float[Array, "b h w"]:
    side = x.shape[axis]
    around = jnp.pad(x, [(2, 2) if k == axis else (0, 0) for k in range(3)], mode="reflect")
    return sum(share * jax.lax.slice_in_dim(around, k, k + side, axis=axis) for k, share in enumerate(BINOMIAL))
