import numpy as np

from mqformer_jax.losses import costs

rng = np.random.default_rng(0)
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def test_focal_loss_matches_the_retinanet_formula():
    logits, labels = rng.normal(size=50), rng.integers(0, 2, 50).astype(float)
    p = sigmoid(logits)
    expected = np.where(labels == 1, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    np.testing.assert_allclose(costs.focal(logits, labels), expected, rtol=1e-5)


def test_class_cost_averages_over_the_positive_prompts_of_a_target():
    logits = rng.normal(size=(6, 3)).astype(np.float32)
    one = np.array(costs.class_cost(logits, np.eye(3, dtype=np.float32)))
    both = np.array(costs.class_cost(logits, np.array([[1.0, 0, 1]], np.float32)))
    np.testing.assert_allclose(both[0], (one[0] + one[2]) / 2, rtol=1e-5)
    p = sigmoid(logits[:, 1])
    np.testing.assert_allclose(one[1], -0.25 * (1 - p) ** 2 * np.log(p) + 0.75 * p**2 * np.log(1 - p), rtol=1e-4)


def test_giou_of_known_boxes():
    a = np.array([[0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1]], np.float32)
    b = np.array([[1, 1, 3, 3], [0, 0, 1, 1], [2, 0, 3, 1]], np.float32)
    np.testing.assert_allclose(costs.giou(a, b), [1 / 7 - 2 / 9, 1, -1 / 3], atol=1e-5)


def test_pairwise_mask_costs_equal_matched_losses_and_skip_unknown_points():
    logits, masks = rng.normal(size=(4, 30)).astype(np.float32), (rng.random((3, 30)) < 0.5).astype(np.float32)
    weight = (rng.random(30) < 0.7).astype(np.float32)
    entropy, dice = costs.mask_costs(logits, masks, weight)
    for n in range(3):
        for q in range(4):
            expected = costs.entropy_and_dice(logits[q], masks[n], weight)
            np.testing.assert_allclose((entropy[n, q], dice[n, q]), expected, rtol=1e-4)
    known = weight > 0
    p, t = sigmoid(logits[1, known]), masks[2, known]
    np.testing.assert_allclose(entropy[2, 1], -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(), rtol=1e-4)
    np.testing.assert_allclose(dice[2, 1], 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1), rtol=1e-4)


def test_projection_loss_matches_boxinst_for_cell_aligned_boxes():
    logits = rng.normal(size=(5, 12, 16)).astype(np.float32)
    corners = np.array([[2, 3, 9, 7], [0, 0, 16, 12], [15, 11, 16, 12], [4, 0, 5, 12], [8, 6, 8, 6]])
    masks = np.zeros((5, 12, 16))
    for mask, (x0, y0, x1, y1) in zip(masks, corners):
        mask[y0:y1, x0:x1] = 1
    p = sigmoid(logits)
    dice = lambda a, b: 1 - 2 * (a * b).sum(-1) / ((a**2).sum(-1) + (b**2).sum(-1) + 1e-5)
    expected = dice(p.max(1), masks.max(1)) + dice(p.max(2), masks.max(2))
    found = costs.projection_loss(logits, (corners / np.array([16, 12, 16, 12])).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_projection_loss_target_is_fractional_for_partly_covered_cells():
    box = np.array([0.25 + 0.125, 0, 0.75, 1], np.float32)  # from the middle of the second of four cells on
    exact = np.broadcast_to(np.array([-30, 0, 30, -30], np.float32), (4, 4))
    assert float(costs.projection_loss(exact, box)) < 1e-4
    assert float(costs.projection_loss(np.full((4, 4), -np.inf, np.float32), box)) > 1.9
