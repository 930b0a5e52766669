"""Measure the benefit of training on synthetic masks and captions, on the built-in sample.

    python benchmarks/synthetic.py --work=runs/synthetic

First, a teacher model is trained on a few scenes with masks. It predicts masks from the boxes of 4,000 other scenes,
and these masks are compared with the true ones. Then models are trained on the 4,000 scenes with the same seed and
number of steps, each with another kind of label:

- only boxes; boxes and the projection loss; synthetic masks; true masks
- no expressions; expressions of the rule captioner; true expressions

All models are evaluated on the same held-out scenes. To resume, run the same command again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from mqformer_jax.input.record import DatasetInfo, Record, Segment
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare.shard_writer import Built, Problems, write_shard
from mqformer_jax.train import train

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_WORK = flags.DEFINE_string("work", "runs/synthetic", "Folder for data sets, runs and results.")
_STEPS = flags.DEFINE_integer("steps", 1000, "Number of steps of each training run.")
_SCENES = flags.DEFINE_integer("scenes", 4000, "Number of scenes that keep only their boxes.")
_TAUGHT = flags.DEFINE_integer("taught", 500, "Number of scenes with masks that train the teacher.")
SHARDS = 8


def recipe(root: str, mixture: tuple[dict, ...], tasks: tuple[str, ...], steps: int) -> ConfigDict:
    """Return the recipe of the sample with another mixture and number of steps. tasks: the evaluated tasks."""
    spec = importlib.util.spec_from_file_location("coco_ref", os.path.join(HOME, "configs", "coco_ref.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("sample")
    config.steps, config.data.root, config.data.mixture = steps, root, mixture
    config.eval.update(sets=(dict(name="sample_scenes", split="val", tasks=tasks),), num_visualizations=0)
    return config


def prepare(root: str, *options: str) -> None:
    """Prepare the sample in `root`, unless it is prepared. options: flags of `mqformer prepare sample`."""
    if not os.path.exists(os.path.join(root, "sample_mattes", "dataset.json")):
        subprocess.run(
            [sys.executable, os.path.join(HOME, "data", "prepare.py"), "sample", "--output", root, *options], check=True
        )


def derive(root: str, name: str, change: Callable[[DatasetInfo, Record], Record]) -> None:
    """Apply `change` to all records of sample_scenes/train and write them as the data set `name`, unless it exists."""
    source, folder = ShardSource(root, "sample_scenes", "train"), os.path.join(root, name)
    if os.path.exists(os.path.join(folder, "dataset.json")):
        return
    os.makedirs(folder, exist_ok=True)
    for k in range(SHARDS):
        records = (
            Record.from_bytes(source[i]) for i in range(k * len(source) // SHARDS, (k + 1) * len(source) // SHARDS)
        )
        path = os.path.join(folder, f"train-{k:05d}-of-{SHARDS:05d}")
        write_shard((Built.of(change(source.info, record), Problems()) for record in records), path)
        os.remove(f"{path}.json")
    dataclasses.replace(source.info, name=name, splits={"train": len(source)}, class_images={}, expressions={}).save(
        folder
    )


def boxes_only(info: DatasetInfo, record: Record) -> Record:
    """Return a record with only the boxes and classes of the things."""
    things = (s for s in record.segments if s.class_id is not None and not info.classes[s.class_id].is_region)
    return dataclasses.replace(record, segments=tuple(Segment(s.class_id, box=s.box) for s in things), absent_texts=())


def silent(info: DatasetInfo, record: Record) -> Record:
    """Return a record without expressions and foregrounds."""
    segments = tuple(dataclasses.replace(s, texts=()) for s in record.segments if not s.foreground)
    return dataclasses.replace(record, segments=segments, absent_texts=())


def synthesize(*options: str) -> None:
    """Run `mqformer synthesize`."""
    subprocess.run([sys.executable, "-m", "mqformer_jax", "synthesize", *options], check=True, cwd=HOME)


def against_truth(root: str, name: str) -> dict[str, float]:
    """Compare synthetic masks with the true masks of the same things.

    Return the fraction of accepted masks, the mean IoU of accepted masks and the mean IoU of all masks, in which a
    rejected mask counts as 0. name: the data set with synthetic masks; its scenes are those of sample_scenes/train.
    """
    truth, made = ShardSource(root, "sample_scenes", "train"), ShardSource(root, name, "train")
    found, asked = [], 0
    for i in range(len(made)):
        true, record = Record.from_bytes(truth[i]), Record.from_bytes(made[i])
        things = [s for s in true.segments if s.class_id is not None and not truth.info.classes[s.class_id].is_region]
        assert record.key == true.key and [s.box for s in record.segments] == [s.box for s in things]
        asked += len(things)
        for segment, thing in zip(record.segments, things):
            if segment.mask is not None:
                a, b = true.decode_mask(segment.mask), true.decode_mask(thing.mask)
                found.append((a & b).sum() / (a | b).sum())
    return {
        "accepted": len(found) / asked,
        "iou of accepted": float(np.mean(found)),
        "iou of all": float(np.sum(found) / asked),
    }


def run(work: str, name: str, config: ConfigDict) -> dict[str, float]:
    """Return the metrics of a run. Train or resume it first if it is not finished."""
    folder = os.path.join(work, name)
    path = os.path.join(folder, "eval.json")
    if not os.path.exists(path):
        train(config, folder)
    with open(path) as f:
        return json.load(f)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    work, steps = os.path.abspath(_WORK.value), _STEPS.value
    root, taught = os.path.join(work, "records"), os.path.join(work, "taught")
    prepare(root, f"--train={_SCENES.value}")
    prepare(taught, "--seed=1", f"--train={_TAUGHT.value}")
    derive(root, "boxes", boxes_only)
    derive(root, "silent", silent)

    teacher = recipe(taught, (dict(name="sample_scenes", split="train", tasks=("panoptic",)),), ("instance",), steps)
    teacher.denoising.num_queries = 24
    results = {"teacher": run(work, "teacher", teacher)}
    synthesize("masks", "--data=boxes", f"--root={root}", f"--teacher=ours:{os.path.join(work, 'teacher')}")
    results["masks against truth"] = against_truth(root, "boxes_syn_m")
    synthesize("captions", "--data=silent", f"--root={root}", "--teacher=rules")

    def arm(name: str, data: str, tasks: tuple[str, ...], measured: str, **loss: float) -> None:
        config = recipe(root, (dict(name=data, split="train", tasks=tasks),), (measured,), steps)
        config.loss.update(loss)
        results[name] = run(work, name.replace(" ", "_"), config)

    arm("boxes alone", "boxes", ("instance",), "instance")
    arm("boxes and projection", "boxes", ("instance",), "instance", projection=5.0)
    arm("synthetic masks", "boxes_syn_m", ("instance",), "instance")
    arm("true masks", "sample_scenes", ("instance",), "instance")
    arm("no expressions", "silent", ("panoptic",), "referring")
    arm("synthetic expressions", "silent_syn", ("panoptic", "referring"), "referring")
    arm("true expressions", "sample_scenes", ("panoptic", "referring"), "referring")
    with open(os.path.join(work, "results.json"), "w") as f:
        json.dump(results, f, indent=1)
    for name, found in results.items():
        print(f"{name}: {json.dumps(found)}")


if __name__ == "__main__":
    app.run(main)
