"""Pictures are looked at by people; here: that they show what they are given, where it is."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from mqformer_jax.segments import Segments
from mqformer_jax.visualization.overlays import colors, curves, grid, label_of, overlay

GRAY = np.full((96, 96, 3), 128, np.uint8)


def segments(*masks: np.ndarray, prompts: tuple[int, ...], query: int = 0) -> Segments:
    n = len(masks)
    boxes = np.array([[10, 10, 60, 50]] * n, float).reshape(n, 4)
    stack = np.stack(masks) if n else np.zeros((0, 96, 96), bool)
    return Segments(["cat", "dog", "sky"], stack, boxes, np.full(n, 0.876), np.array(prompts, int), np.full(n, query))


def half(left: bool) -> np.ndarray:
    mask = np.zeros((96, 96), bool)
    mask[:, :48] = True
    return mask if left else ~mask


def test_small_images_are_enlarged_by_an_integer_factor_large_ones_kept():
    assert overlay(GRAY, segments(prompts=())).shape == (384, 384, 3)
    large = np.full((400, 640, 3), 128, np.uint8)
    empty = Segments(
        [], np.zeros((0, 400, 640), bool), np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), np.zeros(0, int)
    )
    np.testing.assert_array_equal(overlay(large, empty), large)


def test_segment_is_tinted_with_its_prompt_color_and_the_rest_is_unchanged():
    before = GRAY.copy()
    out = overlay(GRAY, segments(half(True), prompts=(1,)), labels=False).astype(int)
    tint = out[200, 100] - 128
    assert np.corrcoef(tint, colors([1], range(3))[0] - 128)[0, 1] > 0.99
    np.testing.assert_array_equal(out[200, 300], 128)
    np.testing.assert_array_equal(GRAY, before)


def test_smaller_segment_is_drawn_over_a_larger_one():
    spot = np.zeros((96, 96), bool)
    spot[30:60, 30:60] = True
    both = overlay(GRAY, segments(spot, np.ones((96, 96), bool), prompts=(0, 2)), labels=False)
    assert not np.array_equal(both[180, 180], both[20, 20])


def test_labels_and_boxes_are_drawn_at_their_segments():
    answer = segments(half(True), prompts=(0,))
    plain = overlay(GRAY, answer, labels=False)
    changed = (overlay(GRAY, answer) != plain).any(-1)
    assert changed[:, :192].any() and not changed[:, 200:].any()  # "cat 0.88" lies in the left half
    boxed = (overlay(GRAY, answer, labels=False, boxes=True) != plain).any(-1)
    assert boxed[40:200, 238:241].any(1).all() and not boxed[:, 250:].any()  # its right edge: 60 x 4 pixels


def test_labels_show_scores_only_for_predictions():
    assert label_of(segments(half(True), prompts=(0,)), 0) == "cat 0.88"
    assert label_of(segments(half(True), prompts=(0,), query=-1), 0) == "cat"


def test_box_only_segment_is_drawn_and_empty_segment_is_not():
    nothing = np.zeros((96, 96), bool)
    assert (overlay(GRAY, segments(nothing, prompts=(0,))) != overlay(GRAY, segments(prompts=()))).any()
    missing = segments(nothing, prompts=(0,))
    missing.boxes[:] = 0
    np.testing.assert_array_equal(overlay(GRAY, missing), overlay(GRAY, segments(prompts=())))


def test_colors_of_prompts_and_of_same_prompt_segments_are_distinct():
    for shades in (colors(range(12), range(12)), colors([5, 5, 5], range(12))):
        distance = np.linalg.norm(shades[:, None] - shades[None], axis=-1) + 1e3 * np.eye(len(shades))
        assert distance.min() > 20
    np.testing.assert_array_equal(colors([7, 3], range(12))[1], colors([3], range(12))[0])  # the same in every picture


def test_grid_resizes_the_cells_of_a_row_to_one_height(tmp_path):
    red, wide = np.zeros((96, 96, 3), np.uint8), np.zeros((192, 384, 3), np.uint8)
    red[..., 0], wide[..., 2] = 255, 255
    path = str(tmp_path / "grid.png")
    grid(
        [[("a prompt that is so long that it takes two lines or more", red), ("", wide)], [("", red)]],
        path,
        ["input", "truth"],
    )
    page = cv2.imread(path)[..., ::-1]
    is_red, is_blue = (page == [255, 0, 0]).all(-1), (page == [0, 0, 255]).all(-1)
    assert is_red.sum() == 192 * 192 + 96 * 96 and is_blue.sum() == 192 * 384
    assert (page[:10] == 255).all()


def test_curves_are_drawn_and_a_missing_log_file_is_an_error(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        "".join(json.dumps({"step": s, "loss": 1 / (1 + s)}) + "\n" for s in range(5)) + '{"step": 5, "pq": 3}\n'
    )
    curves({"run": str(log)}, ["loss", "pq"], str(tmp_path / "curves.png"))
    assert cv2.imread(str(tmp_path / "curves.png")).std() > 5
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        curves({"run": str(tmp_path / "nowhere.jsonl")}, ["loss"], str(tmp_path / "x.png"))
