"""Convert other projects' checkpoints to this project's format, or this project's checkpoints to safetensors.

    mqformer convert --from maskdino --input model.pth --output pretrained/maskdino
    mqformer convert --input clip_folder --output pretrained/clip
    mqformer convert --from lite --output pretrained/lite
    mqformer convert --to safetensors --input runs/demo --output demo.safetensors

A family is a kind of checkpoint. Without --from, the names of the tensors determine it. `lite` downloads and converts
an image encoder and a text encoder. To start training from converted weights, list their folders in config.init_from.
A converted model with all its parameters, such as Mask DINO, can also predict without training.
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
        description=__doc__, epilog=f"families:\n{families}\n  {'lite':20} efficientnet_lite0 and minilm, downloaded",
    )  # fmt: skip
    parser.add_argument(
        "--from",
        dest="family",
        choices=[*FAMILIES, "lite"],
        metavar="FAMILY",
        help="Family of the checkpoint, e.g. maskdino. (default: determined from the tensor names)",
    )
    parser.add_argument(
        "--to",
        choices=["safetensors"],
        help="Format to export to: write the checkpoint folder --input to the file --output. (default: do not export)",
    )
    parser.add_argument(
        "--input",
        help="File or folder to read, e.g. model.pth. (default: download it, for the families efficientnet_lite0, "
        "minilm and lite)",
    )
    parser.add_argument(
        "--output",
        required=True,
        help="Folder to write, e.g. pretrained/maskdino. With --to: file to write, e.g. demo.safetensors.",
    )
    parser.add_argument(
        "--like",
        help="With --to: checkpoint whose tensor names and layout to use, e.g. model.pth. (default: this project's)",
    )
    parser.add_argument(
        "--classes",
        help="UTF-8 text file with one class name per line, for closed-set checkpoints such as Mask DINO's.",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="Set a config field that the checkpoint does not determine, e.g. model.initialize_box_type=no.",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="Write nothing if a parameter is missing, or a tensor is unused or mismatched. (default: false)",
    )
    parser.add_argument(
        "--names",
        type=int,
        default=5,
        help="Number of tensor names to list in each of the groups loaded, reshaped and ignored; 0 lists all. "
        "(default: %(default)s)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    brings = args.family or args.classes or args.set or args.strict
    if args.to and (brings or not args.input):
        raise ValueError("--to allows only --input, --output and --like, and requires --input and --output.")
    if args.like and not args.to:
        raise ValueError("--like requires --to=safetensors.")
    if args.input and brings and is_ours(args.input):
        raise ValueError(
            f"{args.input} was written by `mqformer convert --to=safetensors` and contains its config: "
            "give only --input and --output."
        )
    if args.to:
        print(f"{args.output}: {export(args.input, args.output, args.like)} tensors written")
    elif args.input and is_ours(args.input):
        print(f"{args.output}: {restore(args.input, args.output)} tensors written")
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
            + (
                f"; {len(missing)} parameters are missing, so the checkpoint can only be used in config.init_from"
                if missing
                else ""
            )
        )


def _names(path: str | None) -> list[str]:
    """Return the class names in the file `path` of --classes, or [] if `path` is None.

    Raises ValueError if the file is not UTF-8 text, has no names, or has a name twice.
    """
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as e:
        raise ValueError(f"--classes {path}: not UTF-8 text; save the file as UTF-8 with one name per line.") from e
    double = [name for name, n in collections.Counter(names).items() if n > 1]
    if double or not names:
        raise ValueError(
            f"--classes {path}: {f'{double[0]!r} occurs twice' if double else 'the file contains no names'}; "
            "write one name per line, each only once."
        )
    return names


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: the value is missing; write FIELD=VALUE.")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value


def run(argv: Sequence[str]) -> None:
    cli.run_parsed(arguments(), main, "stopped; no checkpoint was written.", argv)
