"""Convert a random full-size checkpoint of each public model, and report the results, time and memory.

    python benchmarks/conversion.py [--layouts=maskdino_r50_instance,...]

The layouts in tests/convert/layouts list the tensor names, shapes and types of each public checkpoint. Each conversion
runs in a separate process. Time and peak memory are those of the whole process, including the start of JAX.
"parameters" counts the floating-point numbers in the original file, with shared tensors counted once. "ours" counts
those in the checkpoint that was written. The columns "loaded" to "ignored" count tensors by the result of their
conversion.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [REPOSITORY, os.path.join(REPOSITORY, "tests", "convert")]

import layouts  # noqa: E402

from mqformer_jax.checkpoint import load_weights  # noqa: E402
from mqformer_jax.convert.files import write_safetensors  # noqa: E402
from mqformer_jax.convert.rules import leaves  # noqa: E402

COUNTS = ("loaded", "reshaped", "missing", "unused", "mismatched", "ignored")


def measure(name: str, folder: str) -> str:
    """Return the row of the table for one layout. folder: for temporary files."""
    theirs, ours = os.path.join(folder, "theirs.safetensors"), os.path.join(folder, "ours")
    # A child's peak memory includes the memory of its parent at the start, so this process must not hold the weights.
    subprocess.run([sys.executable, __file__, "--write", name, theirs], check=True)
    command = [sys.executable, "-m", "mqformer_jax", "convert", "--input", theirs, "--output", ours]
    started = time.perf_counter()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment
    )
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{name}: {child.stderr.read()}")
    seconds, scale = time.perf_counter() - started, 1 if sys.platform == "darwin" else 1024
    weights = load_weights(ours)
    written = sum(leaf.size for tree in (weights.params, weights.frozen) for leaf in leaves(tree).values())
    shared = layouts.aliases(name)
    count = sum(
        math.prod(shape)
        for key, (shape, dtype) in layouts.load(name).items()
        if key not in shared and dtype.kind == "f"
    )
    counts = [re.search(rf"^{kind}: (\d+)", said, re.M).group(1) for kind in COUNTS]
    family = re.search(r"\.safetensors: (\w+)", said).group(1)
    cells = (
        name,
        family,
        f"{count / 1e6:.2f}",
        f"{written / 1e6:.2f}",
        *counts,
        f"{seconds:.1f}",
        f"{usage.ru_maxrss * scale / 1e9:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layouts", default=",".join(layouts.NAMES), help="Names of layouts, separated by commas. (default: all)"
    )
    parser.add_argument("--row", metavar="NAME", help="Print only the row of this layout.")
    parser.add_argument(
        "--write", nargs=2, metavar=("NAME", "FILE"), help="Only write a random checkpoint to this file."
    )
    args = parser.parse_args()
    if args.write:
        write_safetensors(args.write[1], dict(layouts.random(args.write[0])))
    elif args.row:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(args.row, folder))
    else:
        header = ("layout", "family", "parameters, M", "ours, M", *COUNTS, "seconds", "peak memory, GB")
        print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
        for name in args.layouts.split(","):
            subprocess.run([sys.executable, __file__, "--row", name], check=True)


if __name__ == "__main__":
    main()
