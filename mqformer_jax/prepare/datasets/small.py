"""Plans for the data sets that `mqformer prepare small` makes: small extracts of public data sets, in one folder.

No image of a val split is in a train split.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from mqformer_jax.prepare.formats import coco, folders
from mqformer_jax.prepare.plan import Job, Plan

# An image with expressions is in val if its id is a multiple of this and no other data set uses it for training.
REFERRING_VAL = 4


def plans(source: str) -> Iterator[tuple[str, str, Plan]]:
    """Yield (name, split, plan) of every data set in the folder `source`, whose layout data/README.md describes.

    The COCO data sets share images, but no train split contains an image of a val split. The val split of `refcoco`
    has the images that are also in the val split of `coco_2017_panoptic` or `coco_2017`, and the images whose id is a
    multiple of REFERRING_VAL and that no other data set uses for training.
    """

    def at(*parts: str) -> str:
        return os.path.join(source, *parts)

    images = at("coco", "images")
    panoptic = {
        split: coco.panoptic(at("coco", "panoptic", f"{split}.json"), images, at("coco", "panoptic", split))
        for split in _SPLITS
    }
    boxes = {split: at("coco", f"instances_{split}.json") for split in _SPLITS}
    instances = {split: coco.instances(path, images) for split, path in boxes.items()}
    lvis = coco.instances(at("coco", "lvis.json"), images)
    foreground = coco.foreground(at("coco", "foreground.json"), images, list(boxes.values()))
    referring = coco.referring(at("coco", "referring.json"), images)

    held_out = _ids(panoptic["val"], instances["val"])
    trained = _ids(panoptic["train"], instances["train"], lvis, foreground)
    held_out |= {i for i in _ids(referring) - trained if i % REFERRING_VAL == 0}

    yield "coco_2017_panoptic", "train", panoptic["train"].without(held_out)
    yield "coco_2017_panoptic", "val", panoptic["val"]
    yield "coco_2017", "train", instances["train"].without(held_out)
    yield "coco_2017", "val", instances["val"]
    yield "lvis_v0.5", "train", lvis.without(held_out)
    yield "foreground", "train", foreground.without(held_out)
    yield "refcoco", "train", referring.only(lambda job: job.id not in held_out)
    yield "refcoco", "val", referring.only(lambda job: job.id in held_out)
    for split in _SPLITS:
        yield (
            "camvid",
            split,
            folders.semantic(at("camvid", split), at("camvid", f"{split}annot"), at("camvid", "classes.json")),
        )
    ade = (at("ade20k", "images"), at("ade20k", "annotations"), at("ade20k", "objectInfo150.txt"))
    yield "ade20k_sem_seg", "train", folders.semantic(*ade)
    yield from _split("balloon", coco.instances(at("balloon", "instances.json"), at("balloon", "images")), every=5)
    yield from _split(
        "mattes", folders.mattes(at("matting", "images"), at("matting", "alpha"), at("matting", "trimap")), every=6
    )
    for name in ("raccoon", "kangaroo"):
        yield name, "train", coco.instances(at("boxonly", f"{name}.json"), at("boxonly", name))


_SPLITS = ("train", "val")


def _ids(*plans: Plan) -> set[int]:
    return {job.id for plan in plans for job in plan.jobs}


def _split(name: str, plan: Plan, every: int) -> Iterator[tuple[str, str, Plan]]:
    """Yield (name, split, plan) of train and val. Every `every`-th image, in the order of names, is in val."""
    val = {job.key for job in sorted(plan.jobs, key=_key)[every - 1 :: every]}
    yield name, "train", plan.only(lambda job: job.key not in val)
    yield name, "val", plan.only(lambda job: job.key in val)


def _key(job: Job) -> str:
    return job.key
