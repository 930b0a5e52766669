"""Reading a compiled program: the loops it has, what runs in them and how often, what it moves and sends."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.tools import hlo, jaxprs

N = 64


def compiled(fn, *arguments, **options) -> hlo.Program:
    return hlo.Program(jax.jit(fn, **options).lower(*arguments).compile().as_text())


def scan(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_scan_body_is_counted_once_per_iteration():
    runs = [
        run
        for run in compiled(scan, abstract(N, N), abstract(7, N, N)).runs()
        if "tanh" in run.instruction.source and not run.fused
    ]
    assert runs and all(run.times == 7 and run.known and len(run.loops) == 1 for run in runs)


def test_while_loop_has_unknown_trip_count():
    search = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x * 1.5 + 1, x), abstract(N))
    inside = [run for run in search.runs() if run.loops]
    assert inside and not any(run.known for run in inside)


def test_matmuls_are_counted_through_scans_gradients_and_recomputation():
    count = lambda fn, *arguments: jaxprs.flops(jax.make_jaxpr(fn)(*arguments).jaxpr) / (2 * N**3)
    x, w = abstract(N, N), abstract(7, N, N)
    assert count(scan, x, w) == 7
    loss = lambda x, w: scan(x, w).sum()
    assert count(jax.grad(loss, (0, 1)), x, w) == 21
    again = lambda x, w: jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0].sum()
    assert count(jax.grad(again, (0, 1)), x, w) == 28


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_with_gradients_costs_three_times_the_forward(stride):
    conv = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (stride,) * 2, [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x, k = abstract(2, 16, 16, 8), abstract(3, 3, 8, 12)
    forward = jaxprs.flops(jax.make_jaxpr(conv)(x, k).jaxpr)
    assert forward == 2 * 2 * (16 // stride) ** 2 * 12 * 9 * 8
    both = jaxprs.flops(jax.make_jaxpr(jax.grad(lambda x, k: conv(x, k).sum() * 2.0, (0, 1)))(x, k).jaxpr)
    assert both == pytest.approx(3 * forward, rel=0.01)


def test_memory_traffic_without_loops_matches_xla():
    def net(x, w, v):
        return (jax.nn.relu(x @ w) @ v).sum(), jnp.sort(x, 0)

    arguments = abstract(N, N), abstract(N, 2 * N), abstract(2 * N, N)
    lowered = jax.jit(net).lower(*arguments).compile()
    ours, theirs = hlo.Program(lowered.as_text()).traffic(), lowered.cost_analysis()["bytes accessed"]
    assert ours == pytest.approx(theirs, rel=0.05)


ON_CHIP = """
%fused (param_0: f32[100]) -> f32[100] {
  %param_0 = f32[100]{0:T(128)S(1)} parameter(0)
  %double = f32[100]{0:T(128)} add(%param_0, %param_0)
  ROOT %out = f32[100]{0:T(128)S(1)} bitcast(%double)
}

