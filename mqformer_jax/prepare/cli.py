"""Turns annotated images into ArrayRecord shards: `mqformer prepare sample --out data/records` (see
data/README.md).

Every subcommand prepares one split of one data set (`public`, `small` and `sample` several) into `<out>/<name>/`. What
cannot be used is dropped, counted and named in the table at the end; an interrupted preparation goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
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
from mqformer_jax.prepare.plan import Built, Plan, Problems
from mqformer_jax.prepare.sample import scenes
from mqformer_jax.prepare.shards import worker_pool, write_split

NamedPlan = tuple[str, str, Plan]
Kinds = argparse._SubParsersAction


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each kind of annotation."""
    top = argparse.ArgumentParser(
        prog="mqformer prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = top.add_subparsers(dest="kind", required=True)
    _add_whole_sets(kinds)
    _add_formats(kinds)
    _add_layouts(kinds)
    return top


def _kind(
    kinds: Kinds, name: str, text: str, plan: Callable[[argparse.Namespace], Iterator[NamedPlan]]
) -> argparse.ArgumentParser:
    command = kinds.add_parser(name, help=text, description=text)
    command.set_defaults(plan=plan)
    command.add_argument("--out", default="data/records", help="folder of prepared data sets (default: %(default)s)")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    return command


def _one(kinds: Kinds, name: str, text: str, plan: Callable[[argparse.Namespace], Plan]) -> argparse.ArgumentParser:
    """A subcommand for one split of one set."""
    command = _kind(kinds, name, text, lambda args: iter([(args.name, args.split, plan(args))]))
    command.add_argument("--name", type=_name, required=True, help="name of the data set, as configs call it")
    command.add_argument("--split", type=_name, required=True, help="train, val, ...")
    command.add_argument("--images", required=True, help="folder of images")
    return command


def _add_whole_sets(kinds: Kinds) -> None:
    """What is known by name."""
    p = _kind(kinds, "sample", "the embedded sample, drawn by this code", sample_plans)
    p.add_argument("--train", type=int, default=4000)
    p.add_argument("--val", type=int, default=128)
    p.add_argument("--size", type=int, default=96, help="side of the pictures in pixels")
    p.add_argument("--seed", type=int, default=0)

    p = _kind(kinds, "public", "public data sets by name, from the layouts in which their websites unpack", _public)
    p.add_argument("names", nargs="*", metavar="NAME", help="such as coco_2017_panoptic refcoco 'seginw_*'")
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    p.add_argument(
        "--root",
        default=root,
        help="folder of the downloads (default: $DETECTRON2_DATASETS or datasets; now %(default)s)",
    )
    p.add_argument("--split", nargs="+", default=[], help="only these splits (default: all)")
    p.add_argument("--list", action="store_true", help="show all names, and what is expected where")

    p = _kind(
        kinds,
        "tfds",
        "a builder of tensorflow-datasets",
        lambda a: tfds_sets.plans(a.builder, a.split, a.name, a.data_dir),
    )
    p.add_argument("builder", help=", ".join(tfds_sets.SETS))
    p.add_argument("--split", type=_name, required=True, help="train, val, ...")
    p.add_argument(
        "--name",
        type=_name,
        help="name of the data set, as configs call it (default: the builder's own, as `public` calls it)",
    )
    p.add_argument("--data-dir", help="where tensorflow-datasets keeps its sets (default: ~/tensorflow_datasets)")

    p = _kind(kinds, "small", "all families of one small folder at once", lambda args: small.plans(args.source))
    p.add_argument("--source", required=True, help="folder laid out as data/README.md says")


def _add_formats(kinds: Kinds) -> None:
    """What anyone's own data may come in."""
    p = _one(
        kinds,
        "panoptic",
        "COCO panoptic: json and PNGs",
        lambda a: coco.panoptic(a.json, a.images, a.masks).without(_excluded(a)),
    )
    _coco_options(p)
    p.add_argument("--masks", required=True, help="folder of the panoptic PNGs")

    p = _one(
        kinds,
        "instances",
        "COCO or LVIS instances, or boxes alone: json",
        lambda a: coco.instances(a.json, a.images).without(_excluded(a)),
    )
    _coco_options(p)

    p = _one(kinds, "referring", "referring expressions: json", _referring)
    _coco_options(p)
    p.add_argument("--instances", nargs="+", default=[], help="COCO instances json that gives the shapes of ann_ids")
    p.add_argument("--refs-split", help="only the refs whose field 'split' is this (unc: train, val, testA, testB)")

    p = _one(kinds, "semantic", "index PNGs: one class a value", _semantic)
    p.add_argument("--masks", required=True, help="folder of index PNGs named like the images")
    p.add_argument("--classes", required=True, help="json, objectInfo150.txt, or text with one class a line")
    p.add_argument(
        "--ignore-index",
        type=int,
        nargs="+",
        help="mask values that mean unlabelled (default: the class file's, or 255)",
    )
    p.add_argument("--index-offset", type=int, help="mask value of the first class (default: the class file's, or 0)")
    _folder_options(p)

    p = _one(kinds, "foreground", "salient foregrounds: json of annotation ids, or folder of masks", _foreground)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--masks", help="folder of black and white masks named like the images")
    source.add_argument("--json", help="json with items of {image_id, ann_ids}")
    p.add_argument(
        "--instances", nargs="+", default=[], help="with --json: COCO instances json that holds the annotations"
    )
    p.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        help="with --json: json files whose images (by id) must not be in this split",
    )
    _folder_options(p)

    p = _one(kinds, "mattes", "alpha mattes: folder of images and folder of mattes", _mattes)
    p.add_argument(
        "--alphas",
        required=True,
        help="folder of 8-bit mattes, or of cut-outs with an alpha channel, named like the images",
    )
    p.add_argument("--trimaps", help="folder of trimaps named like the images (0 outside, 255 inside, else unknown)")
    _folder_options(p)

    p = _one(kinds, "table", "your own data: csv or jsonl, a row for each image and what is said of it", _table)
    p.add_argument(
        "--table", required=True, help=f".csv with a header, or .jsonl; columns: {', '.join(tables.COLUMNS)}"
    )
    p.add_argument("--masks", help="folder that the masks' paths start from (default: the table's)")
    p.add_argument(
        "--classes", help="class list, where several splits must agree on it (default: the classes of the table)"
    )
    p.add_argument("--stuff", nargs="+", default=[], help="classes that own one region, not several objects")
    p.add_argument("--exhaustive", action="store_true", help="an image shows no class but those of its rows")


