"""Bring other projects' checkpoints in, and ours out.

    python -m mqformer_jax.convert --from maskdino --input model.pth --output pretrained/maskdino
    python -m mqformer_jax.convert --input clip_folder --output pretrained/clip        # the family is guessed from the names
    python -m mqformer_jax.convert --from lite --output pretrained/lite                # fetches both parts, then converts them
    python -m mqformer_jax.convert --to safetensors --input runs/demo --output demo.safetensors

What it writes, training starts from (config.init_from) and, where it is a whole model, `Predictor.from_checkpoint` loads.
"""

from __future__ import annotations

import argparse
import ast
import sys
from typing import Any

from mqformer_jax.convert.convert import convert, export, own_config, restore
from mqformer_jax.convert.families import FAMILIES


def arguments() -> argparse.Namespace:
    families = "\n".join(f"  {family.name:20} {family.originals}" for family in FAMILIES.values())
    parser = argparse.ArgumentParser(
        prog="python -m mqformer_jax.convert", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__, epilog=f"families:\n{families}\n  {'lite':20} efficientnet_lite0 and minilm, fetched",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="family", choices=[*FAMILIES, "lite"], metavar="FAMILY", help="the kind of checkpoint; guessed if left out"
    )
    parser.add_argument("--to", choices=["safetensors"], help="the way back: --input is our checkpoint folder, --output a file")
    parser.add_argument("--input", help="file or folder; not needed for families that can be fetched")
    parser.add_argument("--output", required=True, help="folder to write (with --to: file)")
    parser.add_argument("--like", help="with --to: a checkpoint in whose names and layout to write")
    parser.add_argument("--classes", help="text file, one name a line, of a closed-set checkpoint's classes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="what the file does not hold, e.g. model.box_init=no"
    )
    parser.add_argument("--strict", action="store_true", help="write nothing unless all tensors found their places")
    parser.add_argument("--names", type=int, default=5, help="names shown of each kind; 0: all (default 5)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.to:
        print(f"{args.output}: {export(_needed(args), args.output, args.like)} tensors")
    elif args.input and own_config(args.input) is not None:
        print(f"{args.output}: {restore(args.input, args.output)} tensors")
    else:
        classes = open(args.classes).read().split("\n") if args.classes else ()
        classes = [name.strip() for name in classes if name.strip()]
        settings = dict(_setting(text) for text in args.set)
        for source, report in convert(args.input, args.output, args.family, classes, settings, args.strict):
            print(f"{source}\n{report.table(args.names)}\n")
        print(f"{args.output}: written")


def _needed(args: argparse.Namespace) -> str:
    if not args.input:
        raise ValueError("--input is missing: the folder of the checkpoint to write out.")
    return args.input


def _setting(text: str) -> tuple[str, Any]:
    field, _, value = text.partition("=")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, OSError) as e:
        sys.exit(f"mqformer_jax.convert: {e}")
