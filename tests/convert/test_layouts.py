"""The layouts' files are whole: what they hold is what their first lines say they hold."""

from __future__ import annotations

import re

import layouts
import numpy as np
import pytest


@pytest.mark.parametrize("name", layouts.NAMES)
def test_layout_file_matches_key_and_parameter_counts_in_its_header(name):
    keys, numbers = re.search(r"([\d,]+) keys, ([\d,]+) numbers", (layouts.FOLDER / f"{name}.txt").read_text()).groups()
    layout, shared = layouts.load(name), layouts.aliases(name)

    assert len(layout) == int(keys.replace(",", ""))
    distinct = (np.prod(shape, dtype=int) for key, (shape, _) in layout.items() if key not in shared)
    assert sum(distinct) == int(numbers.replace(",", ""))


def test_random_weights_match_the_layout_and_are_reproducible():
    layout, first, second = layouts.load("minilm"), layouts.random("minilm"), layouts.random("minilm")

    assert set(first) == set(layout)
    assert all(first[key].shape == shape and first[key].dtype == dtype for key, (shape, dtype) in layout.items())
    key = "encoder.layer.3.intermediate.dense.weight"
    np.testing.assert_array_equal(first[key], second[key])
    assert not np.array_equal(first[key], layouts.random("minilm", seed=1)[key])


def test_random_weights_share_aliases_and_have_positive_variances():
    weights = layouts.random("maskdino_r50_instance")
    box = "sem_seg_head.predictor.{}layers.1.weight"

    np.testing.assert_array_equal(weights[box.format("_bbox_embed.")], weights[box.format("decoder.bbox_embed.8.")])
    assert not np.array_equal(weights[box.format("_bbox_embed.")], weights[box.format("mask_embed.")])
    assert weights["backbone.res2.0.conv1.norm.running_var"].min() > 0


def test_layout_ranges_with_steps_and_aliases_are_expanded():
    assert layouts._names("a.{0..1}.b.{1..5..2}") == ["a.0.b.1", "a.0.b.3", "a.0.b.5", "a.1.b.1", "a.1.b.3", "a.1.b.5"]
    shared = layouts.aliases("maskdino_r50_instance")
    assert (
        shared["sem_seg_head.predictor.bbox_embed.4.layers.2.bias"]
        == "sem_seg_head.predictor._bbox_embed.layers.2.bias"
    )
