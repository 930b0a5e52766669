"""Compare implementations of deformable attention.

    python benchmarks/deformable_attention.py [--size 512] [--rounds 5] [--threads 2]  # time on this CPU, float32
    python benchmarks/deformable_attention.py --tpu [--size 1024] [--dtype bfloat16]   # the TPU compiler's report

All implementations compute one layer with three levels (strides 8, 16, 32), 8 heads of width 32 and 4 points, in which
every token is a query:

- "ours": the implementation that this project uses on the CPU ("rows") or on a TPU ("lanes").
- "torch grid_sample" (without --tpu): one call per level, as in Deformable DETR's CPU version.
- "four gathers": JAX with one gather for each corner of the bilinear interpolation.
- "packed" (with --tpu): this project's implementation for CPUs and GPUs ("rows"), compiled for a TPU.

--tpu needs the TPU compiler (`pip install libtpu`, Linux), but no TPU and no torch. It reports:

- "accessed": the compiler's "bytes accessed", which counts a tile of eight rows for each gathered row.
- "operands, results": the bytes of all operands and results.
- "cycles": the compiler's estimate, which does not include gathers, scatters and sorts.
- "temporary": the memory that the program needs for intermediate results.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from mqformer_jax.models.deformable_attention import ms_deform_attn
from mqformer_jax.tools.hlo import Program

HEADS, DH, POINTS = 8, 32, 4
Shapes = list[tuple[int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", action="store_true", help="Compile for a TPU instead of running on this CPU.")
    parser.add_argument(
        "--topology", default="v5e:2x2", help="With --tpu: TPU type and topology. (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, help="Side of the image in pixels. (default: 512, or 1024 with --tpu)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="With --tpu: type of the feature maps."
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="Number of runs; the fastest counts. (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="Threads of torch; XLA uses all CPUs.")
    args = parser.parse_args()
    size = args.size or (1024 if args.tpu else 512)
    shapes = [(size // stride, size // stride) for stride in (8, 16, 32)]
    if args.tpu:
        compile_for_tpu(shapes, args.topology, jnp.dtype(args.dtype))
    else:
        run_here(shapes, args.rounds, args.threads)


four_gathers = functools.partial(ms_deform_attn, implementation="reference")
packed = functools.partial(ms_deform_attn, implementation="rows")


def grid_sample(value, shapes, locations, weights):
    """Return deformable attention by torch's grid_sample. The arguments are those of `ms_deform_attn`, in torch."""
    import torch

    batch, _, heads, dh = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    samples = []
    for level, part in enumerate(value.split([h * w for h, w in shapes], 1)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, dh, *shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
        samples.append(torch.nn.functional.grid_sample(maps, grid, padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    summed = (torch.cat(samples, -1) * weights).sum(-1).reshape(batch, heads * dh, queries)
    return summed.transpose(1, 2)


def jax_calls(op: Callable, shapes: Shapes) -> tuple[Callable, Callable]:
    """Return jitted functions for the forward pass, and for the forward and backward pass, of an implementation."""

    def both(value, locations, weights, gradient):
        output, pull_back = jax.vjp(lambda v, at, w: op(v, shapes, at, w), value, locations, weights)
        return output, pull_back(gradient)

    return jax.jit(lambda v, at, w, _: op(v, shapes, at, w)), jax.jit(both)


def torch_calls(shapes: Shapes) -> tuple[Callable, Callable]:
    """Return functions for the forward pass, and for the forward and backward pass, of torch's grid_sample."""
    import torch

    def forward(value, locations, weights, _):
        with torch.no_grad():
            return grid_sample(value, shapes, locations, weights)

    def both(*inputs):
        value, locations, weights = (x.detach().requires_grad_() for x in inputs[:3])
        output = grid_sample(value, shapes, locations, weights)
        output.backward(inputs[3])
        return output.detach(), (value.grad, locations.grad, weights.grad)

    return forward, both


def random_inputs(shapes: Shapes) -> list[np.ndarray]:
    """Return values, sampling locations, attention weights and an output gradient.

    The locations are a few pixels around each token, as in the encoder.
    """
    rng = np.random.default_rng(0)
    centers = [
        np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1).reshape(-1, 2) for h, w in shapes
    ]
    centers = np.concatenate(centers)[None, :, None, None, None]
    samples = (1, centers.shape[1], HEADS, len(shapes), POINTS)
    locations = centers + 3 * rng.normal(size=(*samples, 2)) / np.array([(w, h) for h, w in shapes])[:, None]
    value, gradient = rng.normal(size=(1, samples[1], HEADS, DH)), rng.normal(size=(1, samples[1], HEADS * DH))
    return [
        np.asarray(x, np.float32)
        for x in (value, locations, rng.dirichlet(np.ones(12), samples[:3]).reshape(samples), gradient)
    ]


def run_here(shapes: Shapes, rounds: int, threads: int) -> None:
    """Check that all implementations agree, run them in turn `rounds` times, and print the fastest time of each."""
    import torch

    torch.set_num_threads(threads)
    inputs = random_inputs(shapes)
    as_jax, as_torch = [jnp.asarray(x) for x in inputs], [torch.tensor(x) for x in inputs]
    peers = {
        "ours": (jax_calls(ms_deform_attn, shapes), as_jax),
        "torch grid_sample": (torch_calls(shapes), as_torch),
        "JAX, four gathers": (jax_calls(four_gathers, shapes), as_jax),
    }
    expected = [np.asarray(x) for x in jax.tree.leaves(peers["ours"][0][1](*as_jax))]
    for name, (calls, arrays) in peers.items():
        calls[0](*arrays)
        for a, b in zip(expected, jax.tree.leaves(calls[1](*arrays)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(a).max(), err_msg=name)
    seconds = {name: [np.inf, np.inf] for name in peers}
    for _ in range(rounds):
        for name, (calls, arrays) in peers.items():
            for k, call in enumerate(calls):
                started = time.perf_counter()
                jax.block_until_ready(call(*arrays))
                seconds[name][k] = min(seconds[name][k], time.perf_counter() - started)
    tokens = sum(h * w for h, w in shapes)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{tokens} tokens, float32; torch on {threads} threads, XLA on {cpus} CPUs; fastest of {rounds}\n")
    print("| | forward, s | relative to torch | forward + backward, s | relative to torch |\n|---|---|---|---|---|")
    (f, b), width = seconds["torch grid_sample"], max(map(len, seconds))
    for name, (forward, both) in seconds.items():
        print(f"| {name:{width}} | {forward:.3f} | {forward / f:.2f} | {both:.3f} | {both / b:.2f} |")


def compile_for_tpu(shapes: Shapes, topology: str, dtype: jnp.dtype) -> None:
    """Compile all JAX implementations for a TPU and print the compiler's report on each."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not query a metadata server for the type of this machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so several processes can compile
    from jax.experimental import topologies

    chip = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(topology, platform="tpu").devices[0])
    tokens = sum(h * w for h, w in shapes)
    samples = (1, tokens, HEADS, len(shapes), POINTS)
    arrays = (
        ((1, tokens, HEADS, DH), dtype),
        ((*samples, 2), np.float32),
        (samples, np.float32),
        ((1, tokens, HEADS * DH), np.float32),
    )
    abstract = [jax.ShapeDtypeStruct(shape, kind, sharding=chip) for shape, kind in arrays]
    print(f"one image, {tokens} tokens, {dtype}, {topology.partition(':')[0]}; jax {jax.__version__}\n")
    print("| | accessed, GB | operands, results, GB | cycles, M | temporary, GB |\n|---|---|---|---|---|", flush=True)
    forms = {"four gathers": four_gathers, "packed": packed, "ours": ms_deform_attn}
    for name, op in forms.items():
        for what, call in zip(("forward", "forward + backward"), jax_calls(op, shapes)):
            compiled = call.lower(*abstract).compile()
            text = compiled.as_text()
            cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))) / 1e6
            accessed, operands = compiled.cost_analysis()["bytes accessed"] / 1e9, Program(text).traffic() / 1e9
            temporary = compiled.memory_analysis().temp_size_in_bytes / 1e9
            print(f"| {name}, {what} | {accessed:.1f} | {operands:.1f} | {cycles:.1f} | {temporary:.2f} |", flush=True)


if __name__ == "__main__":
    main()
