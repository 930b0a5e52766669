"""Fine-tune on your own data set: any set under data/records, whatever its annotations.

`NAME` starts from the two pre-trained encoders of configs/lite.py.

    pip install -e '.[text]'
    mqformer convert --from lite --output pretrained/lite
    mqformer prepare instances --name balloon --split train --images photos --json train.json
    mqformer prepare instances --name balloon --split val --images photos --json val.json
    mqformer train --config=finetune:balloon --workdir=runs/balloon

`make finetune NAME=balloon IMAGES=photos JSON=train.json VAL=val.json LONG=1` runs all of these.

`NAME,quick` starts from the same encoders with fewer layers and queries, for a first result. `make finetune` without
LONG=1 runs it.

    mqformer train --config=finetune:balloon,quick --workdir=runs/balloon

`NAME,CHECKPOINT` starts from the model of a checkpoint: the workdir of a run, or a converted checkpoint.

    mqformer train --config=finetune:balloon,runs/coco_ref --workdir=runs/balloon

- Hardware: a laptop. Time: 30 epochs, at least 300 steps of 8 images; `quick`: 600 steps of 2.
- Expected score of `quick`: mask AP50 31 to 32 and box AP50 35 to 39 on 8 held-out images after training on 32 balloon
  images (two runs, each 22 minutes of processor time or more).
- Expected score, from the encoders on two CPU cores: mask AP 25 on 8 held-out images after 500 steps of 4 on 32 balloon
  images at 256 x 256; mIoU 58 on CamVid's val split after 600 steps of 8 at 192 x 256 (64 minutes). Both commands
  are in docs/benchmarks.md.
"""

import os

from ml_collections import ConfigDict
from mqformer_jax.configs import lite

from mqformer_jax.config import base
from mqformer_jax.input.record import DatasetInfo
from mqformer_jax.input.sources import not_prepared

EPOCHS = 30
MIN_STEPS = 300
QUICK_STEPS = 600  # of `quick`


def get_config(variant: str = "") -> ConfigDict:
    """Return the recipe for "NAME", "NAME,quick" or "NAME,CHECKPOINT"."""
    name, _, start = variant.partition(",")
    if not name:
        raise ValueError("configs/finetune.py: name a prepared data set, e.g. --config=finetune:balloon.")
    config = quick() if start == "quick" else of_checkpoint(start) if start else of_lite()
    folder = os.path.join(config.data.root, name)
    if not os.path.exists(folder):
        raise ValueError(not_prepared(config.data.root, name, "train"))
    info = DatasetInfo.load(folder)
    config.data.mixture = (dict(name=name, split="train", tasks=tasks_of(info, "train")),)
    measured = info
    # a synthetic set without held-out images is evaluated on those of the set that it was made from
    while not {"val", "test"} & measured.splits.keys() and measured.made_from:
        measured = DatasetInfo.load(os.path.join(config.data.root, measured.made_from))
    held_out = [split for split in ("val", "test") if split in measured.splits][:1]
    config.eval.sets = tuple(
        dict(name=measured.name, split=split, tasks=tasks_of(measured, split)) for split in held_out
    )
    labels = [c.name for c in info.classes[:20]] or config.data.mixture[0]["tasks"]
    config.about = f"This model was fine-tuned on {name}: {', '.join(labels)}."
    config.steps = (
        QUICK_STEPS if start == "quick" else max(MIN_STEPS, EPOCHS * info.splits["train"] // config.batch_size)
    )
    config.log_every, config.checkpoint_every = 20, 200
    return config


def of_lite() -> ConfigDict:
    """Return the recipe of MQ-Former-Lite with a canvas for laptops, 320 x 320."""
    config = lite.lite()
    config.data.update(canvas=(320, 320), scale_range=(0.5, 1.5))
    return config


def quick() -> ConfigDict:
    """Return a smaller MQ-Former-Lite for a first result within minutes on two CPU cores."""
    config = of_lite()
    config.model.update(encoder_layers=1, decoder_layers=2, num_learnable=20, num_conditional=30)
    config.data.update(canvas=(256, 256), scale_range=(0.8, 1.25))
    config.batch_size = 2
    config.optimizer.learning_rate = 6e-4
    config.eval.crop_masks = True
    return config


def of_checkpoint(path: str) -> ConfigDict:
    """Return a recipe that starts from a checkpoint, with its model, losses and canvas and with a low learning rate."""
    from mqformer_jax.checkpoint import load_config

    theirs, config = load_config(path), base()
    config.model, config.loss, config.denoising = theirs.model, theirs.loss, theirs.denoising
    copied = ("canvas", "templates", "max_targets", "max_prompts", "lattice_stride")
    config.data.update({name: theirs.data[name] for name in copied})
    config.update(dict(init_from=(path,), batch_size=8))
    config.optimizer.update(learning_rate=1e-4, clip_norm=1.0, warmup=100, schedule="cosine")
    return config


def tasks_of(info: DatasetInfo, split: str) -> tuple[str, ...]:
    """Return the tasks that the annotations of a split allow.

    If all classes are regions, the task is semantic; if none are, instance; otherwise panoptic. A split with
    expressions also has the task referring. Without classes and expressions, the task is foreground (masks or mattes).
    """
    kinds = frozenset(c.is_region for c in info.classes)
    tasks = {frozenset(): (), frozenset([False]): ("instance",), frozenset([True]): ("semantic",)}.get(
        kinds, ("panoptic",)
    )
    # older versions of `prepare` did not count expressions: assume that a set without classes has some
    if info.expressions.get(split, not info.classes):
        tasks += ("referring",)
    return tasks or ("foreground",)
