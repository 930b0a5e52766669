"""Deformable attention against torch's grid_sample and against Mask DINO's recorded numbers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from originals import assert_agrees

from mqformer_jax.config import SHARDING_RULES
from mqformer_jax.models import deformable_attention
from mqformer_jax.models.deformable_attention import MSDeformAttn, ms_deform_attn
from mqformer_jax.parallel.mesh import BATCH, IMAGES, batch_sharding, gather_slices, make_mesh, shard_map_batch
from mqformer_jax.parallel.rules import shardings
from mqformer_jax.tools import hlo

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
        output, pull_back = jax.vjp(lambda v, at, w: ms_deform_attn(v, shapes, at, w), *inputs)
        return output, *pull_back(jnp.asarray(cotangent))

    return run(value, locations, weights)


@pytest.mark.parity
def test_values_and_gradients_match_torch_grid_sample():
    torch = pytest.importorskip("torch")
    value, locations, weights, cotangent = random_inputs()
    inputs = [torch.tensor(a, requires_grad=True) for a in (value, locations, weights)]
    expected = sampled_by_torch(inputs[0], SHAPES, *inputs[1:])
    (expected * torch.tensor(cotangent)).sum().backward()
    got = values_and_gradients(value, SHAPES, locations, weights, cotangent)
    assert_agrees("deformable attention (torch grid_sample)", "forward", got[0], expected.detach(), 1e-5)
    for ours, theirs in zip(got[1:], inputs):
        assert_agrees("deformable attention (torch grid_sample)", "gradient", ours, theirs.grad, 1e-5)


@pytest.mark.parametrize("name", ["rows", "lanes"])
def test_every_implementation_matches_the_reference_values_and_gradients(name):
    value, locations, weights, cotangent = random_inputs()

    def run(implementation):
        attend = lambda v, at, w: ms_deform_attn(v, SHAPES, at, w, implementation)
        output, pull_back = jax.vjp(attend, value, locations, weights)
        return output, *pull_back(jnp.asarray(cotangent))

    for ours, reference in zip(jax.jit(run, static_argnums=0)(name), jax.jit(run, static_argnums=0)("reference")):
        assert_agrees("deformable attention (reference)", "forward", ours, reference, 1e-5)


def test_points_far_outside_give_zero_output_and_gradient():
    value, _, weights, cotangent = random_inputs()
    locations = np.full((2, 6, 2, 3, 4, 2), 0.5, np.float32)
    locations[..., 0] = -3.0
    output, *gradients = values_and_gradients(value, SHAPES, locations, weights, cotangent)
    assert all((np.asarray(a) == 0).all() for a in (output, *gradients))


def random_rows(dtype=np.float32):
    """What both forms take: packed rows, the row of each point, its corners' weights; and a gradient of the result."""
    rng = np.random.default_rng(2)
    rows, corners = rng.normal(size=(2, 9, 3, 16)), rng.normal(size=(2, 5, 3, 12, 4))
    rows, corners, gradient = jnp.asarray(rows, dtype), jnp.asarray(corners, jnp.float32), rng.normal(size=(2, 5, 12))
    return rows, rng.integers(9, size=(2, 5, 3, 12)), corners, jnp.asarray(gradient, jnp.float32)


def pulled_back(form, rows, index, corners, gradient):
    output, pull_back = jax.vjp(lambda r, c: form(r, index, c), rows, corners)
    return output, *pull_back(gradient)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_tpu_implementation_matches_default_values_and_gradients(wrap):
    inputs = random_rows()
    expected = pulled_back(deformable_attention._rows, *inputs)
    got = pulled_back(wrap(deformable_attention._lanes), *inputs)
    for ours, default in zip(got, expected):
        np.testing.assert_allclose(ours, default, atol=1e-5)


def test_tpu_implementation_matches_default_inside_shard_map():
    rows, index, corners, gradient = random_rows()
    expected = pulled_back(deformable_attention._rows, rows, index, corners, gradient)
    mesh, split = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), P("data")
    form = jax.jit(jax.shard_map(deformable_attention._lanes, mesh=mesh, in_specs=split, out_specs=split))
    for ours, default in zip(pulled_back(form, rows, index, corners, gradient), expected):
        np.testing.assert_allclose(ours, default, atol=1e-5)


@pytest.mark.parametrize("form", [deformable_attention._rows, deformable_attention._lanes])
def test_bfloat16_gradients_are_summed_in_float32(form):
    """Some 40 points fall on each row: sums in bfloat16 would be off by several of its last digits."""
    rows, index, corners, gradient = random_rows(jnp.bfloat16)
    exact = pulled_back(deformable_attention._rows, rows.astype(jnp.float32), index, corners, gradient)[1]
    got = pulled_back(form, rows, index, corners, gradient)[1]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.tpu_compiler
def test_tpu_program_has_no_collectives_and_low_memory_traffic(monkeypatch):
    """v5e, a chip for each of two images, bfloat16: no collective, and less traffic than one pass over the rows."""
    pytest.importorskip("libtpu")
    compiled, samples = compiled_for_tpu(monkeypatch)
    text = compiled.as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
    program = hlo.Program(text)
    assert any(run.loops and "gather" in run.instruction.source for run in program.runs())
    assert program.traffic() / samples < 2 * 128  # bytes of a row