ENTRY %main (p: f32[100]) -> f32[50] {
  %p = f32[100]{0:T(128)} parameter(0)
  %copy-start = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[100]{0:T(128)S(1)} copy-done(%copy-start)
  %fusion = f32[100]{0:T(128)S(1)} fusion(%copy-done), kind=kLoop, calls=%fused
  %negate = f32[100]{0:T(128)} negate(%fusion)
  %slice-start = ((f32[100]{0:T(128)}), f32[50]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%negate), slice={[0:50]}
  %slice-done = f32[50]{0:T(128)S(1)} slice-done(%slice-start)
  ROOT %exp = f32[50]{0:T(128)} exponential(%slice-done)
}
"""


def test_on_chip_memory_access_is_not_counted_as_traffic():
    program = hlo.Program(ON_CHIP)
    by_kind = {"copy-start": 400, "negate": 400, "slice-start": 200, "exponential": 200}
    assert program.traffic_by_source() == by_kind and program.traffic() == sum(by_kind.values())


def test_traffic_of_a_scanned_stack_counts_only_the_slices():
    moved = compiled(scan, abstract(N, N), abstract(7, N, N)).traffic() / (4 * N * N)
    assert 7 * 3 < moved < 7 * 10  # the whole stack in every round would be 7 * 7 more


def test_largest_arrays_are_reported_with_shape_and_size():
    traced = jaxprs.largest_traced(jax.make_jaxpr(scan)(abstract(N, N), abstract(7, N, N)).jaxpr)
    assert traced[0]["bytes"] == 4 * N * N and traced[0]["shape"] == f"float32[{N},{N}]"
    found = compiled(lambda x: jnp.sort(x @ x.T, 0).sum(), abstract(4 * N, N)).largest(1)
    assert found[0]["bytes"] == 4 * (4 * N) ** 2 and found[0]["shape"] == f"f32[{4 * N},{4 * N}]"


def test_collectives_are_reported_with_bytes_and_group_size():
    mesh = make_mesh((2, 4, 1))
    rows = jax.ShapeDtypeStruct((8, N), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    program = compiled(lambda x: x.sum(0), rows, out_shardings=NamedSharding(mesh, P()))
    ((run, group),) = program.collectives()
    assert (run.instruction.collective, run.instruction.bytes, group, run.loops) == ("all-reduce", 4 * N, 8, ())


def test_collective_inside_a_while_loop_is_detected():
    mesh = make_mesh((8, 1, 1))
    rows = jax.ShapeDtypeStruct((8, N), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    # its condition asks all devices
    search = lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x * 2 + 1, x)
    assert any(run.loops and not run.known for run, _ in compiled(search, rows).collectives())


@pytest.mark.parametrize(
    "shape, size",
    [
        ("f32[2,3]{1,0:T(8,128)}", 24),
        ("(bf16[4], /*index=1*/pred[])", 9),
        ("f8e4m3fn[10]", 10),
        ("u8[]", 1),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_replica_group_size_is_parsed_from_every_xla_format():
    texts = {
        "replica_groups={{0,1},{2,3}}": 2,
        "replica_groups=[2,4]<=[8]": 4,
        "replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}": 8,
        "replica_groups=mesh['a'=4,'b'=2] {'b'}": 2,
        "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={1}": 4,
        "channel_id=1": 1,
    }
    assert [hlo._group(text) for text in texts] == list(texts.values())


def test_scalar_and_row_gathers_and_sorts_are_counted_separately():
    def net(x, index):
        rows = x[index].sum()  # 5 rows of 64
        numbers = jnp.take_along_axis(x, jnp.broadcast_to(index[:3], (N, 3)), 1).sum()  # 64 x 3 numbers
        largest = jax.lax.top_k(x[0], 4)[0].sum()
        return rows + numbers + largest + x.at[index].get().sum()

    found = jaxprs.irregular(jax.make_jaxpr(jax.grad(net))(jnp.ones((N, N)), jnp.arange(5)).jaxpr)
    assert found["gathered_rows"] == 10 and found["scattered_rows"] == 10
    assert found["gathered_numbers"] == 3 * N and found["scattered_numbers"] == 3 * N + 4  # 4: of top-k
    assert found["sorted_numbers"] == N and found["open_loops"] == 0


def test_fixed_loops_multiply_counts_and_open_loops_are_counted():
    def loop(x, keys):
        x, _ = jax.lax.scan(lambda x, key: (x + jax.random.uniform(key, x.shape), None), x, keys)
        x = jax.lax.fori_loop(0, 3, lambda _, x: x[::-1] + x[jnp.array([1, 0, 2])].sum(), x)
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x * 1.5 + 1, x)

    found = jaxprs.irregular(jax.make_jaxpr(loop)(jnp.ones(3), jax.random.split(jax.random.key(0), 7)).jaxpr)
    assert found["random_numbers"] == 21 and found["gathered_numbers"] == 9 and found["open_loops"] == 1


def test_only_the_tpu_branch_of_platform_dependent_is_counted():
    def choose(x):
        return jax.lax.platform_dependent(x, cpu=jnp.sort, default=lambda x: x * 2)

    assert jaxprs.irregular(jax.make_jaxpr(choose)(jnp.ones(N)).jaxpr)["sorted_numbers"] == 0


def test_traffic_is_attributed_to_source_lines():
    program = compiled(scan, abstract(N, N), abstract(7, N, N))
    by_source = program.traffic_by_source(package="/tests/")
    assert sum(by_source.values()) == program.traffic()
    (largest, size), *_ = by_source.items()
    assert largest.startswith("tools/test_hlo.py:") and "scan" in largest and size > 0.5 * program.traffic()
