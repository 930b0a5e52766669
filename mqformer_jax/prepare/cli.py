"""Convert annotated images to ArrayRecord shards.

    mqformer prepare sample --output data/records

Each subcommand writes one split of one data set to OUTPUT/NAME; `public`, `small` and `sample` write several. The
report at the end counts the images and annotations that were dropped, and names examples. To resume an interrupted
command, run it again. docs/data.md describes the formats.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from mqformer_jax import cli
from mqformer_jax.prepare.datasets import (
    ade20k,
    bdd100k,
    cityscapes,
    pascal_context,
    public,
    small,
    tfds_sets,
    visual_genome,
)
from mqformer_jax.prepare.formats import coco, folders, tables
from mqformer_jax.prepare.plan import Plan
from mqformer_jax.prepare.sample import plans as sample
from mqformer_jax.prepare.shards import worker_pool, write_split

NamedPlan = tuple[str, str, Plan]
Kinds = argparse._SubParsersAction


def parser() -> argparse.ArgumentParser:
    """Return the parser, which has one subcommand for each kind of annotation."""
    top = argparse.ArgumentParser(
        prog="mqformer prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = top.add_subparsers(dest="kind", required=True)
    _add_whole_sets(kinds)
    _add_coco_formats(kinds)
    _add_mask_formats(kinds)
    _add_layouts(kinds)
    return top


def _kind(
    kinds: Kinds, name: str, text: str, plan: Callable[[argparse.Namespace], Iterator[NamedPlan]]
) -> argparse.ArgumentParser:
    command = kinds.add_parser(name, help=text, description=text)
    command.set_defaults(plan=plan)
    command.add_argument(
        "--output", default="data/records", help="Folder of prepared data sets. (default: %(default)s)"
    )
    command.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="Number of worker processes. (default: %(default)s)"
    )
    return command


def _one(kinds: Kinds, name: str, text: str, plan: Callable[[argparse.Namespace], Plan]) -> argparse.ArgumentParser:
    """Add a subcommand that prepares one split of one data set. Return its parser.

    plan: makes the split's plan from the parsed arguments.
    """
    command = _kind(kinds, name, text, lambda args: _splits(args, plan(args)))
    command.add_argument("--name", type=_name, required=True, help="Name of the data set in recipes, e.g. balloon.")
    command.add_argument("--split", type=_name, required=True, help="Name of the split, e.g. train.")
    command.add_argument("--images", required=True, help="Folder of images, e.g. photos.")
    command.add_argument(
        "--val_fraction",
        type=_fraction,
        default=0.0,
        help="Also write a split 'val' with this fraction of the images, chosen by a hash of their names, e.g. 0.1. "
        "(default: 0)",
    )
    return command


def _splits(args: argparse.Namespace, plan: Plan) -> Iterator[NamedPlan]:
    """Yield (name, split, plan) of --split and, with --val_fraction, of a split "val" that is held out from it."""
    if not args.val_fraction:
        yield args.name, args.split, plan
        return
    if args.split == "val":
        raise ValueError("--val_fraction creates the split 'val' from another split; give --split=train")
    val = plan.held_out(args.val_fraction)
    yield args.name, args.split, plan.only(lambda job: job.key not in val)
    yield args.name, "val", plan.only(lambda job: job.key in val)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 to below 1, e.g. 0.2")
    return value


def _add_whole_sets(kinds: Kinds) -> None:
    """Add the subcommands of known data sets."""
    p = _kind(kinds, "sample", "the built-in synthetic sample: three data sets of drawn scenes", _sample)
    p.add_argument("--train", type=int, default=4000, help="Number of training images. (default: %(default)s)")
    p.add_argument("--val", type=int, default=128, help="Number of validation images. (default: %(default)s)")
    p.add_argument("--size", type=int, default=96, help="Side of the images in pixels. (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="Random seed. (default: %(default)s)")

    p = _kind(kinds, "public", "public data sets by name, as downloaded and unpacked from their websites", _public)
    p.add_argument("names", nargs="*", metavar="NAME", help="Names of data sets, e.g. refcoco 'seginw_*'.")
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    p.add_argument(
        "--root",
        default=root,
        help="Folder of the downloads. (default: $DETECTRON2_DATASETS or datasets, here %(default)s)",
    )
    p.add_argument("--split", nargs="+", default=[], help="Splits to prepare, e.g. val. (default: all)")
    p.add_argument("--list", action="store_true", help="List all data sets and the files they need, then exit.")

    p = _kind(
        kinds,
        "tfds",
        "a data set of TensorFlow Datasets",
        lambda a: tfds_sets.plans(a.builder, a.split, a.name, a.data_dir),
    )
    p.add_argument("builder", help=f"Name of the builder: {', '.join(tfds_sets.SETS)}.")
    p.add_argument("--split", type=_name, required=True, help="Name of the split, e.g. train.")
    p.add_argument(
        "--name",
        type=_name,
        help="Name of the data set in recipes, e.g. lvis. (default: the name that `public` uses)",
    )
    p.add_argument("--data_dir", help="Folder of TensorFlow Datasets. (default: ~/tensorflow_datasets)")

    p = _kind(
        kinds,
        "small",
        "small extracts of public data sets in one folder, for tests",
        lambda args: small.plans(args.source),
    )
    p.add_argument("--source", required=True, help="Folder with the layout that data/README.md describes.")


def _add_coco_formats(kinds: Kinds) -> None:
    """Add the subcommands of COCO's formats."""
    p = _one(
        kinds,
        "panoptic",
        "COCO panoptic: JSON and PNG files",
        lambda a: coco.panoptic(a.json, a.images, a.masks).without(_excluded(a)),
    )
    _coco_options(p)
    p.add_argument("--masks", required=True, help="Folder of panoptic PNG files, e.g. panoptic_val2017.")

    p = _one(
        kinds,
        "instances",
        "COCO or LVIS instances, or boxes only: JSON",
        lambda a: coco.instances(a.json, a.images).without(_excluded(a)),
    )
    _coco_options(p)

    p = _one(kinds, "referring", "referring expressions: JSON", _referring)
    _coco_options(p)
    p.add_argument(
        "--instances",
        nargs="+",
        default=[],
        help="COCO instances JSON files with the masks of the refs' ann_ids, e.g. instances.json.",
    )
    p.add_argument("--refs_split", help="Keep only the refs whose field 'split' has this value, e.g. testA.")


