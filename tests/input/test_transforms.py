from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from mqformer_jax.input.example import Example, Prompt, Target
from mqformer_jax.input.record import box_of
from mqformer_jax.input.transforms import color_jitter, fit, fit_image, random_flip, resize_crop

CANVAS = (96, 128)


def disc(h, w, y, x, r):
    rows, cols = np.mgrid[:h, :w]
    return (rows - y) ** 2 + (cols - x) ** 2 < r * r


def scene(h=120, w=100):
    """A gray image with white discs: the pixels tell where every mask must be after any geometric change."""
    masks = [disc(h, w, 40, 30, 18), disc(h, w, 90, 70, 14)]
    image = np.full((h, w, 3), 60, np.uint8)
    image[masks[0], 0] = 255
    image[masks[1], 1] = 255
    targets = [Target((i,), np.array(box_of(m), np.float32), m) for i, m in enumerate(masks)]
    prompts = [Prompt(("disc on the left",), True), Prompt(("disc",), False), Prompt(("absent",), False)]
    return Example("t", image, prompts, targets, disc(h, w, 20, 80, 12))


def whole(target, image):
    """A target's mask on its image."""
    (top, left), (h, w) = target.at, target.mask.shape
    mask = np.zeros(image.shape[:2], bool)
    mask[top : top + h, left : left + w] = target.mask
    return mask


def iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


@pytest.mark.parametrize("seed", range(12))
def test_masks_and_boxes_follow_the_transformed_pixels(seed):
    rng = np.random.default_rng(seed)
    moved = random_flip(resize_crop(scene(), CANVAS, rng, (0.4, 2.0)), rng, 0.5)
    h, w = moved.image.shape[:2]
    assert h <= CANVAS[0] and w <= CANVAS[1]
    assert moved.ignore.shape == (h, w)
    for target in moved.targets:
        painted = moved.image[..., target.prompts[0]] > 157
        assert iou(whole(target, moved.image), painted) > 0.85
        assert tuple(target.box) == box_of(whole(target, moved.image))


@pytest.mark.parametrize("seed", range(8))
def test_cropped_masks_transform_like_full_image_masks(seed):
    example = scene()
    windowed = dataclasses.replace(example, targets=[])
    for target in example.targets:
        x0, y0, x1, y1 = map(int, target.box)
        piece = target.mask[y0:y1, x0:x1]
        windowed.targets.append(dataclasses.replace(target, mask=piece, at=(y0, x0)))
    a, b = (
        resize_crop(random_flip(e, rng, 0.5), CANVAS, rng, (0.2, 3.0))
        for e in (example, windowed)
        for rng in [np.random.default_rng(seed)]
    )
    assert len(a.targets) == len(b.targets)
    for one, other in zip(a.targets, b.targets):
        np.testing.assert_array_equal(whole(one, a.image), whole(other, b.image))
        np.testing.assert_array_equal(one.box, other.box)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_without_masks_follow_the_transformed_pixels(seed):
    """The painted pixels tell where a box must be; what the window cuts off, it cuts off the box."""
    rng = np.random.default_rng(seed)
    example = scene()
    for target in example.targets:
        target.mask = None
    moved = random_flip(resize_crop(example, CANVAS, rng, (0.6, 2.5)), rng, 0.5)
    for target in moved.targets:
        painted = moved.image[..., target.prompts[0]] > 157
        if painted.sum() > 60:
            np.testing.assert_allclose(target.box, box_of(painted), atol=0.05 * max(moved.image.shape) + 1.5)
    assert len(moved.targets) >= 1 or not (moved.image > 157).any()


def test_mask_resizing_matches_opencv():
    example = scene()
    for canvas in ((60, 50), (96, 128), (300, 211)):
        moved = fit(example, canvas)
        for before, after in zip(example.targets, moved.targets):
            size = moved.image.shape[1::-1]
            expected = cv2.resize(before.mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT).view(bool)
            np.testing.assert_array_equal(whole(after, moved.image), expected)


