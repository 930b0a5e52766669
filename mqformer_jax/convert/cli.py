"""Bring other projects' checkpoints in, and ours out.

    mqformer convert --from maskdino --input model.pth --output pretrained/maskdino
    mqformer convert --input clip_folder --output pretrained/clip        # the family is guessed from the
    names mqformer convert --from lite --output pretrained/lite                # fetches both parts, then
    converts them mqformer convert --to safetensors --input runs/demo --output demo.safetensors

What it writes, training starts from (config.init_from) and, where it is a whole model, `Predictor.from_checkpoint`
loads.
"""

from __future__ import annotations

import argparse
import ast
import collections
from collections.abc import Sequence
from typing import Any

from mqformer_jax import cli
from mqformer_jax.convert.convert import convert
from mqformer_jax.convert.export import export, is_ours, restore
from mqformer_jax.convert.families import FAMILIES
from mqformer_jax.convert.report import Report


def arguments() -> argparse.ArgumentParser:
    families = "\n".join(f"  {family.name:20} {family.originals}" for family in FAMILIES.values())
    parser = argparse.ArgumentParser(
        prog="mqformer convert", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__, epilog=f"families:\n{families}\n  {'lite':20} efficientnet_lite0 and minilm, fetched",
    )  # fmt: skip
    parser.add_argument(
        "--from",
        dest="family",
        choices=[*FAMILIES, "lite"],
        metavar="FAMILY",
        help="the kind of checkpoint; guessed if left out",
    )
    parser.add_argument(
        "--to", choices=["safetensors"], help="the way back: --input is our checkpoint folder, --output a file"
    )
    parser.add_argument("--input", help="file or folder; not needed for families that can be fetched")
    parser.add_argument("--output", required=True, help="folder to write (with --to: file)")
    parser.add_argument("--like", help="with --to: a checkpoint in whose names and layout to write")
    parser.add_argument("--classes", help="text file (UTF-8), one name a line, of a closed-set checkpoint's classes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="what the file does not hold, e.g. model.box_init=no",
    )
    parser.add_argument("--strict", action="store_true", help="write nothing unless all tensors found their places")
    parser.add_argument("--names", type=int, default=5, help="names shown of what went well; 0: all (default 5)")
    return parser


def main(args: argparse.Namespace) -> None:
    brings = args.family or args.classes or args.set or args.strict
    if args.to and (brings or not args.input):
        raise ValueError("--to takes --input, --output and --like.")
    if args.like and not args.to:
        raise ValueError("--like goes with --to.")
    if args.input and brings and is_ours(args.input):
        raise ValueError(f"{args.input} is a file of ours, which says all of itself: give --input and --output alone.")
    if args.to:
        print(f"{args.output}: {export(args.input, args.output, args.like)} tensors")
    elif args.input and is_ours(args.input):
        print(f"{args.output}: {restore(args.input, args.output)} tensors")
    else:
        missing: list[str] = []

        def tell(what: str, report: Report) -> None:
            print(f"{what}\n{report.table(args.names)}\n", flush=True)
            missing.extend(report.missing)

        convert(
            args.input, args.output, args.family, _names(args.classes), dict(map(_setting, args.set)), args.strict, tell
        )
        print(
            f"{args.output}: written"
            + (f"; {len(missing)} parameters are missing: for config.init_from only" if missing else "")
        )


def _names(path: str | None) -> list[str]:
    """The lines of --classes."""
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as e:
        raise ValueError(f"--classes {path}: it is not UTF-8 text; save it as such, one name a line.") from e
    double = [name for name, n in collections.Counter(names).items() if n > 1]
    if double or not names:
        raise ValueError(
            f"--classes {path}: {f'{double[0]!r} stands there twice' if double else 'no names in it'}; "
            "give each class a name of its own."
        )
    return names


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: write FIELD=VALUE.")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value


def run(argv: Sequence[str]) -> None:
    cli.run_parsed(arguments(), main, "stopped; nothing was written.", argv)
