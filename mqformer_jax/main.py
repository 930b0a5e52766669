"""Train a recipe:  python -m mqformer_jax.main --config=configs/coco_ref.py:sample --workdir=runs/demo"""

from __future__ import annotations

import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe, e.g. configs/coco_ref.py or configs/coco_ref.py:sample.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go; a run found there goes on.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}: options are --config, --workdir and --config.FIELD=VALUE.")
    # after the flags are read: a wrong flag should not wait for JAX
    from mqformer_jax import config as recipes
    from mqformer_jax.evaluate import table
    from mqformer_jax.train import train

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    recipes.check(_CONFIG.value)
    results = train(_CONFIG.value, _WORKDIR.value)
    print(table(results))
    print(f"\n{_WORKDIR.value}: eval.json, pictures, metrics.jsonl, checkpoints")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, but a wrong flag, field or recipe ends in one line."""
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.keys()  # a recipe that failed to load says so here
        return rest
    except (AttributeError, KeyError) as e:
        field = str(e).strip("\"'")
        given = next((a for a in argv if f".{field}" in a), field)
        sys.exit(f"mqformer_jax: {given}: the recipe has no field {field!r}; mqformer_jax/config.py lists them all.")
    except (flags.Error, OSError, ValueError) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        sys.exit(f"mqformer_jax: {lines[-1]}")


def run() -> None:
    """Entry: a user's mistake is one line, not a traceback."""
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        app.run(main, flags_parser=parse_flags)
    except (ValueError, FileNotFoundError) as e:
        if logging.level_debug():
            raise
        sys.exit(f"mqformer_jax: {e}\n(--verbosity=1 shows where)")
    except KeyboardInterrupt:
        sys.exit("\nmqformer_jax: stopped; the same command goes on from the last checkpoint.")


if __name__ == "__main__":
    run()
