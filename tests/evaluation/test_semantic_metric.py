"""mIoU against a confusion matrix counted by numpy."""

from __future__ import annotations

import numpy as np
import pytest

from mqformer_jax.evaluation.semantic import SemanticEvaluator, ground_truth_map
from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, Segment, encode_rle

INFO = DatasetInfo("toy", tuple(ClassInfo((name,)) for name in ("cat", "sky", "sea", "never")), {})


def record_of(labels: np.ndarray, ignore: np.ndarray | None = None) -> Record:
    """Two segments a class, where it has two pixels or more."""
    segments = []
    for c in range(3):
        where = labels == c
        half = where & (np.cumsum(where).reshape(where.shape) * 2 <= where.sum())
        segments += [Segment(c, mask=encode_rle(m)) for m in (half, where & ~half) if m.any()]
    return Record("a", b"", *labels.shape, tuple(segments), ignore=None if ignore is None else encode_rle(ignore))


def test_miou_matches_the_confusion_matrix():
    rng = np.random.default_rng(0)
    evaluator, confusion = SemanticEvaluator(INFO), np.zeros((4, 4))
    for _ in range(3):
        truth, ignore = rng.integers(0, 4, (20, 30)), rng.random((20, 30)) < 0.1  # class 3 has no segment: unknown
        prediction = np.where(rng.random((20, 30)) < 0.6, truth % 3, rng.integers(0, 3, (20, 30)))
        evaluator.update(record_of(truth, ignore), prediction)
        known = ~ignore & (truth < 3)
        np.add.at(confusion, (truth[known], prediction[known]), 1)
    confusion = confusion[:3, :3]
    iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    share = confusion.sum(1) / confusion.sum()
    result = evaluator.result()
    assert result["miou"] == pytest.approx(100 * iou.mean(), abs=1e-9)
    assert result["fwiou"] == pytest.approx(100 * (share * iou).sum(), abs=1e-9)
    assert result["pixel_accuracy"] == pytest.approx(100 * np.trace(confusion) / confusion.sum(), abs=1e-9)


def test_ground_truth_map_includes_crowds_and_excludes_ignored_pixels():
    mask = np.zeros((2, 4), bool)
    mask[0] = True
    ignore = np.zeros_like(mask)
    ignore[:, 0] = True
    record = Record("a", b"", 2, 4, (Segment(0, mask=encode_rle(mask), crowd=True),), ignore=encode_rle(ignore))
    np.testing.assert_array_equal(ground_truth_map(record, INFO), [[4, 0, 0, 0], [4, 4, 4, 4]])


def test_a_prediction_of_another_size_is_refused():
    with pytest.raises(ValueError, match="the prediction has shape"):
        SemanticEvaluator(INFO).update(Record("a", b"", 2, 4), np.zeros((4, 2), int))
