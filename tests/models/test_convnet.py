"""The small image encoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mqformer_jax.models.convnet import ConvNet, Stage, _space_to_depth


@pytest.mark.parametrize(
    "widths, channels", [((8, 12, 16, 24), {4: 12, 8: 16, 16: 24}), ((8, 8, 8, 8, 9), {4: 8, 8: 8, 16: 8, 32: 9})]
)
def test_convnet_has_one_feature_map_per_width_after_the_first(widths, channels):
    def run():
        net = ConvNet(widths, rngs=nnx.Rngs(0))
        assert net.channels == channels
        return net(jnp.zeros((2, 64, 96, 3)))

    assert {s: f.shape for s, f in jax.eval_shape(run).items()} == {
        s: (2, 64 // s, 96 // s, c) for s, c in channels.items()
    }


def test_space_to_depth_keeps_each_patch_together():
    patches = _space_to_depth(np.arange(32.0).reshape(1, 4, 4, 2))
    assert patches[0, 0, 1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_downsampling_average_pools_three_eighths_of_the_channels():
    stage = Stage(8, 12, 1, rngs=nnx.Rngs(0), dtype=jnp.float32)
    for branch in (stage.down, *stage.blocks):
        branch.norm.scale[...] = jnp.zeros_like(branch.norm.scale[...])
    image = np.random.default_rng(0).uniform(size=(1, 4, 6, 8)).astype(np.float32)
    halved = stage(image)
    means = image[..., :3].reshape(1, 2, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(halved[..., :3], means, rtol=1e-6)
    assert halved.shape == (1, 2, 3, 12) and not np.any(halved[..., 3:])


def test_every_parameter_has_a_nonzero_float32_gradient():
    graph, state = jax.jit(lambda: nnx.split(ConvNet((8, 8, 8, 8), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))()
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3))
    loss = lambda state: sum((f.astype(jnp.float32) ** 2).mean() for f in nnx.merge(graph, state)(image).values())
    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(state))
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() and np.any(g) for g in gradients)
