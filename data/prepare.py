"""Turns annotated images into ArrayRecord shards: `python data/prepare.py sample --out data/records` (see data/README.md).

Every subcommand prepares one split of one data set (`small` and `sample` several) into `<out>/<name>/`. What cannot be
used is dropped, counted and named in the table at the end; an interrupted preparation leaves nothing behind.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator

import coco
import folders
import sample
import small
from shards import Built, Plan, Problems, count_segments, worker_map, write_split

NamedPlan = tuple[str, str, Plan]


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each kind of annotation."""
    top = argparse.ArgumentParser(prog="prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = top.add_subparsers(dest="kind", required=True)

    def kind(name: str, text: str, plan: Callable[[argparse.Namespace], Iterator[NamedPlan]]) -> argparse.ArgumentParser:
        command = kinds.add_parser(name, help=text, description=text)
        command.set_defaults(plan=plan)
        command.add_argument("--out", default="data/records", help="folder of prepared data sets (default: %(default)s)")
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
        return command

    def one(name: str, text: str, plan: Callable[[argparse.Namespace], Plan]) -> argparse.ArgumentParser:
        command = kind(name, text, lambda args: iter([(args.name, args.split, plan(args))]))
        command.add_argument("--name", required=True, help="name of the data set, as configs call it")
        command.add_argument("--split", required=True, help="train, val, ...")
        command.add_argument("--images", required=True, help="folder of images")
        return command

    p = kind("sample", "the embedded sample, drawn by this code", sample_plans)
    p.add_argument("--train", type=int, default=4000)
    p.add_argument("--val", type=int, default=128)
    p.add_argument("--size", type=int, default=96, help="side of the pictures in pixels")
    p.add_argument("--seed", type=int, default=0)

    p = one("panoptic", "COCO panoptic: json and PNGs", lambda a: coco.panoptic(a.json, a.images, a.masks).without(_excluded(a)))
    _coco_options(p)
    p.add_argument("--masks", required=True, help="folder of the panoptic PNGs")

    p = one("instances", "COCO or LVIS instances, or boxes alone: json", lambda a: coco.instances(a.json, a.images).without(_excluded(a)))
    _coco_options(p)

    p = one("referring", "referring expressions: json", _referring)
    _coco_options(p)
    p.add_argument("--instances", nargs="+", default=[], help="COCO instances json that gives the shapes of ann_ids")
    p.add_argument("--refs-split", help="only the refs whose field 'split' is this")

    p = one("semantic", "index PNGs: one class a value", _semantic)
    p.add_argument("--masks", required=True, help="folder of index PNGs named like the images")
    p.add_argument("--classes", required=True, help="json, objectInfo150.txt, or text with one class a line")
    p.add_argument("--ignore-index", type=int, nargs="+", help="mask values that mean unlabelled (default: the class file's, or 255)")
    p.add_argument("--index-offset", type=int, help="mask value of the first class (default: the class file's, or 0)")

    p = one("foreground", "salient foregrounds: json of annotation ids, or folder of masks", _foreground)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--masks", help="folder of black and white masks named like the images")
    source.add_argument("--json", help="json with items of {image_id, ann_ids}")
    p.add_argument("--instances", nargs="+", default=[], help="with --json: COCO instances json that holds the annotations")
    p.add_argument("--exclude", nargs="+", default=[], help="with --json: json files whose images (by id) must not be in this split")

    p = one("mattes", "alpha mattes: folder of images and folder of mattes", lambda a: folders.mattes(a.images, a.alphas))
    p.add_argument("--alphas", required=True, help="folder of 8-bit mattes named like the images")

    p = kind("small", "all families of one small folder at once", lambda args: small.plans(args.source))
    p.add_argument("--source", required=True, help="folder laid out as data/README.md says")
    return top


def _coco_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", required=True, help="annotation file")
    command.add_argument("--exclude", nargs="+", default=[], help="json files whose images (by id) must not be in this split")


def _excluded(args: argparse.Namespace) -> set[int]:
    return set().union(*map(coco.image_ids, args.exclude))


def _referring(args: argparse.Namespace) -> Plan:
    return coco.referring(args.json, args.images, args.instances, args.refs_split).without(_excluded(args))


def _semantic(args: argparse.Namespace) -> Plan:
    return folders.semantic(args.images, args.masks, args.classes, args.ignore_index, args.index_offset)


def _foreground(args: argparse.Namespace) -> Plan:
    if args.masks:
        return folders.foreground(args.images, args.masks)
    return coco.foreground(args.json, args.images, args.instances).without(_excluded(args))


def sample_plans(args: argparse.Namespace) -> Iterator[NamedPlan]:
    """The sets of `sample.datasets`, split by split."""
    for dataset in sample.datasets(args.seed, args.train, args.val, args.size):
        render = functools.partial(_render, dataset.name, dataset.size)
        for split, seeds in dataset.seeds.items():
            yield dataset.name, split, Plan("sample", dataset.classes, list(seeds), render)


def _render(name: str, size: int, seed: int) -> Built:
    record = sample.render(name, seed, size)
    return Built(record.to_bytes(), count_segments(record), Problems())


def main(argv: list[str] | None = None) -> int:
    """Prepares what the command line asks for; 0, or 1 after one line on stderr that says what is wrong."""
    args = parser().parse_args(argv)
    try:
        plans = list(args.plan(args))
        with worker_map(args.workers) as ordered_map:
            reports = [write_split(args.out, name, split, plan, ordered_map) for name, split, plan in plans]
    except (ValueError, OSError) as e:
        print(f"prepare: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare: interrupted; the split in the making is not there, those before it are", file=sys.stderr)
        return 130
    print("\n".join(map(str, reports)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
