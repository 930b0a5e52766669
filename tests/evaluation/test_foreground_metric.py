"""Foreground metrics against a loop over thresholds, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mqformer_jax.evaluation.foreground import ForegroundEvaluator


def test_mae_and_mse_average_over_images_of_different_sizes():
    evaluator = ForegroundEvaluator()
    evaluator.update(np.full((2, 2), 0.5), np.ones((2, 2)))
    evaluator.update(np.full((8, 8), 0.75, np.float32), np.ones((8, 8), bool))
    result = evaluator.result()
    assert result["mae"] == pytest.approx(37.5) and result["mse"] == pytest.approx(100 * (0.25 + 0.0625) / 2)


def test_max_f_is_the_maximum_of_the_mean_f_curve():
    rng = np.random.default_rng(0)
    evaluator, curves = ForegroundEvaluator(), []
    for _ in range(3):
        target = rng.random((16, 16)) < 0.4
        prediction = np.clip(0.3 * target + rng.random((16, 16)) * 0.6, 0, 1)
        evaluator.update(prediction, target)
        curve = []
        for t in range(256):
            chosen = np.round(prediction * 255) >= t
            precision, recall = (chosen & target).sum() / max(chosen.sum(), 1), (chosen & target).sum() / target.sum()
            curve.append(1.3 * precision * recall / (0.3 * precision + recall) if recall else 0.0)
        curves.append(curve)
    best = 100 * np.mean(curves, 0).max()
    assert 40 < best < 99 and evaluator.result()["max_f"] == pytest.approx(best)


def test_perfect_prediction_has_zero_error_and_full_scores():
    target = np.zeros((4, 4))
    target[:2] = 1
    evaluator = ForegroundEvaluator()
    evaluator.update(target, target)
    result = evaluator.result()
    everything = 100 * 16 / 15  # the authors divide by one pixel less than there are
    assert result.pop("mean_e") == pytest.approx((255 + 0.25) / 256 * everything)  # a threshold of 0 chooses all pixels
    assert result == pytest.approx({"mae": 0, "mse": 0, "max_f": 100, "s_measure": 100, "max_e": everything})
