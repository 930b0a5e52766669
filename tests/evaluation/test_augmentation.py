"""Averages over views, written out pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import get_config

from mqformer_jax.evaluation.augment import joined, mean_regions, mirrored_image, mirrored_texts, views_of
from mqformer_jax.inference.predictor import RawPredictions
from mqformer_jax.segments import CanvasMasks, region_segments, semantic_map, soft_mask

OUTPUT = (20, 28)


@pytest.fixture
def views() -> tuple[list[RawPredictions], list[bool]]:
    """Three views of one image by 6 queries for 3 prompts: as it is, mirrored, and larger and mirrored."""
    rng, answers = np.random.default_rng(0), []
    for canvas, valid in (((32, 32), (23, 32)), ((32, 32), (23, 32)), ((64, 64), (46, 64))):
        logits = rng.normal(0, 3, (6, canvas[0] // 4, canvas[1] // 4)).astype(np.float32)
        boxes = np.tile([2.0, 3.0, 10.0, 12.0], (6, 1)).astype(np.float32)
        masks = CanvasMasks(logits, canvas, valid, OUTPUT)
        answers.append(RawPredictions(rng.random((6, 3)).astype(np.float32), boxes, masks))
    return answers, [False, True, True]


def probabilities(answer: RawPredictions, flip: bool) -> np.ndarray:
    probs = 1 / (1 + np.exp(-answer.masks[np.arange(6)].astype(np.float64)))
    return probs[:, :, ::-1] if flip else probs


def test_semantic_map_uses_mean_scores_over_views(views):
    scores = np.mean(
        [np.einsum("qp,qhw->phw", a.class_probs.astype(float), probabilities(a, f)) for a, f in zip(*views)], 0
    )
    labels = semantic_map(*joined(*views))
    np.testing.assert_array_equal(labels, scores.argmax(0))
    alone = [semantic_map(a.class_probs, a.masks) for a in views[0]]
    assert all((labels != own).any() for own in alone)


def test_region_mask_is_score_weighted_mean_of_best_queries_per_view(views):
    answer = mean_regions(*views)
    for prompt in range(3):
        best = [a.class_probs[:, prompt].argmax() for a in views[0]]
        want = np.average(
            [probabilities(a, f)[q] for a, f, q in zip(*views, best)], axis=0, weights=scores_of(views, prompt)
        )
        np.testing.assert_allclose(soft_mask(answer.class_probs, answer.masks, prompt), want, atol=1e-6)
    found = region_segments(["a", "b", "c"], answer.class_probs, answer.boxes, answer.masks)
    np.testing.assert_allclose(found.scores, np.mean([a.class_probs.max(0) for a in views[0]], 0), rtol=1e-6)
    np.testing.assert_allclose(
        found.boxes[0],
        np.average([[2, 3, 10, 12], [18, 3, 26, 12], [18, 3, 26, 12]], 0, scores_of(views, 0)),
        rtol=1e-5,
    )


def scores_of(views: tuple[list[RawPredictions], list[bool]], prompt: int) -> list[float]:
    return [answer.class_probs[:, prompt].max() for answer in views[0]]


def test_single_unmirrored_view_is_returned_unchanged(views):
    answer = views[0][0]
    assert mean_regions([answer], [False]) is answer
    assert joined([answer], [False]) == (answer.class_probs, answer.masks)


def test_scaled_canvases_are_divisible_by_the_strides():
    config = get_config()  # 64 x 64, strides 8 and 16
    assert views_of(config, (1.0,), False) == [((64, 64), False)]
    assert views_of(config, (1.0, 1.4), True) == [
        ((64, 64), False),
        ((64, 64), True),
        ((96, 96), False),
        ((96, 96), True),
    ]
    with pytest.raises(ValueError, match=r"config.eval.scales = 0.2: a canvas of \(16, 16\) has 5 tokens"):
        views_of(config, (0.2,), False)


def test_left_and_right_in_prompts_are_swapped_for_mirrored_images():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(mirrored_image(image)[0, 0], image[0, 3])
    assert mirrored_texts(["the left dog", "sky"]) == ["the right dog", "sky"]
    assert mirrored_texts(["the leftish dog", "sky"]) is None
