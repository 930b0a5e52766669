"""Compile the train step of a recipe for TPUs without using a TPU. Report its memory, traffic and estimated time.

    mqformer compile --config=coco_ref --topology=v5e:16x16

Needs the TPU compiler (`pip install 'mqformer_jax[tpu]'`, Linux) and no TPU. Supports topologies of v4, v5e, v5p, v6e
and tpu7x. If the step does not fit in memory, the report lists the largest arrays, and the command tries changes of the
recipe until it fits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections import ConfigDict

from mqformer_jax import cli
from mqformer_jax import config as recipes
from mqformer_jax.arrays import Number
from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.tools import hlo, jaxprs
from mqformer_jax.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak rates of one device, which is a chip (tpu7x: half a chip).

    teraflops: bfloat16 TFLOP/s. memory: bandwidth, GB/s. network: bandwidth to all neighbors together, GB/s.
    """

    teraflops: float
    memory: float
    network: float


# from cloud.google.com/tpu/docs/v4 to .../tpu7x, November 2026
CHIPS = {
    "v4": Chip(275.0, 1228.0, 300.0),
    "v5e": Chip(197.0, 819.0, 200.0),
    "v5p": Chip(459.0, 2765.0, 600.0),
    "v6e": Chip(918.0, 1640.0, 448.0),
    "tpu7x": Chip(1153.0, 3690.0, 600.0),
}
GB = 1e9
# Assumed seconds for each row, number or loop that `jaxprs.irregular` counts, in addition to its memory traffic. These
# are guesses, not measurements: one memory access per row or number, two for a scatter, several passes for a sort.
SLOW = {
    "gathered_rows": 2e-9,
    "gathered_numbers": 5e-9,
    "scattered_rows": 4e-9,
    "scattered_numbers": 10e-9,
    "sorted_numbers": 10e-9,
    "open_loops": 5e-3,
}
# (flag, whether it applies, change of the config) to save memory, the mildest first. `advice` adds them one by one.
REMEDIES = (
    ('config.model.remat="dots"', lambda c: c.model.remat == "none", lambda c: c.model.update(remat="dots")),
    ('config.model.remat="layers"', lambda c: c.model.remat != "layers", lambda c: c.model.update(remat="layers")),
    (
        "config.grad_accum_steps={grad_accum_steps}",
        lambda c: True,
        lambda c: c.update(grad_accum_steps=c.grad_accum_steps * 2),
    ),
    ("config.mesh={mesh}", lambda c: tuple(c.mesh) == (-1, 1, 1), lambda c: c.update(mesh=(1, -1, 1))),
    ("config.batch_size={batch_size}", lambda c: c.batch_size > 1, lambda c: c.update(batch_size=c.batch_size // 2)),
)


def get_topology(name: str) -> list[jax.Device]:
    """Return the devices of a TPU slice such as "v5e:4x4". They exist only for compilation.

    Raises ValueError if there is no such slice or the TPU compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(f"--topology={name}: give one of {', '.join(CHIPS)} and a shape, e.g. v5e:16x16 or v4:4x4x8.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not query a metadata server for the type of this machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so several processes can compile
    # as in JAX, both cores of a chip are one device
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        with _quiet():
            return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as e:
        if "libtpu" in str(e) or "tpu plugin" in str(e).lower():
            raise ValueError("the TPU compiler is not installed. Run pip install -e '.[tpu]' (Linux, x86-64).") from e
        raise ValueError(f"--topology={name}: {str(e).splitlines()[0]}") from e


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Hide the process's error output while the context is open.

    libtpu reports a missing TPU at length and bypasses `sys.stderr`, so the file descriptor is redirected.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def memory_of(device: jax.Device) -> float:
    """Return the bytes of a device's memory that the compiler may use.

    Compiles a program with an array that is too large, and reads the number from the compiler's error message.
    """
    everything = jax.ShapeDtypeStruct((1 << 40,), "uint8", sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(everything).compile()
    except jax.errors.JaxRuntimeError as e:
        return _size(re.search(r"available HBM \(([\d.]+\w)\)", str(e)).group(1))
    raise AssertionError("the compiler accepts an array of 1 TiB, so its memory limit is unknown: adapt `memory_of`")


def _size(text: str) -> float:
    """Return the number of bytes of a size such as "15.75G"."""
    return float(text[:-1]) * 1024 ** ("KMGT".index(text[-1]) + 1)


def adapted(config: ConfigDict, devices: int) -> tuple[ConfigDict, str]:
    """Return the config with a batch size that `devices` devices can split, and a note if it was changed.

    A changed batch has mesh[0] x mesh[1] x grad_accum_steps images.
    """
    config = config.copy_and_resolve_references()
    mesh = [n if n != -1 else -devices // _product(config.mesh) for n in config.mesh]
    images = mesh[0] * mesh[1] * config.grad_accum_steps
    if config.batch_size % images == 0:
        return config, ""
    was, config.batch_size = config.batch_size, images
    return (
        config,
        (
            f"batch_size {was} is not divisible by {mesh[0]} x {mesh[1]} x grad_accum_steps {config.grad_accum_steps}: "
            f"compiled with batch_size {images}"
        ),
    )


def _product(values: Any) -> int:
    total = 1
    for value in values:
        total *= value
    return total


def measure(config: ConfigDict, topology: str, devices: list[jax.Device]) -> dict[str, Any]:
    """Compile the train step of a config for the devices and return a report.

    In the report, `needed` and `available` are bytes per device. If the compiler rejects the program, `needed` is taken
    from its message, or None. `largest` lists the largest arrays of the program or, if it is rejected, of the traced
    program before fusion.
    """
    chip, config, note = CHIPS[topology.partition(":")[0]], *adapted(config, len(devices))
    mesh = make_mesh(config.mesh, devices)
    started = time.perf_counter()
    step = TrainStep(config, mesh)
    traced = step.compiled.trace(*step.arguments)
    lowered = traced.lower()
    lowering = time.perf_counter() - started
    report: dict[str, Any] = {
        "topology": topology,
        "devices": len(devices),
        "hosts": len({d.process_index for d in devices}),
    }
    report |= {"backbone": config.model.backbone.name, "canvas": list(config.data.canvas), "dtype": config.model.dtype}
    report |= {
        "images": config.batch_size,
        "mesh": dict(mesh.shape),
        "grad_accum_steps": config.grad_accum_steps,
        "remat": config.model.remat,
    }
    report |= {"note": note, "available": memory_of(devices[0]), "flops": jaxprs.flops(traced.jaxpr.jaxpr)}
    report["irregular"] = jaxprs.irregular(traced.jaxpr.jaxpr)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        refused = {"fits": False, "needed": _needed(str(e)), "largest": jaxprs.largest_traced(traced.jaxpr.jaxpr)}
        return report | refused | {"seconds": {"lower": lowering, "compile": time.perf_counter() - started - lowering}}
    report["seconds"] = {"lower": lowering, "compile": time.perf_counter() - started - lowering}
    memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    kinds = {"arguments": "argument", "temporaries": "temp", "output": "output", "program": "generated_code"}
    report["memory"] = {name: getattr(memory, f"{kind}_size_in_bytes") for name, kind in kinds.items()}
    report["memory"]["output"] -= memory.alias_size_in_bytes  # the new state reuses the memory of the old one
    report["needed"] = sum(report["memory"].values())
    report |= {"fits": report["needed"] <= report["available"], "largest": program.largest()}
    report |= {"bytes_accessed": program.traffic(), "collectives": collectives(program)}
    report["by_source"] = {name: float(size) for name, size in list(program.traffic_by_source().items())[:40]}
    return report | {"estimate": estimate(report, chip)}


def _needed(message: str) -> float | None:
    """Return the bytes that a program needs according to the compiler's out-of-memory message, or None."""
    found = re.search(r"[Uu]sed ([\d.]+[KMGT]) of|temporaries \(([\d.]+[KMGT])\)", message)
    return _size(next(filter(None, found.groups()))) if found else None


def collectives(program: hlo.Program) -> dict[str, dict[str, Number]]:
    """Return {kind of collective: {"count", "bytes", "sent", "in_loops"}} of a program.

    count: executions per step. bytes: size of the results. sent: bytes that each device sends, by ring algorithms.
    in_loops: number of instructions that are inside loops.
    """
    found: dict[str, dict[str, Number]] = defaultdict(lambda: {"count": 0, "bytes": 0.0, "sent": 0.0, "in_loops": 0})
    for run, group in program.collectives():
        kind, size = run.instruction.collective, run.instruction.bytes * run.times
        if run.instruction.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
            size /= 1 + 1 / group if kind == "all-gather" else 2  # its shape is (operand, result)
        share = {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1, "collective-permute": 1}.get(
            kind, (group - 1) / group
        )
        entry = found[kind]
        entry["count"] += run.times
        entry["bytes"] += size
        entry["sent"] += size * share
        entry["in_loops"] += bool(run.loops)
    return dict(found)


def estimate(report: dict[str, Any], chip: Chip) -> dict[str, float]:
    """Return bounds of the time of a step in seconds, their parts, and the images per second for both bounds.

    "step" is the roofline: the slower of arithmetic ("compute") and memory traffic ("memory"), plus the time of
    collectives ("network"). "step_at_most" adds the assumed costs of gathers, scatters, sorts and loops ("irregular",
    see `SLOW`). Even "step_at_most" assumes that float32 matmuls reach the bfloat16 peak.
    """
    seconds = {
        "compute": report["flops"] / (chip.teraflops * 1e12),
        "memory": report["bytes_accessed"] / (chip.memory * GB),
        "network": sum(entry["sent"] for entry in report["collectives"].values()) / (chip.network * GB),
    }
    seconds["step"] = max(seconds["compute"], seconds["memory"]) + seconds["network"]
    seconds["irregular"] = sum(cost * report["irregular"][kind] for kind, cost in SLOW.items())
    seconds["step_at_most"] = seconds["step"] + seconds["irregular"]
    return seconds | {
        "images_per_second": report["images"] / seconds["step"],
        "images_per_second_at_least": report["images"] / seconds["step_at_most"],
    }


def advice(config: ConfigDict, topology: str, devices: list[jax.Device]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Try changes of the config that save memory, each in addition to the previous ones, until the step fits.

    Yield (the changes so far, the report with them) for each try.
    """
    config, changes = adapted(config, len(devices))[0], []
    for words, applies, change in REMEDIES:
        if not applies(config):
            continue
        images = config.batch_size
        change(config)
        config = adapted(config, len(devices))[0]
        if config.batch_size > images:  # parts of one image cannot be split
            config.update(grad_accum_steps=1, batch_size=images)
            continue
        changes.append(words.format(**{k: config[k] for k in ("grad_accum_steps", "mesh", "batch_size")}))
        report = measure(config, topology, devices)
        yield " ".join(f"--{change}" for change in changes), report
        if report["fits"]:
            return


def table(report: dict[str, Any]) -> str:
    """Return the report as text. Each line has a name and a value."""
    gb = lambda value: f"{value / GB:.2f} GB"
    rows = {
        "topology": f"{report['topology']}: {report['devices']} devices, {report['hosts']} hosts",
        "step": (
            f"{report['backbone']}, {' x '.join(map(str, report['canvas']))}, {report['images']} images, "
            f"{report['dtype']}, remat {report['remat']}, grad_accum_steps {report['grad_accum_steps']}"
        ),
        "mesh": " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items()),
    }
    rows |= {"note": report["note"]} if report["note"] else {}
    kinds = (
        ", ".join(f"{name} {gb(size)}" for name, size in report.get("memory", {}).items()) or "rejected by the compiler"
    )
    rows["memory per device"] = (
        f"{gb(report['needed']) if report['needed'] else 'an unknown amount'} of {gb(report['available'])}: {kinds}"
    )
    if report["fits"]:
        rows["fits"] = f"true, {gb(report['available'] - report['needed'])} to spare"
    else:
        rows["fits"] = "false"
        rows |= {
            f"largest {k + 1}": f"{gb(b['bytes'])} {b['shape']} {b['source']}" for k, b in enumerate(report["largest"])
        }
    if "estimate" in report:
        seconds = report["estimate"]
        rows["irregular per device"] = ", ".join(
            f"{count / 1e6:.2f} M {name.replace('_', ' ')}"
            if count >= 1000
            else f"{count:.0f} {name.replace('_', ' ')}"
            for name, count in report["irregular"].items()
        )
        rows["FLOPs per device"] = f"{report['flops'] / 1e12:.2f} TFLOP"
        rows["bytes accessed"] = gb(report["bytes_accessed"])
        rows |= {f"- {name}": gb(size) for name, size in list(report["by_source"].items())[:10]}
        for kind, entry in report["collectives"].items():
            rows[kind] = (
                f"{entry['count']:.0f} per step, {gb(entry['bytes'])}, {gb(entry['sent'])} sent by each device, "
                f"{entry['in_loops']} in loops"
            )
        parts = ", ".join(
            f"{name} {1e3 * seconds[name]:.1f} ms" for name in ("compute", "memory", "network", "irregular")
        )
        rows["time of a step"] = (
            f"{1e3 * seconds['step']:.1f} to {1e3 * seconds['step_at_most']:.1f} ms, "
            f"{seconds['images_per_second_at_least']:.0f} to {seconds['images_per_second']:.0f} images/s ({parts})"
        )
        rows["assumes"] = (
            "published peaks; compute and memory overlap, the network does not; ring algorithms. "
            "The longer time adds, for each of: "
            + ", ".join(f"{name.replace('_', ' ')} {1e9 * cost:g} ns" for name, cost in SLOW.items())
        )
    rows["seconds"] = (
        f"{report['seconds']['lower']:.0f} to trace and lower, {report['seconds']['compile']:.0f} to compile"
    )
    width = max(map(len, rows))
    return "\n".join(f"{name + ':':{width + 1}} {value}" for name, value in rows.items())


def main(argv: list[str]) -> None:
    cli.no_arguments(argv)
    jax.config.update("jax_platforms", "cpu")  # so that constants of the program are computed on this machine
    jax.config.update("jax_enable_compilation_cache", False)  # the compilation is measured
    given = flags.FLAGS
    config, topology = given.config, given.topology
    recipes.check(config)
    devices = get_topology(topology)
    report = measure(config, topology, devices)
    print(table(report), flush=True)
    if not report["fits"] and given.advise:
        for change, tried in advice(config, topology, devices):
            print(
                f"with {change}: {'fits' if tried['fits'] else 'does not fit'}, needs "
                + (f"{tried['needed'] / GB:.2f} GB" if tried["needed"] else "an unknown amount of memory"),
                flush=True,
            )
            report.setdefault("tried", []).append({"change": change, "fits": tried["fits"], "needed": tried["needed"]})
    path = given.output or f"{report['backbone']}_{topology.replace(':', '_')}.json"
    with open(path, "w") as f:
        json.dump(report, f, indent=1)
    print(f"Wrote {path}")


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of the command."""
    cli.define_recipe(values)
    flags.DEFINE_string(
        "topology",
        None,
        "TPU type and topology of the slice, e.g. v5e:16x16 or v4:4x4x8. Required.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output",
        None,
        "JSON file for the report, e.g. report.json. (default: BACKBONE_TOPOLOGY.json)",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "advise",
        True,
        "If the step does not fit in memory, try changes of the recipe until it fits.",
        flag_values=values,
    )
    flags.mark_flags_as_required(["config", "topology"], values)


def run(argv: Sequence[str]) -> None:
    define_flags(flags.FLAGS)
    cli.run(main, "compile", __doc__, "stopped.", argv)
