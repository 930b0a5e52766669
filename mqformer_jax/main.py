"""Train a recipe:  python -m mqformer_jax.main --config=configs/coco_ref.py:sample --workdir=runs/demo"""

from __future__ import annotations

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe, e.g. configs/coco_ref.py or configs/coco_ref.py:sample.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go; a run found there goes on.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}: options are --config, --workdir and --config.FIELD=VALUE.")
    import jax  # after the flags are read: a wrong flag should not wait for the device

    from mqformer_jax import config as recipes
    from mqformer_jax.evaluate import table
    from mqformer_jax.train import train

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    recipes.check(_CONFIG.value)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/mqformer_jax/compiled"))
    jax.config.update("jax_compilation_cache_dir", cache)
    if jax.default_backend() == "cpu":
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # a step that waits for the last one holds one of few threads
    results = train(_CONFIG.value, _WORKDIR.value)
    print(table(results))
    print(f"\n{_WORKDIR.value}: eval.json, pictures, metrics.jsonl, checkpoints")


def run() -> None:
    """Entry: a user's mistake is one line, not a traceback."""
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        app.run(main)
    except (ValueError, FileNotFoundError) as e:
        if logging.level_debug():
            raise
        sys.exit(f"mqformer_jax: {e}\n(--verbosity=1 shows where)")


if __name__ == "__main__":
    run()
