"""Measure how often the model segments the object that an expression describes, and not a similar object.

    python benchmarks/distractors.py --checkpoint=runs/demo

The script uses the held-out scenes of the built-in sample, and expressions that name more than a shape. A distractor is
another object of the scene with the same color (or the same shape). An expression counts as correct if the predicted
mask has a larger IoU with the right object than with any distractor. With one distractor, a random guess is right half
of the time.
"""

from __future__ import annotations

import numpy as np
from absl import app, flags
from tqdm import tqdm

from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare.sample import scenes

_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/demo", "Workdir of a training run of the recipe coco_ref:sample.")
_ROOT = flags.DEFINE_string("root", "data/records", "Folder of prepared data sets.")


def main(_: list[str]) -> None:
    predictor, source = Predictor.from_checkpoint(_CHECKPOINT.value), ShardSource(_ROOT.value, "sample_scenes", "val")
    right = {"color": [], "shape": []}
    for i in tqdm(range(len(source)), unit="scene"):
        record = Record.from_bytes(source[i])
        things = scenes.scene_graph(int(record.key), record.width).things
        segments = record.segments[: len(things)]  # things come first, in the order of the scene graph
        truth = [record.decode_mask(s.mask) for s in segments]
        asked = [
            (text, k) for k, s in enumerate(segments) for text in s.texts if scenes.expression_kind(text) != "class"
        ]
        if not asked:
            continue
        found = predictor(record.decode_image(), [text for text, _ in asked], task="referring").masks
        for (_, k), mask in zip(asked, found):
            overlap = [(mask & t).sum() / max((mask | t).sum(), 1) for t in truth]
            for trait, verdicts in right.items():
                rivals = [
                    overlap[j]
                    for j, t in enumerate(things)
                    if j != k and getattr(t, trait) == getattr(things[k], trait)
                ]
                if rivals:
                    verdicts.append(overlap[k] > max(rivals))
    for trait, verdicts in right.items():
        print(
            f"distractors of the same {trait}: {100 * np.mean(verdicts):.1f} % of {len(verdicts)} expressions correct"
        )


if __name__ == "__main__":
    app.run(main)
