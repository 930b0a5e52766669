"""The train step of a full-size recipe, compiled for this machine: time, parameters, and the memory it would take.

    python benchmarks/compile_time.py [--config.batch_size=1] [--config.model.dtype=float32]

The config is configs/coco_ref.py (R50, 1024 x 1024, 400 queries, 9 layers) with one image a step. Nothing is run but the compiler; the
memory is what XLA plans for one step: arguments (state and batch), temporaries, and code. No compilation cache is read.
"""

from __future__ import annotations

import os
import resource
import sys
import time

from absl import app
from ml_collections import config_flags

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [REPOSITORY]

import jax  # noqa: E402

from mqformer_jax.parallel.mesh import make_mesh  # noqa: E402
from mqformer_jax.train_step import TrainStep, abstract_batch  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", os.path.join(REPOSITORY, "configs", "coco_ref.py"), "A recipe.")


def main(_) -> None:
    config = _CONFIG.value
    if not any(argument.startswith("--config.batch_size") for argument in sys.argv):
        config.batch_size = 1
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    started = time.perf_counter()
    step = TrainStep(config, mesh)
    built = time.perf_counter()
    lowered = step.compiled.lower(step.abstract, abstract_batch(config))
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory, size = compiled.memory_analysis(), lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
    without_text = size(step.abstract.params) + size(step.abstract.frozen) - size(step.abstract.params["text_encoder"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"model {config.model.backbone.name}, {config.model.dtype}, batch {config.batch_size}, canvas {tuple(config.data.canvas)}")
    print(f"parameters: {without_text:.2f} M without the text encoder, {size(step.abstract.params['text_encoder']):.2f} M in it")
    print(f"seconds: {built - started:.1f} to build the model's shapes, {traced - built:.1f} to trace, {done - traced:.1f} to compile")
    print(f"GB a step: {memory.argument_size_in_bytes / 1e9:.2f} arguments, {memory.temp_size_in_bytes / 1e9:.2f} temporaries")
    print(f"GB of this process at its peak, compiling: {peak / 1e9:.2f}")


if __name__ == "__main__":
    app.run(main)
