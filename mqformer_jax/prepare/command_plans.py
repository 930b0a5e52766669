"""The plans for the options of each subcommand of `mqformer prepare`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mqformer_jax.prepare.datasets import pascal_context, public, visual_genome
from mqformer_jax.prepare.formats import coco, folders, tables
from mqformer_jax.prepare.plan import Plan
from mqformer_jax.prepare.sample import plans as sample

NamedPlan = tuple[str, str, Plan]


def split_plans(args: argparse.Namespace, plan: Plan) -> Iterator[NamedPlan]:
    """Yield (name, split, plan) for the split that --split names.

    With --val_fraction, move this fraction of its images to a second split, "val", and yield both. Raises ValueError if
    --split is already "val".
    """
    if not args.val_fraction:
        yield args.name, args.split, plan
        return
    if args.split == "val":
        raise ValueError(
            "--val_fraction moves images from --split to the split 'val'; give another --split, e.g. train"
        )
    val = plan.held_out(args.val_fraction)
    yield args.name, args.split, plan.only(lambda job: job.key not in val)
    yield args.name, "val", plan.only(lambda job: job.key in val)


def excluded(args: argparse.Namespace) -> set[int]:
    """Return the ids of the images that the files of --exclude list."""
    return set().union(*map(coco.image_ids, args.exclude))


def referring_plan(args: argparse.Namespace) -> Plan:
    return coco.referring(args.json, args.images, args.instances, args.refs_split).without(excluded(args))


def visual_genome_plan(args: argparse.Namespace) -> Plan:
    plan = visual_genome.visual_genome(
        args.images, args.image_data, args.objects, args.regions, args.alias, args.min_images
    )
    return plan.without(excluded(args))


def semantic_plan(args: argparse.Namespace) -> Plan:
    own = (args.classes, args.ignore_index, args.index_offset)
    return folders.semantic(args.images, args.masks, *own, names=args.list, suffix=args.mask_suffix)


def pascal_context_plan(args: argparse.Namespace) -> Plan:
    return pascal_context.semantic(args.images, args.labels, args.names, args.classes, args.list)


def foreground_plan(args: argparse.Namespace) -> Plan:
    if args.masks:
        if args.exclude or args.instances:
            raise ValueError(
                "--exclude and --instances require --json; leave them out, or give --json instead of --masks"
            )
        return folders.foreground(args.images, args.masks, args.list, args.mask_suffix)
    if args.list or args.mask_suffix:
        raise ValueError("--list and --mask_suffix require --masks; leave them out, or give --masks instead of --json")
    return coco.foreground(args.json, args.images, args.instances).without(excluded(args))


def sample_plans(args: argparse.Namespace) -> Iterator[NamedPlan]:
    return sample.plans(args.output, args.seed, args.train, args.val, args.size)


def public_plans(args: argparse.Namespace) -> Iterator[NamedPlan]:
    if args.list:
        print(public.table(args.root))
        return iter(())
    return public.plans(args.names, args.root, args.split)


def mattes_plan(args: argparse.Namespace) -> Plan:
    return folders.mattes(args.images, args.alphas, args.trimaps, args.list, args.mask_suffix)


def table_plan(args: argparse.Namespace) -> Plan:
    return tables.table(args.table, args.images, args.masks, args.classes, args.stuff, args.exhaustive)