def _add_layouts(kinds: Kinds) -> None:
    """What single public sets come in."""
    p = _one(kinds, "cityscapes", "Cityscapes: instanceIds PNGs", lambda a: cityscapes.panoptic(a.images, a.labels))
    p.add_argument("--labels", required=True, help="gtFine/train")

    p = _one(
        kinds,
        "ade20k",
        "ADE20K's 150 classes with instances",
        lambda a: ade20k.panoptic(a.images, a.semantic, a.instances, a.classes),
    )
    p.add_argument("--semantic", required=True, help="annotations/training")
    p.add_argument("--instances", required=True, help="annotations_instance/training")
    p.add_argument("--classes", required=True, help="objectInfo150.txt")

    p = _one(kinds, "bdd100k", "BDD100K panoptic: bit masks", lambda a: bdd100k.panoptic(a.images, a.bitmasks))
    p.add_argument("--bitmasks", required=True, help="labels/pan_seg/bitmasks/train")

    p = _one(kinds, "pascal-context", "PASCAL-Context: .mat files", _pascal_context)
    p.add_argument("--labels", required=True, help="folder trainval of .mat files")
    p.add_argument("--names", required=True, help="labels.txt, the names of the 459 labels")
    p.add_argument("--classes", help="59_labels.txt (default: all of --names)")
    p.add_argument("--list", help="VOC2010/ImageSets/Main/val.txt (default: every .mat)")

    p = _kind(
        kinds,
        "visual-genome",
        "Visual Genome: objects and region descriptions",
        lambda a: iter([(a.name, "train", _visual_genome(a))]),
    )
    p.add_argument(
        "--name",
        type=_name,
        default="visual_genome",
        help="name of the data set, as configs call it (default: %(default)s)",
    )
    p.add_argument("--images", nargs="+", required=True, help="folders VG_100K and VG_100K_2")
    p.add_argument("--image-data", required=True, help="image_data.json")
    p.add_argument("--objects", help="objects.json: boxes of classes")
    p.add_argument("--regions", help="region_descriptions.json: boxes with expressions")
    p.add_argument("--alias", help="object_alias.txt: spellings of one class")
    p.add_argument("--min-images", type=int, default=50, help="images that must show a class (default: %(default)s)")
    p.add_argument(
        "--exclude", nargs="+", default=[], help="json files whose images (by COCO id) must not be in this split"
    )


