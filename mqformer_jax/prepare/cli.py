"""Convert annotated images to ArrayRecord shards.

    mqformer prepare sample --output data/records

Most subcommands write one split of one data set to the folder OUTPUT/NAME. `public`, `small` and `sample` can write
several data sets and splits. A report for each split counts the images and annotations that were dropped, with
examples. To resume an interrupted command, run it again. docs/data.md describes the formats.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from mqformer_jax import cli
from mqformer_jax.prepare import command_plans
from mqformer_jax.prepare.command_plans import NamedPlan
from mqformer_jax.prepare.datasets import ade20k, bdd100k, cityscapes, small, tfds_sets
from mqformer_jax.prepare.formats import coco, tables
from mqformer_jax.prepare.plan import Plan
from mqformer_jax.prepare.shards import worker_pool, write_split

Kinds = argparse._SubParsersAction


def parser() -> argparse.ArgumentParser:
    """Return the parser, with a subcommand for each annotation format and each collection of data sets."""
    top = argparse.ArgumentParser(
        prog="mqformer prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = top.add_subparsers(dest="kind", required=True)
    _add_whole_sets(kinds)
    _add_coco_formats(kinds)
    _add_mask_formats(kinds)
    _add_table(kinds)
    _add_layouts(kinds)
    return top


def _kind(
    kinds: Kinds, name: str, text: str, plan: Callable[[argparse.Namespace], Iterator[NamedPlan]]
) -> argparse.ArgumentParser:
    command = kinds.add_parser(name, help=text, description=text)
    command.set_defaults(plan=plan)
    command.add_argument(
        "--output", default="data/records", help="Folder to write the data sets to. (default: %(default)s)"
    )
    command.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="Number of worker processes. (default: one per CPU core, here %(default)s)",
    )
    return command


def _one(kinds: Kinds, name: str, text: str, plan: Callable[[argparse.Namespace], Plan]) -> argparse.ArgumentParser:
    """Add a subcommand that prepares one split of one data set. Return its parser.

    plan: function that makes the split's plan from the parsed arguments.
    """
    command = _kind(kinds, name, text, lambda args: command_plans.split_plans(args, plan(args)))
    command.add_argument(
        "--name", type=_name, required=True, help="Name of the data set, for use in recipes, e.g. balloon."
    )
    command.add_argument("--split", type=_name, required=True, help="Name of the split to write, e.g. train.")
    command.add_argument("--images", required=True, help="Folder of the images, e.g. photos.")
    command.add_argument(
        "--val_fraction",
        type=_fraction,
        default=0.0,
        help="Hold out this fraction of the images for a second split, 'val', e.g. 0.1. A hash of the image names "
        "determines the choice. (default: 0)",
    )
    return command


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give at least 0 and less than 1, e.g. 0.2")
    return value


def _add_whole_sets(kinds: Kinds) -> None:
    """Add the subcommands for collections of data sets whose files and classes are known."""
    p = _kind(
        kinds,
        "sample",
        "the built-in synthetic sample: three data sets of drawn scenes, without a download",
        command_plans.sample_plans,
    )
    p.add_argument(
        "--train",
        type=int,
        default=4000,
        help="Number of training images of sample_scenes; sample_boxes has a quarter as many, sample_mattes an eighth. "
        "(default: %(default)s)",
    )
    p.add_argument(
        "--val",
        type=int,
        default=128,
        help="Number of validation images of sample_scenes; sample_mattes has a quarter as many. "
        "(default: %(default)s)",
    )
    p.add_argument(
        "--size", type=int, default=96, help="Height and width of the images in pixels. (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, help="Random seed. (default: %(default)s)")

    p = _kind(
        kinds,
        "public",
        "public data sets, chosen by name, from the files that their websites offer for download",
        command_plans.public_plans,
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="Names or patterns, e.g. refcoco 'seginw_*'; see --list.")
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    p.add_argument(
        "--root",
        default=root,
        help="Folder of the unpacked downloads. (default: $DETECTRON2_DATASETS or, if it is not set, datasets; here "
        "%(default)s)",
    )
    p.add_argument("--split", nargs="+", default=[], help="Splits to prepare, e.g. val. (default: all)")
    p.add_argument("--list", action="store_true", help="List all data sets and the files that they need, then exit.")

    p = _kind(
        kinds,
        "tfds",
        "a data set of TensorFlow Datasets",
        lambda a: tfds_sets.plans(a.builder, a.split, a.name, a.data_dir),
    )
    p.add_argument("builder", help=f"Name of the TFDS builder: {', '.join(tfds_sets.SETS)}.")
    p.add_argument("--split", type=_name, required=True, help="Name of the split to prepare, e.g. train.")
    p.add_argument(
        "--name",
        type=_name,
        help="Name of the data set, for use in recipes. (default: set by the builder, e.g. lvis_v1 for lvis)",
    )
    p.add_argument("--data_dir", help="Folder where TFDS stores its data sets. (default: ~/tensorflow_datasets)")

    p = _kind(
        kinds,
        "small",
        "small extracts of public data sets in one folder, for tests",
        lambda args: small.plans(args.source),
    )
    p.add_argument("--source", required=True, help="Folder of the extracts; data/README.md describes its layout.")


def _add_coco_formats(kinds: Kinds) -> None:
    """Add the subcommands for COCO's formats."""
    p = _one(
        kinds,
        "panoptic",
        "COCO panoptic: JSON file and PNG files",
        lambda a: coco.panoptic(a.json, a.images, a.masks).without(command_plans.excluded(a)),
    )
    _coco_options(p)
    p.add_argument("--masks", required=True, help="Folder of panoptic PNG files, e.g. panoptic_val2017.")

    p = _one(
        kinds,
        "instances",
        "COCO or LVIS instances, with masks or only boxes: JSON file",
        lambda a: coco.instances(a.json, a.images).without(command_plans.excluded(a)),
    )
    _coco_options(p)

    p = _one(
        kinds, "referring", "referring expressions: JSON file, or RefCOCO's refs(*).p", command_plans.referring_plan
    )
    _coco_options(p)
    p.add_argument(
        "--instances",
        nargs="+",
        default=[],
        help="COCO instances JSON files with the annotations to which 'ann_id' refers, e.g. instances.json.",
    )
    p.add_argument("--refs_split", help="Keep only refs with this value of 'split', e.g. testA. (default: all)")


