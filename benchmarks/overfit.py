"""Overfit four COCO images, to check that targets, matching, losses and post-processing fit together.

    python benchmarks/overfit.py --source=FOLDER --workdir=runs/overfit

FOLDER holds the original files that `mqformer prepare small --source=FOLDER` reads. As in COCO and RefCOCO, panoptic
segments and expressions are two data sets, here of the same four images. All 133 classes are prompts. Metrics are
measured on the training images.
"""

from __future__ import annotations

import os

from absl import app, flags, logging
from mqformer_jax.configs import coco_ref

from mqformer_jax import config as recipes
from mqformer_jax.evaluation.evaluate import table
from mqformer_jax.prepare.formats import coco
from mqformer_jax.prepare.shards import write_split
from mqformer_jax.train import train

_SOURCE = flags.DEFINE_string("source", None, "Folder that `mqformer prepare small` reads. Required.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/overfit", "Folder for records, checkpoints and pictures.")
_STEPS = flags.DEFINE_integer("steps", 800, "Training steps.")


def prepare(source: str, root: str) -> None:
    """Write a panoptic and a referring data set of the same four images to `root`.

    Images whose expressions have masks are preferred. source: see --source.
    """
    images = os.path.join(source, "coco", "images")
    panoptic = coco.panoptic(
        os.path.join(source, "coco", "panoptic", "train.json"),
        images,
        os.path.join(source, "coco", "panoptic", "train"),
    )
    referring = coco.referring(os.path.join(source, "coco", "referring.json"), images)
    asked = {job.id for job in referring.jobs if any(ref.get("segmentation") for ref in job.labels.items)}
    chosen = {job.id for job in sorted(panoptic.jobs, key=lambda job: (job.id not in asked, job.id))[:4]}
    for name, plan in (("coco_2017_panoptic", panoptic), ("refcoco", referring)):
        print(write_split(root, name, "train", plan.only(lambda job: job.id in chosen)))


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    root = os.path.join(_WORKDIR.value, "records")
    prepare(_SOURCE.value, root)
    config = coco_ref.small()
    config.steps = _STEPS.value
    config.batch_size = 4
    config.checkpoint_every = _STEPS.value
    config.data.update(root=root, canvas=(256, 256), scale_range=(1.0, 1.0), flip=0.0)
    config.data.mixture = (
        dict(name="coco_2017_panoptic", split="train", tasks=("panoptic",), weight=0.6),
        dict(name="refcoco", split="train", tasks=("referring",), weight=0.4),
    )
    config.eval.sets = (
        dict(name="coco_2017_panoptic", split="train", tasks=("panoptic", "semantic")),
        dict(name="refcoco", split="train", tasks=("referring",)),
    )
    config.eval.batch_size = 4
    recipes.check(config)
    print(table(train(config, _WORKDIR.value)))


if __name__ == "__main__":
    app.run(main)
