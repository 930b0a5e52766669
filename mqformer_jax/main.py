"""Train a recipe:  python -m mqformer_jax.main --config=configs/coco_ref.py:sample --workdir=runs/demo"""

from __future__ import annotations

from absl import flags, logging
from ml_collections import config_flags

from mqformer_jax import command_line, interrupts

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe, e.g. configs/coco_ref.py or configs/coco_ref.py:sample.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and pictures go; a run found there goes on."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}: options are --config, --workdir and --config.FIELD=VALUE.")
    # after the flags are read: a wrong flag should not wait for JAX
    from mqformer_jax import config as recipes
    from mqformer_jax.parallel import distributed

    recipes.check(_CONFIG.value)
    distributed.initialize()
    from mqformer_jax.evaluate import table
    from mqformer_jax.train import train

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches
    results = train(_CONFIG.value, _WORKDIR.value)
    if results is None and interrupts.was_postponed():
        interrupts.exit_now(
            interrupts.STATUS, f"{_WORKDIR.value}: stopped; checkpoint saved. Run the same command to resume."
        )
    if distributed.is_first() and results is None:
        print(f"{_WORKDIR.value}: received SIGTERM; checkpoint saved. Run the same command to resume.")
    elif distributed.is_first():
        print(table(results))
        print(f"\n{_WORKDIR.value}: eval.json, pictures, metrics.jsonl, checkpoints")


def run() -> None:
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run(main, "mqformer_jax", "stopped. Run the same command to resume from the last checkpoint.")


if __name__ == "__main__":
    run()