def test_prompt_of_a_cropped_out_target_becomes_an_exhaustive_negative():
    left = 0
    for seed in range(40):
        moved = resize_crop(scene(), (40, 40), np.random.default_rng(seed), (3.0, 4.0))
        for i in (0, 1):
            if not any(i in t.prompts for t in moved.targets):
                visible = (moved.image[..., i] > 157).sum()
                assert moved.prompts[i].exhaustive or visible > 0
                left += moved.prompts[i].exhaustive
    assert left > 10


def test_prompt_of_a_target_that_becomes_too_small_is_non_exhaustive():
    moved = fit(scene(), (4, 4))
    assert moved.targets == [] and [p.exhaustive for p in moved.prompts] == [False, False, True]


def test_crop_windows_cover_the_whole_image():
    ramp = np.stack([*np.mgrid[:100, :100].astype(np.uint8), np.zeros((100, 100), np.uint8)], axis=-1)
    example = dataclasses.replace(scene(100, 100), image=ramp, targets=[])
    corners = np.array(
        [resize_crop(example, (50, 50), np.random.default_rng(s), (2.0, 2.0)).image[0, 0, :2] for s in range(60)]
    )
    assert (corners.min(0) < 8).all() and (corners.max(0) > 42).all() and corners.max() <= 50


def test_boxes_without_masks_are_scaled_and_clipped():
    example = dataclasses.replace(scene(), targets=[Target((1,), np.array([10, 20, 60, 80], np.float32))])
    (target,) = fit(example, (60, 50)).targets
    np.testing.assert_allclose(target.box, [5, 10, 30, 40])
    for seed in range(20):
        moved = resize_crop(example, (48, 48), np.random.default_rng(seed), (2.0, 2.0))
        h, w = moved.image.shape[:2]
        for t in moved.targets:
            assert 0 <= t.box[0] < t.box[2] <= w and 0 <= t.box[1] < t.box[3] <= h


def test_image_of_canvas_size_is_not_resampled():
    example = scene(*CANVAS)
    moved = resize_crop(example, CANVAS, np.random.default_rng(0), (1.0, 1.0))
    np.testing.assert_array_equal(moved.image, example.image)
    np.testing.assert_array_equal(whole(moved.targets[1], moved.image), example.targets[1].mask)


def test_flip_mirrors_image_masks_boxes_and_prompt_texts():
    example = scene()
    moved = random_flip(example, np.random.default_rng(0), 1.0)
    np.testing.assert_array_equal(moved.image, example.image[:, ::-1])
    np.testing.assert_array_equal(moved.ignore, example.ignore[:, ::-1])
    np.testing.assert_array_equal(moved.targets[0].mask, example.targets[0].mask[:, ::-1])
    assert tuple(moved.targets[0].box) == box_of(moved.targets[0].mask)
    assert moved.prompts[0].texts == ("disc on the right",)


def test_image_with_unmirrorable_prompt_texts_is_not_flipped():
    example = dataclasses.replace(scene(), prompts=[Prompt(("2nd from l",), True)] * 3)
    assert random_flip(example, np.random.default_rng(0), 1.0) is example


def test_fit_keeps_the_whole_image_and_pads_right_and_below():
    image = np.random.default_rng(0).integers(0, 255, (30, 60, 3), np.uint8)
    padded, size = fit_image(image, (64, 64))
    assert size == (32, 64) and padded.shape == (64, 64, 3) and (padded[32:] == 128).all()
    same, size = fit_image(image, (30, 64))
    np.testing.assert_array_equal(same[:30, :60], image)
    example = fit(scene(), (60, 64))
    assert example.image.shape == (60, 50, 3) and len(example.targets) == 2


def test_color_jitter_changes_colors_slightly_and_keeps_targets():
    example = scene()
    moved = color_jitter(example, np.random.default_rng(0), 0.2)
    assert moved.targets is example.targets and (moved.image != example.image).any()
    assert abs(moved.image.astype(float).mean() / example.image.mean() - 1) < 0.25
    np.testing.assert_array_equal(color_jitter(example, np.random.default_rng(0), 0.0).image, example.image)