def _name(text: str) -> str:
    """Of a set or a split: a part of the names of its files."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name: letters, digits, '_', '.', '+' and '-', a letter or digit first"
        )
    return text


def _coco_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", required=True, help="annotation file")
    command.add_argument(
        "--exclude", nargs="+", default=[], help="json files whose images (by id) must not be in this split"
    )


def _folder_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--list", help="text file that names the images of this split, one a line (default: all of --images)"
    )
    command.add_argument("--mask-suffix", default="", help="what a mask's name has after its image's, say _L")


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
            raise ValueError("--exclude and --instances go with --json")
        return folders.foreground(args.images, args.masks, args.list, args.mask_suffix)
    if args.list or args.mask_suffix:
        raise ValueError("--list and --mask-suffix go with --masks")
    return coco.foreground(args.json, args.images, args.instances).without(_excluded(args))


def _public(args: argparse.Namespace) -> Iterator[NamedPlan]:
    if args.list:
        print(public.table(args.root))
        return iter(())
    return public.plans(args.names, args.root, args.split)


def _mattes(args: argparse.Namespace) -> Plan:
    return folders.mattes(args.images, args.alphas, args.trimaps, args.list, args.mask_suffix)


def _table(args: argparse.Namespace) -> Plan:
    return tables.table(args.table, args.images, args.masks, args.classes, args.stuff, args.exhaustive)


def sample_plans(args: argparse.Namespace) -> Iterator[NamedPlan]:
    """The sets of `scenes.datasets`, split by split."""
    for dataset in scenes.datasets(args.seed, args.train, args.val, args.size):
        render = functools.partial(_render, dataset.name, dataset.size)
        for split, seeds in dataset.seeds.items():
            yield dataset.name, split, Plan("sample", dataset.classes, list(seeds), render)


def _render(name: str, size: int, seed: int) -> Built:
    return Built.of(scenes.render(name, seed, size), Problems())


def main(argv: Sequence[str]) -> int:
    """Prepare what the command line asks for. Return 0, or 1 after one line on stderr that says what is wrong."""
    args, failed = parser().parse_args(argv), False
    try:
        with worker_pool(args.workers) as pool:
            for name, split, plan in args.plan(args):
                try:
                    print(write_split(args.out, name, split, plan, pool), flush=True)
                except ValueError as e:  # the other splits can do without this one
                    print(f"mqformer prepare: {e}", file=sys.stderr)
                    failed = True
    except (ValueError, OSError) as e:
        print(f"mqformer prepare: {e}", file=sys.stderr)
        return 1
    return int(failed)


def run(argv: Sequence[str]) -> None:
    cli.start("mqformer prepare", "stopped; finished shards are kept. Run the same command to resume.")
    sys.exit(main(argv))
