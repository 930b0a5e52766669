"""Matting errors on mattes that can be counted by hand; real ones: test_published_parity.py."""

from __future__ import annotations

import numpy as np
import pytest

from mqformer_jax.evaluation.alpha import BAND, AlphaEvaluator, matting_errors, unknown_of


def square() -> np.ndarray:
    alpha = np.zeros((50, 40))
    alpha[10:30, 10:30] = 1
    return alpha


def test_a_perfect_matte_has_no_error():
    errors = matting_errors(square(), square(), np.ones((50, 40), bool))
    assert len(errors) == 10 and set(errors.values()) == {0.0}


def test_matting_errors_use_the_units_of_the_papers():
    alpha = np.full((50, 40), 0.25)
    evaluator = AlphaEvaluator()
    evaluator.update(alpha + 0.5, alpha, np.full((50, 40), 128, np.uint8))
    result = evaluator.result()
    assert result["sad"] == pytest.approx(1.0)  # half of 2,000 pixels, in thousands
    assert result["mse"] == pytest.approx(250) and result["mad"] == pytest.approx(500)  # thousandths
    assert result["grad"] == pytest.approx(0, abs=1e-12)
    assert result["unknown_sad"] == pytest.approx(1.0)


def test_connectivity_error_ignores_faint_disconnected_pieces():
    faint, opaque = square(), square()
    faint[40:45, 10:20], opaque[40:45, 10:20] = 0.14, 0.8
    assert matting_errors(faint, square(), np.zeros((50, 40), bool))["conn"] == 0.0
    assert matting_errors(opaque, square(), np.zeros((50, 40), bool))["conn"] == pytest.approx(50 * 0.8 / 1000)


def test_unknown_errors_count_only_the_trimap_unknown_area():
    trimap = np.zeros((50, 40), np.uint8)
    trimap[:, 20:], trimap[:, 30:] = 128, 255
    evaluator = AlphaEvaluator()
    evaluator.update(square() * 0.5, square(), trimap)
    result = evaluator.result()
    # 20 x 10 and 20 x 20 pixels, half off
    assert result["unknown_sad"] == pytest.approx(0.1) and result["sad"] == pytest.approx(0.2)


def test_unknown_area_without_trimap_is_a_band_around_partial_alpha():
    alpha = square()
    alpha[20, 30] = 0.5
    rows, columns = np.nonzero(unknown_of(alpha, None))
    assert (rows.min(), rows.max(), columns.max()) == (20 - BAND, 20 + BAND, 39) and columns.min() == 30 - BAND
    assert not unknown_of(square(), None).any()


def test_unknown_metrics_are_omitted_without_unknown_pixels():
    evaluator = AlphaEvaluator()
    evaluator.update(square() * 0.9, square(), key="hard")
    assert "sad" in evaluator.result() and not any(k.startswith("unknown") for k in evaluator.result())


def test_prefixed_predictions_are_reported_separately():
    evaluator = AlphaEvaluator()
    for key, share in (("a", 0.5), ("b", 0.9)):
        evaluator.update(square() * share, square(), key=key)
        evaluator.update(square(), square(), key=key, prefix="refined_")
    result = evaluator.result()
    assert result["sad"] == pytest.approx(0.12) and result["refined_sad"] == 0
    assert [image["key"] for image in evaluator.details()["worst_images"]] == ["a", "b"]
