"""Train a recipe, then evaluate it. Run the same command again to resume.

    mqformer train --config=coco_ref:sample --workdir=runs/demo
    python -m mqformer_jax.main --config=configs/coco_ref.py:sample --workdir=runs/demo  # the same

With --check_only, the command only checks the flags. This needs no data and no accelerator, e.g. for 16 TPU chips:

    mqformer train --config=coco_ref --workdir=runs/pod --check_only --num_devices=16

The exit status is 0 when the run is finished, 75 after SIGTERM with all steps saved, 130 after Ctrl-C and 1 after an
error.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from mqformer_jax import cli, interrupts


def main(argv: list[str]) -> int:
    """Train, or only check the flags. Return the exit status."""
    cli.no_arguments(argv)
    given = flags.FLAGS
    # imported after the flags are read, so that a wrong flag is reported without waiting for JAX
    from mqformer_jax import config as recipes

    recipes.check(given.config)
    if given.check_only:
        print(check_devices(given.config, given.num_devices))
        return 0
    if given.num_devices is not None:
        raise ValueError("--num_devices needs --check_only: training uses all devices that it finds.")
    signal.signal(signal.SIGTERM, lambda *_: None)  # `exit_on_sigterm` needs a Python handler
    with interrupts.exit_on_sigterm():  # until the training loop starts; there, `Preemption` saves a checkpoint first
        from mqformer_jax.parallel import distributed

        distributed.initialize()
        from mqformer_jax.evaluation.evaluate import explain, table
        from mqformer_jax.train import train

        results = train(given.config, given.workdir)
    if results is None and interrupts.was_postponed():
        interrupts.exit_now(
            interrupts.STATUS, f"{given.workdir}: stopped; checkpoint saved. Run the same command to resume."
        )
    if results is None:
        if distributed.is_first():
            print(f"{given.workdir}: received SIGTERM; checkpoint saved. Run the same command to resume.")
        return interrupts.PREEMPTED
    if distributed.is_first():
        print(table(results))
        print("\n".join(["", *explain(results), *([given.config.expected] if given.config.expected else [])]))
        print(f"\nResults in {given.workdir}: eval.json, pictures, metrics.jsonl, checkpoints")
        print("\n".join(next_commands(given.config, given.workdir)))
    return 0


def next_commands(config: ConfigDict, workdir: str) -> list[str]:
    """Return lines that tell a user what to try with the trained model."""
    from mqformer_jax.input.record import DatasetInfo

    entries = (*config.eval.sets, *config.data.mixture)
    infos = [DatasetInfo.load(os.path.join(config.data.root, entry["name"])) for entry in entries]
    classes = next((info.classes for info in infos if info.classes), ())
    if classes:
        task = "panoptic" if any(c.is_region for c in classes) else "instance"
        prompts = "; ".join(c.name + "*" * c.is_region for c in classes[:8])
    elif any("referring" in entry["tasks"] for entry in entries):
        task, prompts = "referring", "the person on the left"
    else:
        task, prompts = "foreground", ""
    images = os.path.join(config.data.root, "sample_images")
    images = images if entries[0]["name"].startswith("sample_") and os.path.isdir(images) else "photo.jpg"
    mqformer = "mqformer"
    if shutil.which(mqformer) is None:  # the virtual environment is not activated
        mqformer = os.path.relpath(os.path.join(os.path.dirname(sys.executable), mqformer))
    return [
        "",
        *([config.about] if config.about else []),
        "Try:",
        f"  {mqformer} predict --checkpoint={workdir} --image={images} --task={task}"
        + (f' --prompts="{prompts}"' if prompts else ""),
        f"  {mqformer} app --checkpoint={workdir}    # a web page; needs pip install 'mqformer_jax[demo]'",
        f"  {mqformer} export --checkpoint={workdir} --output={workdir}_exported    # a program that runs without this "
        "package; needs pip install 'mqformer_jax[export]'",
    ]


def check_devices(config: ConfigDict, num_devices: int | None) -> str:
    """Return a line that says how many images each device gets and which paths the run reads.

    config: a valid recipe. num_devices: number of devices of the run; if it is None, the line gives only the paths.
    Raises ValueError if the batch cannot be split over the devices.
    """
    paths = ", ".join([config.data.root, *config.init_from])
    if num_devices is None:
        return f"The flags are valid. The run reads {paths}."
    from mqformer_jax.parallel.mesh import check_batch_size, mesh_shape

    data, fsdp, _ = mesh_shape(config.mesh, num_devices)
    check_batch_size(config, data * fsdp)
    images = config.batch_size // (data * fsdp)
    return f"The flags are valid for {num_devices} devices, {images} image(s) each per step. The run reads {paths}."


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of the command."""
    cli.define_recipe(values)
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder for checkpoints, metrics and pictures. If it contains a run, the run is resumed.",
        flag_values=values,
    )
    flags.DEFINE_bool("check_only", False, "Check the flags and exit, without reading data.", flag_values=values)
    text = "With --check_only: number of devices of the run, e.g. 16 for v5litepod-16."
    flags.DEFINE_integer("num_devices", None, text, lower_bound=1, flag_values=values)
    flags.mark_flags_as_required(["config", "workdir"], values)


def run(argv: Sequence[str]) -> None:
    define_flags(flags.FLAGS)
    interrupted = "stopped. Run the same command to resume from the last checkpoint."
    cli.run(main, "train", __doc__, interrupted, argv)


if __name__ == "__main__":
    run(sys.argv[1:])
