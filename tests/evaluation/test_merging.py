"""What several processes saw, pickled, sent and merged, is what one process would have seen: to the last digit."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import test_instance_metric as instance
import test_panoptic_metric as panoptic

from mqformer_jax.evaluation.alpha import AlphaEvaluator
from mqformer_jax.evaluation.foreground import ForegroundEvaluator
from mqformer_jax.evaluation.instance import InstanceEvaluator
from mqformer_jax.evaluation.panoptic import PanopticEvaluator
from mqformer_jax.evaluation.referring import ReferringEvaluator
from mqformer_jax.evaluation.semantic import SemanticEvaluator, ground_truth_map
from mqformer_jax.input.record import Record, Segment, encode_rle


def panoptic_updates(rng):
    for i in range(9):
        cells, labels = panoptic.scene(rng, 6)
        masks = [cells == k for k in range(len(labels))]
        segments = [Segment(int(label), mask=encode_rle(mask)) for label, mask in zip(labels, masks) if mask.any()]
        moved = panoptic.predicted(*panoptic.disturbed(rng, cells, labels), np.zeros_like(cells, bool))
        yield Record(str(i), b"", panoptic.SIZE, panoptic.SIZE, tuple(segments)), moved


def semantic_updates(rng):
    for record, _ in panoptic_updates(rng):
        yield record, np.where(rng.random((panoptic.SIZE,) * 2) < 0.3, 1, ground_truth_map(record, panoptic.INFO) % 4)


def foreground_updates(rng):
    for i in range(9):
        yield rng.random((12, 12)), rng.random((12, 12)) > 0.5, str(i)


def matting_updates(rng):
    for i in range(9):
        yield (
            rng.random((12, 12)),
            rng.random((12, 12)),
            None if i % 2 else rng.integers(0, 3, (12, 12)).astype(np.uint8) * 127,
            str(i),
        )


def referring_updates(rng):
    for i, kind in enumerate(("color", None, "place") * 3):
        yield rng.random((12, 12)) > 0.6, None if rng.random() < 0.3 else rng.random((12, 12)) > 0.5, kind, str(i // 2)


CASES = {
    "instance": (lambda: InstanceEvaluator(instance.INFO), lambda rng: zip(*instance.random_set(9))),
    "panoptic": (lambda: PanopticEvaluator(panoptic.INFO, learnable=1), panoptic_updates),
    "semantic": (lambda: SemanticEvaluator(panoptic.INFO), semantic_updates),
    "foreground": (ForegroundEvaluator, foreground_updates),
    "matting": (AlphaEvaluator, matting_updates),
    "referring": (ReferringEvaluator, referring_updates),
}


@pytest.mark.parametrize("task", CASES)
def test_merged_evaluators_give_the_result_of_a_single_evaluator(task):
    make, updates = CASES[task]
    updates = list(updates(np.random.default_rng(1)))
    whole, parts = make(), [make() for _ in range(3)]
    for update in updates:
        whole.update(*update)
    for part, indices in zip(parts, np.array_split(np.arange(len(updates)), 3)):
        for i in indices:
            part.update(*updates[i])
    first, *others = pickle.loads(pickle.dumps(parts))
    alone = first.result()
    for other in others:
        first.merge(other)
    assert first.result() == whole.result() and first.result() != alone
    assert first.details() == whole.details() and len(first.details()["worst_images"]) > 3
