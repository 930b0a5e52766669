"""Compile the train step of a full-size recipe for this machine and report time, parameters and memory.

    python benchmarks/compile_time.py --run [--config.batch_size=1] [--config.model.dtype=float32]

With --run, the script also runs two steps and times the second. The config is configs/coco_ref.py (ResNet-50,
1024 x 1024, 400 queries, 9 layers) with one image per step, 20 targets and all prompts. All weights are zero, which
does not affect time or memory. The compilation cache is not used.
"""

from __future__ import annotations

import os
import resource
import sys
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.training.step import TrainStep

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

_RUN = flags.DEFINE_bool("run", False, "Also run two steps and time the second.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", os.path.join(REPOSITORY, "configs", "coco_ref.py"), "Recipe to compile."
)


def main(_) -> None:
    config = _CONFIG.value
    if not any(argument.startswith("--config.batch_size") for argument in sys.argv):
        config.batch_size = 1
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    started = time.perf_counter()
    step = TrainStep(config, mesh)
    built = time.perf_counter()
    lowered = step.compiled.lower(*step.arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory, size = compiled.memory_analysis(), lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
    without_text = size(step.abstract.params) + size(step.abstract.frozen) - size(step.abstract.params["text_encoder"])
    print(
        f"model {config.model.backbone.name}, {config.model.dtype}, batch {config.batch_size}, "
        f"canvas {tuple(config.data.canvas)}"
    )
    print(
        f"parameters: {without_text:.2f} M without the text encoder, "
        f"{size(step.abstract.params['text_encoder']):.2f} M in it"
    )
    print(
        f"seconds: {built - started:.1f} to compute the shapes of the model, {traced - built:.1f} to trace, "
        f"{done - traced:.1f} to compile"
    )
    print(
        f"GB per step: {memory.argument_size_in_bytes / 1e9:.2f} arguments, "
        f"{memory.temp_size_in_bytes / 1e9:.2f} temporaries"
    )
    print(f"peak memory of this process, after compiling: {peak():.2f} GB")
    if _RUN.value:
        run(compiled, step, config)


def run(compiled, step: TrainStep, config) -> None:
    """Run two steps on dummy data and time the second."""
    zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
    state = jax.tree.map(zeros, step.abstract)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), step.arguments[1])
    batch = batch.replace(
        size=np.full_like(batch.size, config.data.canvas),
        prompt_valid=~batch.prompt_valid, prompt_exhaustive=~batch.prompt_exhaustive,
        num_targets=batch.num_targets + 20, boxes=batch.boxes + 0.5, has_mask=~batch.has_mask,
    )  # fmt: skip
    for _ in range(2):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, step.put(batch)))
    print(f"seconds per step: {time.perf_counter() - started:.1f}")
    print(f"peak memory of this process, after running: {peak():.2f} GB")


def peak() -> float:
    """Return the peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    app.run(main)
