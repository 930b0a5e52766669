"""Deformable attention against torch's grid_sample and against Mask DINO's recorded numbers."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees

from mqformer_jax.models import deformable_attention
from mqformer_jax.models.deformable_attention import MSDeformAttn, ms_deform_attn

SHAPES = ((5, 7), (3, 4), (1, 2))


def sampled_by_torch(value, shapes, locations, weights):
    import torch

    batch, _, heads, dh = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    total = 0
    for level, part in enumerate(value.split([h * w for h, w in shapes], 1)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, dh, *shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
        samples = torch.nn.functional.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
        samples = samples.reshape(batch, heads, dh, queries, points)
        total = total + torch.einsum("bhdqp,bqhp->bqhd", samples, weights[:, :, :, level])
    return total.reshape(batch, queries, heads * dh)


def random_inputs():
    rng = np.random.default_rng(0)
    tokens = sum(h * w for h, w in SHAPES)
    value = rng.normal(size=(2, tokens, 2, 4))
    locations = rng.uniform(-0.4, 1.4, size=(2, 6, 2, 3, 4, 2))
    locations[0, 0] *= 50
    weights = rng.uniform(size=(2, 6, 2, 3, 4))
    cotangent = rng.normal(size=(2, 6, 8))
    return [a.astype(np.float32) for a in (value, locations, weights, cotangent)]


def values_and_gradients(value, shapes, locations, weights, cotangent):
    @jax.jit
    def run(*inputs):
        output, pull_back = jax.vjp(lambda v, l, w: ms_deform_attn(v, shapes, l, w), *inputs)
        return output, *pull_back(jnp.asarray(cotangent))

    return run(value, locations, weights)


def test_values_and_gradients_are_those_of_grid_sample():
    torch = pytest.importorskip("torch")
    value, locations, weights, cotangent = random_inputs()
    inputs = [torch.tensor(a, requires_grad=True) for a in (value, locations, weights)]
    expected = sampled_by_torch(inputs[0], SHAPES, *inputs[1:])
    (expected * torch.tensor(cotangent)).sum().backward()
    got = values_and_gradients(value, SHAPES, locations, weights, cotangent)
    assert_agrees("deformable attention (torch grid_sample)", "forward", got[0], expected.detach(), 1e-5)
    for ours, theirs in zip(got[1:], inputs):
        assert_agrees("deformable attention (torch grid_sample)", "gradient", ours, theirs.grad, 1e-5)


def test_a_point_far_outside_gives_zero_and_no_gradient():
    value, _, weights, cotangent = random_inputs()
    locations = np.full((2, 6, 2, 3, 4, 2), 0.5, np.float32)
    locations[..., 0] = -3.0
    output, *gradients = values_and_gradients(value, SHAPES, locations, weights, cotangent)
    assert all((np.asarray(a) == 0).all() for a in (output, *gradients))


def test_the_form_for_tpu_gives_the_same_sums():
    rng = np.random.default_rng(2)
    picked, corners = rng.normal(size=(3, 5, 16)).astype(np.float32), rng.normal(size=(3, 5, 4)).astype(np.float32)
    expected = (picked.reshape(3, 5, 4, 4) * corners[..., None]).sum((1, 2))
    np.testing.assert_allclose(deformable_attention._fold(picked, corners), expected, atol=1e-5)
    np.testing.assert_allclose(deformable_attention._fold_in_lanes(picked, corners), expected, atol=1e-5)


def fixture():
    folder = os.environ.get("MQFORMER_TEST_FIXTURES")
    if not folder:
        pytest.skip("MQFORMER_TEST_FIXTURES is not set")
    return np.load(os.path.join(folder, "maskdino", "msdeformattn_s0.npz"))


def test_the_core_repeats_mask_dino_recorded_values_and_gradients():
    f = fixture()
    shapes = [tuple(map(int, s)) for s in f["in/spatial_shapes"]]
    got = values_and_gradients(f["in/value"], shapes, f["in/sampling_locations"], f["in/attention_weights"], f["in/cotangent"])
    for ours, name in zip(got, ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")):
        kind = "forward" if name == "output" else "gradient"
        assert_agrees("deformable attention (Mask DINO, recorded)", kind, ours, f[f"f64/{name}"], 1e-5, name)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_the_module_repeats_mask_dino_recorded_outputs(coordinates, padded):
    f = fixture()
    shapes = [tuple(map(int, s)) for s in f["in/spatial_shapes"]]
    module = MSDeformAttn(32, 4, 4, 4, rngs=nnx.Rngs(0))
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        getattr(module, name).kernel[...] = jnp.asarray(f[f"module/weights/{name}.weight"].T)
        getattr(module, name).bias[...] = jnp.asarray(f[f"module/weights/{name}.bias"])
    valid = ~f["module/padding_mask"] if padded else None
    output = module(f["module/query"], f[f"module/reference_points_{coordinates}"], f["module/input_flatten"], shapes, valid)
    expected = f[f"module/output_ref{coordinates}" + "_padded" * padded]
    assert_agrees("deformable attention (Mask DINO, recorded)", "forward", output, expected, 1e-5)


def test_a_fresh_module_looks_along_one_direction_a_head():
    module = MSDeformAttn(8, 4, 1, 2, rngs=nnx.Rngs(0))
    offsets = module.sampling_offsets(jnp.ones((1, 8))).reshape(4, 2, 2)
    np.testing.assert_allclose(offsets[:, 0], [[1, 0], [0, 1], [-1, 0], [0, -1]], atol=1e-6)
    np.testing.assert_allclose(offsets[:, 1], 2 * offsets[:, 0], atol=1e-6)


def test_bfloat16_stays_close_to_float32():
    rng = np.random.default_rng(1)
    tokens = sum(h * w for h, w in SHAPES)
    memory, query = rng.normal(size=(1, tokens, 8)), rng.normal(size=(1, 5, 8))
    reference = rng.uniform(size=(1, 5, 3, 2))
    outputs = [
        jax.jit(lambda dtype=dtype: MSDeformAttn(8, 2, 3, 4, rngs=nnx.Rngs(0), dtype=dtype)(query, reference, memory, SHAPES))()
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    assert outputs[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(outputs[1].astype(np.float32), outputs[0], atol=0.05)
