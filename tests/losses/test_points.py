import jax
import numpy as np
import pytest
from originals import assert_agrees
from scipy.ndimage import map_coordinates

from mqformer_jax.losses.points import (
    _least_by_counting,
    least,
    sample_bits,
    sample_features,
    sample_maps,
    uncertain_points,
)

rng = np.random.default_rng(0)


def oracle(maps, points):
    """Bilinear at pixel centers, zero outside, by SciPy."""
    _, h, w = maps.shape
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    return np.stack(
        [
            map_coordinates(m, [p[:, 1] * h + 0.5, p[:, 0] * w + 0.5], order=1, mode="constant")
            for m, p in zip(padded, points)
        ]
    )


def test_maps_are_sampled_bilinearly_with_zeros_outside():
    maps, points = (
        rng.normal(size=(3, 5, 7)).astype(np.float32),
        rng.uniform(-0.05, 1.05, (3, 50, 2)).astype(np.float32),
    )
    assert_agrees("point sampling (SciPy)", "forward", sample_maps(maps, points), oracle(maps, points), 1e-5)


def test_features_at_shared_points_equal_maps_channel_by_channel():
    features, points = rng.normal(size=(5, 7, 4)).astype(np.float32), rng.uniform(0, 1, (20, 2)).astype(np.float32)
    expected = oracle(features.transpose(2, 0, 1), np.broadcast_to(points, (4, 20, 2))).T
    assert_agrees("point sampling (SciPy)", "forward", sample_features(features, points), expected, 1e-5)


def test_packed_bits_are_sampled_like_the_mask_they_pack():
    masks = rng.random((4, 6, 16)) < 0.5
    rows, points = np.array([2, 0, 3]), rng.uniform(0, 1, (3, 40, 2)).astype(np.float32)
    bits = np.packbits(masks, axis=-1)
    whole = np.array([[i * 12, 0, 0, 6, 2] for i in rows])
    found = sample_bits(bits.reshape(-1), whole, (6, 16), points)
    assert_agrees("point sampling (SciPy)", "forward", found, oracle(masks[rows].astype(np.float32), points), 1e-5)


def test_a_mask_that_is_kept_in_a_window_is_nothing_outside_it():
    masks = np.zeros((2, 9, 24), bool)
    masks[0, 2:5, 8:16] = rng.random((3, 8)) < 0.5
    masks[1, 7:9, 16:24] = rng.random((2, 8)) < 0.5
    parts = [np.packbits(masks[0, 2:5, 8:16], axis=-1), np.packbits(masks[1, 7:9, 16:24], axis=-1)]
    windows = np.array([[4, 2, 1, 3, 1], [7, 7, 2, 2, 1]])
    bits = np.concatenate([np.full(4, 255, np.uint8), *(p.reshape(-1) for p in parts), np.full(5, 255, np.uint8)])
    points = rng.uniform(0, 1, (2, 300, 2)).astype(np.float32)
    found = sample_bits(bits, windows, (9, 24), points)
    assert_agrees("point sampling (SciPy)", "forward", found, oracle(masks.astype(np.float32), points), 1e-5)


def test_most_points_lie_where_the_mask_is_uncertain_and_none_outside_the_image():
    logits = np.full((1, 32, 32), 9.0, np.float32)
    logits[:, :, :8] = 0.0
    points = np.array(uncertain_points(jax.random.key(0), logits, np.array([0.9, 0.5], np.float32), 200))
    assert points.shape == (1, 200, 2)
    assert points[..., 0].max() <= 0.9 and points[..., 1].max() <= 0.5
    assert (points[..., 0] < 0.27).mean() > 0.6  # a quarter by chance


@pytest.mark.parametrize("k", [1, 7, 50, 99, 100])
def test_the_least_are_those_that_sorting_finds_and_of_equals_the_first(k):
    rng = np.random.default_rng(k)
    values = np.abs(
        np.stack([rng.normal(size=100), np.round(rng.normal(size=100)), np.zeros(100), rng.normal(size=100) * 1e30])
    )
    values[3, :5], values[0, 3] = np.inf, 0
    values = np.stack([values, values[:, ::-1]]).astype(np.float32)
    expected = np.sort(np.argsort(values, -1, kind="stable")[..., :k], -1)
    np.testing.assert_array_equal(np.sort(jax.jit(_least_by_counting, static_argnums=1)(values, k), -1), expected)
    np.testing.assert_array_equal(np.sort(least(values, k), -1), expected)
