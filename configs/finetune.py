"""Fine-tune on one's own data: one command from a COCO json to a table and a sheet of pictures.

    pip install -e '.[text]'
    mqformer convert --from lite --output pretrained/lite       # once: two small pre-trained encoders
    make finetune NAME=balloon IMAGES=photos JSON=train.json VAL=val.json     # runs/balloon: checkpoint, eval.json,
    pictures

which is short for `mqformer prepare instances`, once a split, and

    python -m mqformer_jax.main --config=configs/finetune.py:balloon --workdir=runs/balloon

for any data set under data/records, whatever it labels: `:NAME` takes MQ-Former-Lite with its pre-trained encoders,
`:NAME,CHECKPOINT` the model of a checkpoint (a workdir, or a converted Mask DINO). 30 epochs, 300 steps at least; what
was run: docs/results.md.
"""

import os

from ml_collections import ConfigDict
from mqformer_jax.configs import lite

from mqformer_jax.config import base
from mqformer_jax.input.record import DatasetInfo
from mqformer_jax.input.sources import not_prepared

EPOCHS, LEAST = 30, 300


def get_config(variant: str = "") -> ConfigDict:
    name, _, checkpoint = variant.partition(",")
    if not name:
        raise ValueError(
            "configs/finetune.py: name a prepared data set: --config=configs/finetune.py:NAME or :NAME,CHECKPOINT."
        )
    config = of_checkpoint(checkpoint) if checkpoint else of_lite()
    folder = os.path.join(config.data.root, name)
    if not os.path.exists(folder):
        raise ValueError(not_prepared(config.data.root, name, "train"))
    info = DatasetInfo.load(folder)
    config.data.mixture = (dict(name=name, split="train", tasks=tasks_of(info, "train")),)
    measured = info
    while (
        not {"val", "test"} & measured.splits.keys() and measured.made_from
    ):  # what teachers added to is measured on what it was
        measured = DatasetInfo.load(os.path.join(config.data.root, measured.made_from))
    held_out = [split for split in ("val", "test") if split in measured.splits][:1]
    config.eval.sets = tuple(
        dict(name=measured.name, split=split, tasks=tasks_of(measured, split)) for split in held_out
    )
    config.steps = max(LEAST, EPOCHS * info.splits["train"] // config.batch_size)
    config.log_every, config.checkpoint_every = 20, 200
    return config


def of_lite() -> ConfigDict:
    """MQ-Former-Lite on a canvas for laptops."""
    config = lite.lite()
    config.data.update(canvas=(320, 320), scale=(0.5, 1.5))
    return config


def of_checkpoint(path: str) -> ConfigDict:
    """The checkpoint's model and its sizes, with a gentle optimiser."""
    from mqformer_jax.checkpoint import load_config

    theirs, config = load_config(path), base()
    config.model, config.loss, config.denoising = theirs.model, theirs.loss, theirs.denoising
    config.data.update({name: theirs.data[name] for name in ("canvas", "templates", "max_targets", "max_prompts")})
    config.update(dict(init_from=(path,), batch_size=8))
    config.optimizer.update(learning_rate=1e-4, clip=1.0, warmup=100, schedule="cosine")
    return config


def tasks_of(info: DatasetInfo, split: str) -> tuple[str, ...]:
    """Regions alone are semantic, things alone instances, both panoptic; expressions are referring, beside these or
    alone.
    """
    things = frozenset(c.thing for c in info.classes)
    tasks = {frozenset(): (), frozenset([True]): ("instance",), frozenset([False]): ("semantic",)}.get(
        things, ("panoptic",)
    )
    return tasks + ("referring",) * (not tasks or info.expressions.get(split, 0) > 0)
