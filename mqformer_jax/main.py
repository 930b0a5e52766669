"""Train a recipe, then evaluate it. Run the same command again to resume.

    mqformer train --config=coco_ref:sample --workdir=runs/demo

`python -m mqformer_jax.main --config=configs/coco_ref.py:sample --workdir=runs/demo` is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from mqformer_jax import cli, interrupts


def main(argv: list[str]) -> None:
    cli.no_arguments(argv)
    given = flags.FLAGS
    # after the flags are read: a wrong flag should not wait for JAX
    from mqformer_jax import config as recipes
    from mqformer_jax.parallel import distributed

    recipes.check(given.config)
    distributed.initialize()
    from mqformer_jax.evaluation.evaluate import table
    from mqformer_jax.train import train

    results = train(given.config, given.workdir)
    if results is None and interrupts.was_postponed():
        interrupts.exit_now(
            interrupts.STATUS, f"{given.workdir}: stopped; checkpoint saved. Run the same command to resume."
        )
    if distributed.is_first() and results is None:
        print(f"{given.workdir}: received SIGTERM; checkpoint saved. Run the same command to resume.")
    elif distributed.is_first():
        print(table(results))
        print(f"\n{given.workdir}: eval.json, pictures, metrics.jsonl, checkpoints")


def run(argv: Sequence[str]) -> None:
    cli.define_recipe()
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures. A run found there is resumed.")
    flags.mark_flags_as_required(["config", "workdir"])
    interrupted = "stopped. Run the same command to resume from the last checkpoint."
    cli.run(main, "train", __doc__, interrupted, argv)


if __name__ == "__main__":
    run(sys.argv[1:])