def test_queries_are_split_into_parts_that_fit_in_memory():
    parts = deformable_attention._parts
    size = 16 * 128 * 4  # 16 points of 128 lanes in float32
    assert parts(500, size) == 1  # the decoder
    assert parts(21760, size) == 8  # the encoder at 1024 x 1024: 2,720 queries, 22 MB
    assert parts(87040, size) == 32
    assert parts(10007, size) == 1  # a prime number


def compiled_for_tpu(monkeypatch):
    """Forward and backward over one map of 16 x 16, each of its tokens a query, and the samples of one image."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[:2]
    split = NamedSharding(Mesh(np.array(devices), ("data",)), P("data"))
    abstract = lambda dtype, *shape: jax.ShapeDtypeStruct((2, 256, *shape), dtype, sharding=split)

    def both(value, locations, weights, cotangent):
        output, pull_back = jax.vjp(lambda v, at, w: ms_deform_attn(v, [(16, 16)], at, w), value, locations, weights)
        return output, pull_back(cotangent)

    maps, place = abstract(jnp.bfloat16, 8, 32), abstract(jnp.float32, 8, 1, 4, 2)
    weight, cotangent = abstract(jnp.float32, 8, 1, 4), abstract(jnp.float32, 256)
    lowered = jax.jit(both, out_shardings=split).lower(maps, place, weight, cotangent)
    kept = jax.config.jax_persistent_cache_min_compile_time_secs
    # what is written without a chip cannot be read again
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        return lowered.compile(), 256 * 8 * 4
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)


@pytest.fixture
def recording(fixtures):
    return np.load(fixtures / "maskdino" / "msdeformattn_s0.npz")


def test_core_matches_recorded_mask_dino_values_and_gradients(recording):
    f = recording
    shapes = [tuple(map(int, s)) for s in f["in/spatial_shapes"]]
    got = values_and_gradients(
        f["in/value"], shapes, f["in/sampling_locations"], f["in/attention_weights"], f["in/cotangent"]
    )
    for ours, name in zip(got, ("output", "grad_value", "grad_sampling_locations", "grad_attention_weights")):
        kind = "forward" if name == "output" else "gradient"
        assert_agrees("deformable attention (Mask DINO, recorded)", kind, ours, f[f"f64/{name}"], 1e-5, name)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_module_matches_recorded_mask_dino_outputs(recording, coordinates, padded):
    f = recording
    shapes = [tuple(map(int, s)) for s in f["in/spatial_shapes"]]
    _, _, heads, levels, points, _ = f["in/sampling_locations"].shape
    module = MSDeformAttn(f["module/query"].shape[-1], heads, levels, points, rngs=nnx.Rngs(0))
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        getattr(module, name).kernel[...] = jnp.asarray(f[f"module/weights/{name}.weight"].T)
        getattr(module, name).bias[...] = jnp.asarray(f[f"module/weights/{name}.bias"])
    valid = ~f["module/padding_mask"] if padded else None
    output = module(
        f["module/query"], f[f"module/reference_points_{coordinates}"], f["module/input_flatten"], shapes, valid
    )
    expected = f[f"module/output_ref{coordinates}" + "_padded" * padded]
    assert_agrees("deformable attention (Mask DINO, recorded)", "forward", output, expected, 1e-5)


def test_initial_sampling_offsets_point_in_one_direction_per_head():
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
        jax.jit(
            lambda dtype=dtype: MSDeformAttn(8, 2, 3, 4, rngs=nnx.Rngs(0), dtype=dtype)(
                query, reference, memory, SHAPES
            )
        )()
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    assert outputs[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(outputs[1].astype(np.float32), outputs[0], atol=0.05)


@pytest.mark.slow
def test_tensor_parallel_heads_communicate_only_in_the_output_projection():
    """Along a tensor axis each device samples for its own heads: weights may be gathered, of the activations only the
    output is summed.
    """
    mesh, width, heads = make_mesh((2, 2, 2)), 32, 4
    graph, state = nnx.split(MSDeformAttn(width, heads, 2, 2, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(1), x.shape), nnx.to_pure_dict(state))
    query = jax.random.normal(jax.random.key(2), (8, 80, width))
    reference = jax.random.uniform(jax.random.key(3), (8, 80, 2, 2))
    attend = lambda params, query, reference: nnx.merge(graph, params)(query, reference, query, ((8, 8), (4, 4)))
    layout = shardings(params, mesh, SHARDING_RULES)
    specs = jax.tree.map(lambda sharding: sharding.spec, layout)
    slices = jax.tree.map(lambda spec: P(*(axis if axis in IMAGES else None for axis in spec)), specs)
    spread = shard_map_batch(lambda p, q, r: attend(gather_slices(p, specs), q, r), mesh, (slices, BATCH, BATCH), BATCH)
    run = jax.jit(spread, in_shardings=(layout, batch_sharding(mesh), batch_sharding(mesh)))
    np.testing.assert_allclose(run(params, query, reference), attend(params, query, reference), atol=3e-5)
    program = hlo.Program(run.lower(params, query, reference).compile().as_text())
    shapes = {
        (found.instruction.collective, found.instruction.shape.partition("{")[0]) for found, _ in program.collectives()
    }
    assert ("all-reduce", "f32[2,80,32]") in shapes
    assert all(kind == "all-gather" and "80" not in shape for kind, shape in shapes - {("all-reduce", "f32[2,80,32]")})
