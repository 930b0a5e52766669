"""Referring metrics on masks that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mqformer_jax.evaluation.referring import ReferringEvaluator


def run(start: int, stop: int) -> np.ndarray:
    mask = np.zeros((10, 10), bool)
    mask.flat[start:stop] = True
    return mask


@pytest.fixture
def result() -> dict[str, float]:
    evaluator = ReferringEvaluator()
    evaluator.update(run(0, 10), run(0, 10), "color")  # 10 / 10
    evaluator.update(run(0, 60), run(0, 80), "color")  # 60 / 80 = 0.75
    evaluator.update(run(0, 10), run(5, 15), "relation")  # 5 / 15
    evaluator.update(run(0, 0), None)
    evaluator.update(run(0, 1), None)
    evaluator.update(run(0, 0), None)
    return evaluator.result()


def test_ciou_sums_pixels_and_miou_averages_expressions(result):
    assert result["ciou"] == pytest.approx(100 * 75 / 105)
    assert result["miou"] == pytest.approx(100 * (1 + 0.75 + 1 / 3) / 3)


def test_precision_counts_expressions_above_each_threshold(result):
    got = [result[f"precision@{t}"] for t in (0.5, 0.6, 0.7, 0.8, 0.9)]
    np.testing.assert_allclose(got, 100 * np.array([2, 2, 2, 1, 1]) / 3)


def test_no_target_accuracy_counts_only_empty_predictions(result):
    assert result["no_target_accuracy"] == pytest.approx(200 / 3)


def test_metrics_are_reported_per_expression_kind(result):
    assert result["miou/color"] == pytest.approx(87.5) and result["ciou/color"] == pytest.approx(100 * 70 / 90)
    assert result["miou/relation"] == pytest.approx(100 / 3)


def test_result_is_empty_without_expressions():
    assert ReferringEvaluator().result() == {}
