"""PQ against the definition written out over pixel maps: overlaps, void, crowds."""

from __future__ import annotations

import numpy as np
import pytest

from mqformer_jax.evaluation.panoptic import PanopticEvaluator
from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, Segment, encode_rle
from mqformer_jax.segments import Segments

INFO = DatasetInfo(
    "toy", (ClassInfo(("cat",)), ClassInfo(("dog",)), ClassInfo(("sky",), True), ClassInfo(("sea",), True)), {}
)
SIZE = 32


def scene(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A map of `count` cells around random points and a class for each; stuff at most once."""
    points = rng.random((count, 2)) * SIZE
    grid = np.stack(np.mgrid[:SIZE, :SIZE], -1)
    cells = ((grid[:, :, None] - points) ** 2).sum(-1).argmin(-1)
    labels = np.concatenate([[2, 3], rng.integers(0, 2, count - 2)])
    return cells, labels


def disturbed(rng: np.random.Generator, cells: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moved by up to two pixels, one pair of cells merged, the class of one thing changed."""
    cells = np.roll(cells, rng.integers(-2, 3, 2), (0, 1))
    cells = np.where(cells == len(labels) - 1, len(labels) - 2, cells)
    labels = labels.copy()
    labels[2] = 1 - labels[2]
    return cells, labels


def predicted(cells: np.ndarray, labels: np.ndarray, hole: np.ndarray) -> Segments:
    ids = [i for i in range(len(labels)) if ((cells == i) & ~hole).any()]
    masks = np.stack([(cells == i) & ~hole for i in ids])
    panoptic = (masks * np.arange(1, len(ids) + 1)[:, None, None]).sum(0)
    n = len(ids)
    return Segments(
        [c.name for c in INFO.classes], masks, np.zeros((n, 4)), np.ones(n), labels[ids], np.zeros(n, int), panoptic
    )


def direct_pq(pairs: list) -> dict[int, tuple[float, int, int, int]]:
    """(sum of IoU, TP, FP, FN) a class. Each pair: truth [(class, mask, crowd)], prediction [(class, mask)]."""
    totals = {c: [0.0, 0, 0, 0] for c in range(4)}
    for truth, found in pairs:
        void = ~np.any([m for _, m, _ in truth], axis=0)
        matched_truth, matched_found = set(), set()
        for i, (c, t, crowd) in enumerate(truth):
            for j, (d, p) in enumerate(found):
                iou = (t & p).sum() / ((t | p).sum() - (void & p & ~t).sum())
                if c == d and not crowd and iou > 0.5:
                    totals[c][0] += iou
                    totals[c][1] += 1
                    matched_truth.add(i)
                    matched_found.add(j)
        for i, (c, _, crowd) in enumerate(truth):
            totals[c][3] += i not in matched_truth and not crowd
        for j, (d, p) in enumerate(found):
            free = void | np.any([np.zeros_like(void)] + [m for c, m, crowd in truth if crowd and c == d], axis=0)
            totals[d][2] += j not in matched_found and (p & free).sum() / p.sum() <= 0.5
    return totals


def test_pq_with_void_and_crowds_matches_the_definition():
    rng = np.random.default_rng(0)
    evaluator, pairs = PanopticEvaluator(INFO), []
    for image in range(6):
        cells, labels = scene(rng, 8)
        crowd, ignored = 7, cells == 5
        segments = [
            Segment(int(c), mask=encode_rle(cells == i), crowd=i == crowd)
            for i, c in enumerate(labels)
            if (cells == i).any()
        ]
        record = Record(str(image), b"", SIZE, SIZE, tuple(segments), ignore=encode_rle(ignored))
        hole = rng.random((SIZE, SIZE)) < 0.05
        segments = predicted(*disturbed(rng, cells, labels), hole)
        evaluator.update(record, segments)
        truth = [(c, cells == i, i == crowd) for i, c in enumerate(labels) if i != 5 and (cells == i).any()]
        pairs.append((truth, list(zip(segments.prompt_ids, segments.masks))))
    totals = direct_pq(pairs)
    # the noise makes errors of both kinds
    assert sum(v[2] for v in totals.values()) and sum(v[3] for v in totals.values())

    def mean(classes: range) -> tuple[float, float, float]:
        rows = [totals[c] for c in classes if sum(totals[c][1:])]
        sq = [s / max(tp, 1) for s, tp, _, _ in rows]
        rq = [tp / (tp + fp / 2 + fn / 2) for _, tp, fp, fn in rows]
        return tuple(100 * np.mean(x) for x in (np.multiply(sq, rq), sq, rq))

    result = evaluator.result()
    for suffix, classes in (("", range(4)), ("_things", range(2)), ("_stuff", range(2, 4))):
        np.testing.assert_allclose([result[k + suffix] for k in ("pq", "sq", "rq")], mean(classes), atol=1e-9)


def test_perfect_prediction_has_pq_100_with_void_pixels():
    cells, labels = scene(np.random.default_rng(1), 5)
    record = Record(
        "a",
        b"",
        SIZE,
        SIZE,
        tuple(Segment(int(c), mask=encode_rle(cells == i)) for i, c in enumerate(labels) if i != 4),
    )
    evaluator = PanopticEvaluator(INFO)
    evaluator.update(record, predicted(cells, labels, np.zeros((SIZE, SIZE), bool)))  # finds the void cell too
    assert evaluator.result()["pq"] == pytest.approx(100)


def test_prompts_that_differ_from_the_classes_are_rejected():
    cells, labels = scene(np.random.default_rng(1), 5)
    segments = predicted(cells, labels, np.zeros((SIZE, SIZE), bool))
    segments.texts = ["cat"]
    with pytest.raises(ValueError, match="a: panoptic quality needs .* 4 classes of toy"):
        PanopticEvaluator(INFO).update(Record("a", b"", SIZE, SIZE), segments)


def test_learnable_query_share_counts_only_true_positives():
    cells, labels = scene(np.random.default_rng(1), 6)
    record = Record(
        "a", b"", SIZE, SIZE, tuple(Segment(int(c), mask=encode_rle(cells == i)) for i, c in enumerate(labels))
    )
    segments = predicted(cells, labels, np.zeros((SIZE, SIZE), bool))
    segments.query_ids = np.array([0, 9, 0, 9, 9, 9])  # two regions, four things
    segments.prompt_ids[2] = 1 - segments.prompt_ids[2]  # what a learnable query found is called by the wrong name
    evaluator = PanopticEvaluator(INFO, learnable=5)
    evaluator.update(record, segments)
    result = evaluator.result()
    assert result["learnable_share_stuff"] == 50 and result["learnable_share_things"] == 0
    segments.prompt_ids[2] = 1 - segments.prompt_ids[2]
    evaluator.update(record, segments)
    assert evaluator.result()["learnable_share_things"] == pytest.approx(100 / 7)


def test_details_sort_the_worst_images_first():
    rng, evaluator = np.random.default_rng(2), PanopticEvaluator(INFO)
    for key, hole in (("whole", 0.0), ("holes", 0.45), ("some holes", 0.2)):
        cells, labels = scene(rng, 5)
        record = Record(
            key, b"", SIZE, SIZE, tuple(Segment(int(c), mask=encode_rle(cells == i)) for i, c in enumerate(labels))
        )
        evaluator.update(record, predicted(cells, labels, rng.random(cells.shape) < hole))
    details = evaluator.details()
    assert [image["key"] for image in details["worst_images"]] == ["holes", "some holes", "whole"]
    assert details["worst_images"][2]["pq"] == pytest.approx(100) and details["classes"]["sky"]["tp"] == 3