def _add_mask_formats(kinds: Kinds) -> None:
    """Add the subcommands for formats with a mask file for each image."""
    p = _one(
        kinds,
        "semantic",
        "masks whose pixel values are class indices, or whose colors stand for classes",
        command_plans.semantic_plan,
    )
    p.add_argument(
        "--masks",
        required=True,
        help="Folder of PNG masks named like the images, e.g. labels. Their pixel values are class indices, or their "
        "colors are those in --classes.",
    )
    p.add_argument(
        "--classes",
        required=True,
        help="Class list: JSON, ADE20K's objectInfo150.txt, CamVid's label_colors.txt, or text (one class per line).",
    )
    p.add_argument(
        "--ignore_index",
        type=int,
        nargs="+",
        help="Mask values of unlabeled pixels, e.g. 0. (default: those in the class list or, if it has none, 255)",
    )
    p.add_argument(
        "--index_offset",
        type=int,
        help="Mask value of the first class, e.g. 1. (default: the one in the class list or, if it has none, 0)",
    )
    _folder_options(p)

    p = _one(
        kinds,
        "foreground",
        "salient foregrounds: a folder of masks, or a JSON file of annotation ids",
        command_plans.foreground_plan,
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--masks", help="Folder of black and white masks named like the images, e.g. masks.")
    source.add_argument("--json", help="JSON file whose field 'items' lists {image_id, ann_ids}, e.g. salient.json.")
    p.add_argument(
        "--instances",
        nargs="+",
        default=[],
        help="With --json: COCO instances JSON files that contain these annotations, e.g. instances.json.",
    )
    p.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        help="With --json: COCO JSON files, e.g. val.json; images whose ids they list are left out.",
    )
    _folder_options(p)

    p = _one(kinds, "mattes", "alpha mattes: a folder of images and a folder of mattes", command_plans.mattes_plan)
    p.add_argument(
        "--alphas",
        required=True,
        help="Folder of mattes named like the images, e.g. alpha: gray images, or cutouts with an alpha channel.",
    )
    p.add_argument(
        "--trimaps",
        help="Folder of trimaps named like the images, e.g. trimaps. Pixels of 0 are outside the foreground, pixels of "
        "255 inside; all others are unknown. (default: none)",
    )
    _folder_options(p)


