"""The command line: `mqformer <command>`, or `python -m mqformer_jax <command>`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("mqformer_jax.main", "train a recipe; run it again to resume"),
    "evaluate": (
        "mqformer_jax.evaluation.evaluate",
        "compute the metrics of a checkpoint on the data sets of a recipe",
    ),
    "predict": ("mqformer_jax.inference.predict", "segment images by text prompts"),
    "app": ("mqformer_jax.inference.app", "segment images in a web page"),
    "prepare": ("mqformer_jax.prepare.cli", "convert annotated images to the training format"),
    "convert": (
        "mqformer_jax.convert.cli",
        "convert other projects' checkpoints for use here, or this project's to safetensors",
    ),
    "synthesize": ("mqformer_jax.synthesize.cli", "generate masks or captions for boxes"),
    "train-matting": ("mqformer_jax.train_matting", "train the refiner that turns masks into mattes"),
    "export": ("mqformer_jax.inference.export", "export a checkpoint as a program that runs without this package"),
    "compile": (
        "mqformer_jax.tools.compile_for_tpu",
        "compile the train step of a recipe for TPUs, without a TPU, and report its memory",
    ),
    "show": ("mqformer_jax.tools.show_batch", "draw the images, targets and prompts that training reads"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that `argv` (default: `sys.argv[1:]`) names. Only the modules of that command are imported."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name == "--version":
        import mqformer_jax

        print(mqformer_jax.__version__)
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(COMMANDS)}."
        sys.exit(f"mqformer: unknown command {name!r}; {hint}")
    from mqformer_jax.interrupts import exit_on_ctrl_c

    exit_on_ctrl_c(f"mqformer {name}: stopped.")  # until the command sets its own message
    importlib.import_module(COMMANDS[name][0]).run(rest)


def usage() -> str:
    """Return the text of `mqformer --help`: all commands, each with a summary."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mqformer <command> [options]",
            "",
            "MQ-Former: one text-prompted model for every segmentation task.",
            "",
            *lines,
            "",
            "`mqformer <command> --help` shows the options of a command.",
        ]
    )


if __name__ == "__main__":
    main()
