"""The matting refiner: what it is before it has learned, and that all of it can learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import build
from tiny import get_config

from mqformer_jax.matting.model import MattingRefiner, double, halve, unmixed


def make(rngs: nnx.Rngs, name: str = "convnet") -> MattingRefiner:
    matting = get_config().matting
    matting.backbone.name = name
    return MattingRefiner(matting, rngs=rngs)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (2, 64, 64, 3)).astype(np.float32), rng.uniform(0, 1, (2, 64, 64)).astype(np.float32)


def test_untrained_refiner_returns_its_guidance(inputs):
    alphas = jax.jit(lambda m, *a: m(*a))(build(make), *inputs)
    np.testing.assert_array_equal(alphas[1], inputs[1])
    np.testing.assert_allclose(alphas[2], halve(inputs[1][..., None])[..., 0], atol=1e-6)


@pytest.mark.parametrize("name, coarsest", [("convnet", 16), ("efficientnet_lite0", 32), ("swin_t", 32)])
def test_alphas_are_predicted_at_every_stride_for_each_encoder(name, coarsest):
    shapes = jax.eval_shape(lambda: make(nnx.Rngs(0), name)(jnp.zeros((2, 64, 96, 3)), jnp.zeros((2, 64, 96))))
    assert {s: a.shape for s, a in shapes.items()} == {
        s: (2, 64 // s, 96 // s) for s in (1, 2, 4, 8, 16, 32) if s <= coarsest
    }


@pytest.mark.slow
def test_every_parameter_has_a_nonzero_gradient_after_perturbation(inputs):
    graph, params = nnx.split(build(make))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    loss = lambda p: sum(((a - 0.5) ** 2).mean() for a in nnx.merge(graph, p)(*inputs).values())
    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    assert all(np.isfinite(g).all() and np.any(g) for g in gradients)


def test_pixels_with_guidance_0_or_1_still_receive_gradients(inputs):
    """At 0 and at 1 exactly, and beyond, where a plain clip or a sigmoid would have no gradient."""
    graph, params = nnx.split(build(make))

    def answer(shift: float) -> jax.Array:
        model = nnx.merge(graph, params)
        model.levels[-1].head.bias = nnx.Param(jnp.full(1, shift))
        return model(inputs[0], jnp.round(inputs[1]))[1]

    assert float(jax.jit(answer)(3.0).max()) == 1 and float(jax.jit(answer)(-3.0).min()) == 0
    for shift in (0.0, 3.0, -3.0):
        np.testing.assert_allclose(jax.jit(jax.grad(lambda s: answer(s).mean()))(shift), 1, rtol=1e-5)


@pytest.mark.parity
def test_double_matches_torch_bilinear_and_halve_inverts_it_on_a_ramp():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(double(jnp.array(x)), theirs.permute(0, 2, 3, 1), atol=1e-6)
    ramp = jnp.arange(8.0)[None, :, None, None] + jnp.zeros((1, 1, 6, 1))
    np.testing.assert_allclose(halve(double(ramp))[:, 1:-1], ramp[:, 1:-1], atol=1e-6)


def test_unmixed_estimates_alpha_near_outlines_and_keeps_the_mask_elsewhere():
    """A soft edge of 16 pixels between two colors, and a mask whose outline lies 6 pixels beside it."""
    alpha = np.broadcast_to(np.clip((np.arange(96) - 40) / 16, 0, 1), (96, 96)).astype(np.float32)
    image = alpha[..., None] * np.array([1.5, -1, 0.5]) + (1 - alpha[..., None]) * np.array([-1, 0.5, 1])
    mask = np.broadcast_to(np.arange(96) > 54, (96, 96)).astype(np.float32)
    near, said = (np.asarray(x)[0] for x in unmixed(jnp.asarray(image[None], jnp.float32), jnp.asarray(mask[None]), 5))
    assert np.abs(mask - alpha).max() > 0.4
    for color in said[near[..., 0] == 1].T:
        np.testing.assert_allclose(color, alpha[near[..., 0] == 1], atol=0.02)  # the line's length is regularized
    far = near[..., 0] == 0
    assert 0.3 < far.mean() < 0.8 and (said[far] == mask[far][:, None]).all()
