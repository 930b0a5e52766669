"""Damaged checkpoints of every family: whatever a file lacks, its plan is made or refused in one line."""

from __future__ import annotations

import dataclasses
import logging

import jax
import layouts
import numpy as np
import pytest

from mqformer_jax.config import base
from mqformer_jax.convert.families import FAMILIES, find_family
from mqformer_jax.convert.rules import Entry, Plan, apply, count, invert, linear, packed, packing, shape_of


def damaged(shapes: dict[str, tuple[int, ...]], key: str) -> list[dict[str, tuple[int, ...]]]:
    """Without the key, as a scalar, a dimension short, and a dimension too many."""
    rest = {name: shape for name, shape in shapes.items() if name != key}
    return [rest, *(shapes | {key: shape} for shape in ((), shapes[key][1:], (*shapes[key], 1)))]


def planned(shapes: dict[str, tuple[int, ...]]) -> Plan | str:
    """The plan, or the error's text."""
    try:
        return find_family(shapes, None, "the file").plan(shapes)
    except ValueError as e:
        return str(e)


@pytest.mark.slow
@pytest.mark.parametrize("name", layouts.NAMES)
def test_damaged_checkpoint_is_planned_or_gives_one_line_error(name):
    """Keys of the first layers, where sizes are read, and some of the others."""
    shapes = {key: shape for key, (shape, _) in layouts.load(name).items()}
    read = list(dict.fromkeys(entry.theirs for entry in planned(shapes).entries if entry.theirs in shapes))
    first = [key for key in read if all(part in ("0", "1") for part in key.split(".") if part.isdigit())]
    refused = 0
    for key in {*first[:: 1 + len(first) // 80], *first[:4], *read[:: 1 + len(read) // 20]}:
        for file in damaged(shapes, key):
            outcome = planned(file)
            assert isinstance(outcome, Plan) or (outcome and "\n" not in outcome), (key, outcome)
            refused += not isinstance(outcome, Plan)
    assert refused


@pytest.mark.parametrize(
    "name, key",
    [
        ("maskdino_r50_instance", "sem_seg_head.pixel_decoder.input_proj.0.0.weight"),
        ("maskdino_r50_instance", "sem_seg_head.pixel_decoder.input_proj.3.0.weight"),
        ("maskdino_r50_instance", "sem_seg_head.predictor.class_embed.weight"),
        ("openseed_swint", "sem_seg_head.pixel_decoder.input_proj.2.0.weight"),
        ("mask2former_swinl", "backbone.layers.0.blocks.0.attn.relative_position_bias_table"),
        ("hf_swin_t", "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"),
        ("openai_clip_b32", "text_projection"),
        ("minilm", "embeddings.word_embeddings.weight"),
    ],
)
def test_scalar_in_place_of_weight_matrix_error_names_the_tensor(name, key):
    shapes = {other: shape for other, (shape, _) in layouts.load(name).items()} | {key: ()}
    with pytest.raises(ValueError) as error:
        find_family(shapes, None, name).plan(shapes)
    assert str(error.value).startswith(f"{key} has shape ()") and str(error.value).endswith("give the complete file.")


def test_missing_backbone_is_reported():
    shapes = {
        key: shape
        for key, (shape, _) in layouts.load("maskdino_r50_instance").items()
        if not key.startswith("backbone.")
    }
    with pytest.raises(ValueError, match=r"^backbone\.\* is missing"):
        FAMILIES["maskdino"].plan(shapes)


def test_layer_count_rejects_gaps_and_nonzero_start():
    layers = {f"a.layers.{i}.weight": (3,) for i in range(12)}
    assert count(layers, "a.layers.{}.") == 12
    for file, absent in [
        ({}, 0),
        ({k: v for k, v in layers.items() if ".7." not in k}, 7),
        ({"a.layers.1.weight": (3,)}, 0),
    ]:
        with pytest.raises(ValueError, match=rf"^a\.layers\.{absent}\.\* is missing"):
            count(file, "a.layers.{}.")
    with pytest.raises(ValueError, match=r"^x has shape \(3,\): a tensor with 2 dimensions is expected"):
        shape_of({"x": (3,)}, "x", 2)


def small() -> tuple[Plan, dict[str, np.ndarray], dict[str, jax.ShapeDtypeStruct]]:
    """A plan with all that entries can say, tensors for it, and our leaves."""
    entries = [
        Entry("table", "table"), Entry("table", "copy"),
        *linear("layers/fc", "fc.0", 0), *linear("layers/fc", "fc.1", 1),
        *packed(["q", "k", "v"], "in_", 2), *packing("both", ["left", "right"], 3),
    ]  # fmt: skip
    draw = np.random.default_rng(0).normal
    sizes = {
        "table": (4, 5),
        "fc.0.weight": (3, 2),
        "fc.0.bias": (3,),
        "fc.1.weight": (3, 2),
        "fc.1.bias": (3,),
        "in_weight": (6, 2),
    }
    sizes |= {"in_bias": (6,), "left.weight": (3, 2), "left.bias": (3,), "right.weight": (3, 2), "right.bias": (3,)}
    tensors = {key: draw(size=shape).astype(np.float32) for key, shape in sizes.items()}
    tensors["copy"] = tensors["table"]
    ours = {
        "table": (4, 5),
        "layers/fc/kernel": (2, 2, 3),
        "layers/fc/bias": (2, 3),
        "both/kernel": (2, 6),
        "both/bias": (6,),
    }
    ours |= {f"{name}/kernel": (2, 2) for name in "qkv"} | {f"{name}/bias": (2,) for name in "qkv"} | {"one": (2,)}
    plan = Plan(base(), "", entries, {"one": np.ones(2)})
    return plan, tensors, {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in ours.items()}


def test_inverted_plan_restores_the_original_tensors():
    plan, tensors, ours = small()
    values, report = apply(plan, tensors, ours)
    assert report.complete, report.table()
    back = invert(plan, values, {key: value.shape for key, value in tensors.items()})
    assert set(back) == set(tensors)
    for key, value in back.items():
        np.testing.assert_array_equal(value, tensors[key])
    del values["k/kernel"]
    assert set(tensors) - set(invert(plan, values)) == {"in_weight"}  # no tensor is made of a part of its rows


@pytest.mark.parametrize(
    "path, shape, told",
    [
        ("table", (3, 5), r"^table has shape \(3, 5\), but table needs \(4, 5\)"),
        ("layers/fc/kernel", (3, 2, 3), r"^layers/fc/kernel has shape \(3, 2, 3\), .* \(2, 2, 3\)"),  # deeper
        ("layers/fc/bias", (1, 3), r"^layers/fc/bias has shape \(1, 3\), .* \(2, 3\)"),
        ("both/bias", (9,), r"^both/bias has shape \(9,\), .* \(6,\)"),
        ("q/kernel", (2, 4), r"^q/kernel has shape \(2, 4\), .* \(2, 2\)"),
        (
            "one",
            (2,),
            r"^parameter one was changed by training, .* has no tensor for it: export without --like",
        ),
    ],
)
def test_invert_rejects_values_that_do_not_fit_the_layout(path, shape, told):
    plan, tensors, ours = small()
    values, _ = apply(plan, tensors, ours)
    with pytest.raises(ValueError, match=told):
        invert(plan, values | {path: np.zeros(shape, np.float32)}, {key: value.shape for key, value in tensors.items()})


def test_invert_without_shapes_rejects_values_with_too_few_layers():
    plan, tensors, ours = small()
    values, _ = apply(plan, tensors, ours)
    with pytest.raises(ValueError, match=r"^layers/fc/kernel \(1, 2, 3\) has no layers/fc/kernel\[1\]"):
        invert(plan, values | {"layers/fc/kernel": np.zeros((1, 2, 3), np.float32)})


def test_nan_tensors_are_converted_with_a_warning(caplog):
    plan, tensors, ours = small()
    for key in ("table", "fc.1.bias"):
        tensors[key].flat[0] = np.nan
    with caplog.at_level(logging.WARNING):
        values, report = apply(plan, tensors, ours)
    assert report.complete and np.isnan(values["table"]).sum() == 1
    assert [record.getMessage() for record in caplog.records] == [
        "these converted tensors contain NaN or infinity: table, copy, fc.1.bias"
    ]


@pytest.mark.parametrize("key, shape", [("table", ()), ("in_weight", ()), ("fc.0.weight", (3,)), ("left.bias", (3, 3))])
def test_tensors_with_wrong_number_of_dimensions_are_reported(key, shape):
    plan, tensors, ours = small()
    plan = dataclasses.replace(
        plan, entries=[*plan.entries, Entry("image", "filter", "conv"), Entry("turned", "turned", order=np.arange(2))]
    )
    ours |= {"image": jax.ShapeDtypeStruct((3, 3, 2, 2), np.float32), "turned": jax.ShapeDtypeStruct((2,), np.float32)}
    wrong = {
        key: np.zeros(shape, np.float32),
        "filter": np.zeros((2, 2, 3), np.float32),
        "turned": np.ones((), np.float32),
    }
    _, report = apply(plan, tensors | wrong, ours)
    for name in wrong:
        assert any(line.startswith(f"{name} ") for line in report.mismatched), name
