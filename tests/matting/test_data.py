"""Mattes and the masks that the refiner learns to mend."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from tiny import get_config

from mqformer_jax.matting.data import Matte, cut, fitted, make_example, part_of, perturb, rough_mask, window_around


def disc(h: int = 90, w: int = 140, radius: float = 20) -> np.ndarray:
    """A soft disc in the middle, 0 to 1."""
    y, x = np.mgrid[:h, :w]
    return np.clip((radius - np.hypot(y - h / 2, x - w / 2)) / 6 + 0.5, 0, 1).astype(np.float32)


def matte() -> Matte:
    return Matte(np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8), disc(), 0, True)


def test_window_is_a_square_around_the_object_clipped_to_the_image():
    top, left, height, width = window_around(disc(), 0.25)
    assert height == width and 58 <= height <= 62
    assert abs(top + height / 2 - 45) <= 1 and abs(left + width / 2 - 70) <= 1
    assert window_around(disc(), 5.0) == (0, 0, 90, 140)
    assert window_around(np.roll(disc(), (-40, 60), (0, 1)), 0.25)[0] == 0
    assert window_around(np.full((9, 9), 0.4), 0.1) is None


def test_window_is_fitted_and_edge_padded_to_the_canvas():
    image, window = matte().image, (10, 20, 32, 64)
    assert fitted(window, 64) == (32, 64)
    placed = cut(image, window, 64)
    assert (placed[:32] == image[10:42, 20:84]).all() and (placed[32:] == placed[31]).all()


def test_rough_mask_grows_or_shrinks_by_the_requested_pixels():
    exact = (disc() > 0.5).sum()
    radius = lambda grow: np.sqrt(rough_mask(disc(), 0.5, grow).sum() / np.pi) - np.sqrt(exact / np.pi)
    assert (
        radius(5) == pytest.approx(5, abs=0.5)
        and radius(-5) == pytest.approx(-5, abs=0.5)
        and radius(0) == pytest.approx(0, abs=1e-5)
    )


def test_perturbed_matte_stays_close_and_is_deterministic_per_seed():
    masks = [perturb(disc(), np.random.default_rng(i)) for i in range(40)]
    assert all(m.shape == (90, 140) and m.dtype == np.float32 and 0 <= m.min() and m.max() <= 1 for m in masks)
    errors = [np.abs(m - disc()).mean() for m in masks]
    assert 0.005 < np.median(errors) < 0.1 and max(errors) < 0.5
    assert any(((m > 0.01) & (m < 0.99)).any() for m in masks) and any(np.isin(m, (0, 1)).all() for m in masks)
    np.testing.assert_array_equal(masks[3], perturb(disc(), np.random.default_rng(3)))


def test_flip_mirrors_image_guidance_alpha_and_weight_together():
    matting = get_config().matting
    plain, mirrored = (make_example(matte(), None, matting, np.random.default_rng(1), flip) for flip in (0.0, 1.0))
    height, width = fitted(part_of(window_around(disc(), matting.margin), np.random.default_rng(1), 1.0), 64)
    for name, values in plain.items():
        np.testing.assert_array_equal(values[:, :width][:, ::-1], mirrored[name][:, :width])
    weight, alpha = plain["weight"], plain["alpha"]
    assert (weight[:height, :width] >= 1).all() and not weight[height:].any() and not weight[:, width:].any()
    assert weight[(alpha > 0.1) & (alpha < 0.9)].min() > 1


def test_model_mask_is_resized_and_cropped_with_the_image():
    own = (cv2.resize(disc(), (70, 45), interpolation=cv2.INTER_AREA) * 255).astype(np.uint8)
    example = make_example(matte(), own, get_config().matting, np.random.default_rng(2), 0.0)
    assert np.abs(example["guidance"] - example["alpha"]).mean() < 0.05