def _add_table(kinds: Kinds) -> None:
    """Add the subcommand for tables."""
    p = _one(kinds, "table", "your own data: a CSV or JSONL table", command_plans.table_plan)
    p.add_argument(
        "--table", required=True, help=f"CSV file with a header, or JSONL file. Columns: {', '.join(tables.COLUMNS)}."
    )
    p.add_argument(
        "--masks",
        help="Folder to which the mask paths in the table are relative. (default: the folder of the table)",
    )
    p.add_argument(
        "--classes",
        help="Class list, e.g. classes.txt; all splits need the same one. (default: the classes found in the table)",
    )
    p.add_argument(
        "--stuff",
        nargs="+",
        default=[],
        help="Classes without instances, e.g. sky: in each image, the class is one region. (default: none)",
    )
    p.add_argument(
        "--exhaustive",
        action="store_true",
        help="State that the table is complete: the rows of an image name all classes that it shows. (default: false)",
    )


def _add_layouts(kinds: Kinds) -> None:
    """Add the subcommands for formats that only one public data set uses."""
    p = _one(
        kinds, "cityscapes", "Cityscapes: instanceIds PNG files", lambda a: cityscapes.panoptic(a.images, a.labels)
    )
    p.add_argument("--labels", required=True, help="Folder of the label maps, e.g. gtFine/train.")

    p = _one(
        kinds,
        "ade20k",
        "ADE20K's 150 classes with instances",
        lambda a: ade20k.panoptic(a.images, a.semantic, a.instances, a.classes),
    )
    p.add_argument("--semantic", required=True, help="Folder of the class maps, e.g. annotations/training.")
    p.add_argument(
        "--instances", required=True, help="Folder of the instance maps, e.g. annotations_instance/training."
    )
    p.add_argument("--classes", required=True, help="ADE20K's file objectInfo150.txt.")

    p = _one(kinds, "bdd100k", "BDD100K panoptic: bitmask PNG files", lambda a: bdd100k.panoptic(a.images, a.bitmasks))
    p.add_argument("--bitmasks", required=True, help="Folder of the bitmasks, e.g. labels/pan_seg/bitmasks/train.")

    p = _one(kinds, "pascal_context", "PASCAL-Context: .mat files", command_plans.pascal_context_plan)
    p.add_argument("--labels", required=True, help="Folder of the .mat files, e.g. trainval.")
    p.add_argument("--names", required=True, help="File labels.txt, with the names of the 459 labels.")
    p.add_argument("--classes", help="File 59_labels.txt, to use only its 59 classes. (default: all labels of --names)")
    p.add_argument(
        "--list", help="File that lists the images of the split, e.g. VOC2010/ImageSets/Main/val.txt. (default: all)"
    )

    p = _kind(
        kinds,
        "visual_genome",
        "Visual Genome: objects and region descriptions",
        lambda a: iter([(a.name, "train", command_plans.visual_genome_plan(a))]),
    )
    p.add_argument(
        "--name",
        type=_name,
        default="visual_genome",
        help="Name of the data set, for use in recipes. (default: %(default)s)",
    )
    p.add_argument("--images", nargs="+", required=True, help="Folders VG_100K and VG_100K_2.")
    p.add_argument("--image_data", required=True, help="File image_data.json.")
    p.add_argument("--objects", help="File objects.json, with a box and a class for each object.")
    p.add_argument("--regions", help="File region_descriptions.json, with a box and a phrase for each region.")
    p.add_argument("--alias", help="File object_alias.txt, with spellings of the same class on each line.")
    p.add_argument(
        "--min_images", type=int, default=50, help="Drop classes that occur in fewer images. (default: %(default)s)"
    )
    p.add_argument(
        "--exclude", nargs="+", default=[], help="COCO JSON files, e.g. val.json; images that they list are left out."
    )


def _name(text: str) -> str:
    """Return `text` if it is a valid name of a data set or split. Raises ArgumentTypeError if it is not."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid name: use letters, digits, '_', '.', '+' and '-', starting with a letter or digit"
        )
    return text


def _coco_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", required=True, help="Annotation file, e.g. instances.json.")
    command.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        help="COCO JSON files, e.g. val.json; images whose ids they list are left out.",
    )


def _folder_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--list", help="Text file with the images to use, one name per line, e.g. val.txt. (default: all of --images)"
    )
    command.add_argument(
        "--mask_suffix",
        default="",
        help="Text that mask names add to image names, e.g. _L if the mask of 1.jpg is 1_L.png. (default: none)",
    )


def main(argv: Sequence[str]) -> int:
    """Run the command. Return the exit status: 0, or 1 if an error was printed to stderr."""
    # expand "--root=~/data" here, because shells expand only "--root ~/data"
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