def _add_mask_formats(kinds: Kinds) -> None:
    """Add the subcommands of formats with a mask file for each image, and of tables."""
    p = _one(kinds, "semantic", "index PNG files: one class per value", _semantic)
    p.add_argument("--masks", required=True, help="Folder of index PNG files named like the images, e.g. labels.")
    p.add_argument(
        "--classes", required=True, help="Class list: JSON, objectInfo150.txt, or text with one class per line."
    )
    p.add_argument(
        "--ignore_index",
        type=int,
        nargs="+",
        help="Mask values of unlabeled pixels, e.g. 0. (default: those of the class list, else 255)",
    )
    p.add_argument(
        "--index_offset",
        type=int,
        help="Mask value of the first class, e.g. 1. (default: that of the class list, else 0)",
    )
    _folder_options(p)

    p = _one(kinds, "foreground", "salient foregrounds: JSON of annotation ids, or a folder of masks", _foreground)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--masks", help="Folder of black and white masks named like the images, e.g. masks.")
    source.add_argument("--json", help="JSON file with a list of {image_id, ann_ids}, e.g. salient.json.")
    p.add_argument(
        "--instances",
        nargs="+",
        default=[],
        help="With --json: COCO instances JSON files with the annotations, e.g. instances.json.",
    )
    p.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        help="With --json: JSON files that list images to leave out (by id), e.g. val.json.",
    )
    _folder_options(p)

    p = _one(kinds, "mattes", "alpha mattes: a folder of images and a folder of mattes", _mattes)
    p.add_argument(
        "--alphas",
        required=True,
        help="Folder of 8-bit mattes, or cutouts with an alpha channel, named like the images, e.g. alpha.",
    )
    p.add_argument(
        "--trimaps", help="Folder of trimaps named like the images: 0 outside, 255 inside, other values unknown."
    )
    _folder_options(p)

    p = _one(kinds, "table", "your own data: a CSV or JSONL table", _table)
    p.add_argument(
        "--table", required=True, help=f"CSV file with a header, or JSONL file; columns: {', '.join(tables.COLUMNS)}."
    )
    p.add_argument("--masks", help="Folder that the paths of masks are relative to. (default: the folder of the table)")
    p.add_argument(
        "--classes", help="Class list shared by several splits, e.g. classes.txt. (default: the classes of the table)"
    )
    p.add_argument(
        "--stuff", nargs="+", default=[], help="Classes that own one region of an image, e.g. sky. (default: none)"
    )
    p.add_argument(
        "--exhaustive",
        action="store_true",
        help="State that every image shows only the classes of its rows. (default: false)",
    )


def _add_layouts(kinds: Kinds) -> None:
    """Add the subcommands of formats that only one public data set uses."""
    p = _one(
        kinds, "cityscapes", "Cityscapes: instanceIds PNG files", lambda a: cityscapes.panoptic(a.images, a.labels)
    )
    p.add_argument("--labels", required=True, help="Folder gtFine/train.")

    p = _one(
        kinds,
        "ade20k",
        "ADE20K's 150 classes with instances",
        lambda a: ade20k.panoptic(a.images, a.semantic, a.instances, a.classes),
    )
    p.add_argument("--semantic", required=True, help="Folder annotations/training.")
    p.add_argument("--instances", required=True, help="Folder annotations_instance/training.")
    p.add_argument("--classes", required=True, help="File objectInfo150.txt.")

    p = _one(kinds, "bdd100k", "BDD100K panoptic: bitmasks", lambda a: bdd100k.panoptic(a.images, a.bitmasks))
    p.add_argument("--bitmasks", required=True, help="Folder labels/pan_seg/bitmasks/train.")

    p = _one(kinds, "pascal_context", "PASCAL-Context: .mat files", _pascal_context)
    p.add_argument("--labels", required=True, help="Folder trainval of .mat files.")
    p.add_argument("--names", required=True, help="File labels.txt with the names of the 459 labels.")
    p.add_argument("--classes", help="File 59_labels.txt. (default: all labels of --names)")
    p.add_argument("--list", help="File VOC2010/ImageSets/Main/val.txt. (default: all .mat files)")

    p = _kind(
        kinds,
        "visual_genome",
        "Visual Genome: objects and region descriptions",
        lambda a: iter([(a.name, "train", _visual_genome(a))]),
    )
    p.add_argument(
        "--name",
        type=_name,
        default="visual_genome",
        help="Name of the data set in recipes. (default: %(default)s)",
    )
    p.add_argument("--images", nargs="+", required=True, help="Folders VG_100K and VG_100K_2.")
    p.add_argument("--image_data", required=True, help="File image_data.json.")
    p.add_argument("--objects", help="File objects.json with the boxes of classes.")
    p.add_argument("--regions", help="File region_descriptions.json with the boxes of expressions.")
    p.add_argument("--alias", help="File object_alias.txt with spellings of each class.")
    p.add_argument(
        "--min_images", type=int, default=50, help="Drop classes that fewer images show. (default: %(default)s)"
    )
    p.add_argument(
        "--exclude", nargs="+", default=[], help="JSON files that list images to leave out (by COCO id), e.g. val.json."
    )


def _name(text: str) -> str:
    """Return `text`, the name of a data set or split, if file names can contain it. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid name: use letters, digits, '_', '.', '+' and '-', starting with a letter or digit"
        )
    return text


def _coco_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", required=True, help="Annotation file, e.g. instances.json.")
    command.add_argument(
        "--exclude", nargs="+", default=[], help="JSON files that list images to leave out (by id), e.g. val.json."
    )


def _folder_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--list", help="Text file with one image name per line, e.g. val.txt. (default: all images of --images)"
    )
    command.add_argument(
        "--mask_suffix",
        default="",
        help="Text after the image's name in the name of its mask, e.g. _L for 1.jpg and 1_L.png. (default: none)",
    )


def _excluded(args: argparse.Namespace) -> set[int]:
    return set().union(*map(coco.image_ids, args.exclude))


def _referring(args: argparse.Namespace) -> Plan:
    return coco.referring(args.json, args.images, args.instances, args.refs_split).without(_excluded(args))


def _visual_genome(args: argparse.Namespace) -> Plan:
    plan = visual_genome.visual_genome(
        args.images, args.image_data, args.objects, args.regions, args.alias, args.min_images
    )
    return plan.without(_excluded(args))


def _semantic(args: argparse.Namespace) -> Plan:
    own = (args.classes, args.ignore_index, args.index_offset)
    return folders.semantic(args.images, args.masks, *own, names=args.list, suffix=args.mask_suffix)


def _pascal_context(args: argparse.Namespace) -> Plan:
    return pascal_context.semantic(args.images, args.labels, args.names, args.classes, args.list)


def _foreground(args: argparse.Namespace) -> Plan:
    if args.masks:
        if args.exclude or args.instances:
            raise ValueError("--exclude and --instances require --json")
        return folders.foreground(args.images, args.masks, args.list, args.mask_suffix)
    if args.list or args.mask_suffix:
        raise ValueError("--list and --mask_suffix require --masks")
    return coco.foreground(args.json, args.images, args.instances).without(_excluded(args))


def _sample(args: argparse.Namespace) -> Iterator[NamedPlan]:
    return sample.plans(args.output, args.seed, args.train, args.val, args.size)


def _public(args: argparse.Namespace) -> Iterator[NamedPlan]:
    if args.list:
        print(public.table(args.root))
        return iter(())
    return public.plans(args.names, args.root, args.split)


def _mattes(args: argparse.Namespace) -> Plan:
    return folders.mattes(args.images, args.alphas, args.trimaps, args.list, args.mask_suffix)


def _table(args: argparse.Namespace) -> Plan:
    return tables.table(args.table, args.images, args.masks, args.classes, args.stuff, args.exhaustive)


def main(argv: Sequence[str]) -> int:
    """Run the command. Return 0, or 1 after printing an error to stderr."""
    # shells expand "--root ~/data", but not "--root=~/data"
    argv = [re.sub("=~/", lambda _: f"={os.path.expanduser('~')}/", word, count=1) for word in argv]
    args, failed = parser().parse_args(argv), False
    try:
        with worker_pool(args.workers) as pool:
            for name, split, plan in args.plan(args):
                try:
                    print(write_split(args.output, name, split, plan, pool), flush=True)
                except ValueError as e:  # continue with the other splits
                    print(f"mqformer prepare: {e}", file=sys.stderr)
                    failed = True
    except (ValueError, OSError) as e:
        print(f"mqformer prepare: {e}", file=sys.stderr)
        return 1
    return int(failed)


def run(argv: Sequence[str]) -> None:
    cli.start("mqformer prepare", "stopped; finished shards are kept. Run the same command to resume.")
    sys.exit(main(argv))
