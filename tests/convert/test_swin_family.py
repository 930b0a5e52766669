"""Swin checkpoints under every name they go by."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from flax import nnx

from mqformer_jax.config import base
from mqformer_jax.convert.rules import Plan, apply, invert, leaves
from mqformer_jax.convert.swin import FAMILIES, IGNORED, absent_norms, entries, sizes_of
from mqformer_jax.models.swin import SIZES, Size, Swin

MICROSOFT, HUGGING_FACE = FAMILIES
TINY = Size(32, (2, 2, 4, 2))


def microsoft_shapes(size: Size, window: int, detection: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes as Microsoft's code writes them: of its detection backbone, or of its classifier."""
    layer = lambda name, o, i: {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
    norm = lambda name, c: {f"{name}.weight": (c,), f"{name}.bias": (c,)}
    shapes = {"patch_embed.proj.weight": (size.width, 3, 4, 4), "patch_embed.proj.bias": (size.width,)} | norm(
        "patch_embed.norm", size.width
    )
    for i, depth in enumerate(size.depths):
        c = size.width * 2**i
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}"
            shapes |= norm(f"{at}.norm1", c) | norm(f"{at}.norm2", c)
            shapes |= layer(f"{at}.attn.qkv", 3 * c, c) | layer(f"{at}.attn.proj", c, c)
            shapes |= layer(f"{at}.mlp.fc1", 4 * c, c) | layer(f"{at}.mlp.fc2", c, 4 * c)
            shapes[f"{at}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, c // 32)
            shapes[f"{at}.attn.relative_position_index"] = (window**2, window**2)
            if j % 2 and not detection:
                shapes[f"{at}.attn_mask"] = (4, window**2, window**2)
        if i < 3:
            shapes |= norm(f"layers.{i}.downsample.norm", 4 * c) | {
                f"layers.{i}.downsample.reduction.weight": (2 * c, 4 * c)
            }
        if detection:
            shapes |= norm(f"norm{i}", c)
    return shapes if detection else shapes | norm("norm", 8 * size.width) | layer("head", 1000, 8 * size.width)


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {key: draw.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def our_leaves(size: str | Size, window: int) -> dict[str, jax.ShapeDtypeStruct]:
    state = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.split(Swin(size, window, rngs=nnx.Rngs(0)))[1]))
    return {f"backbone/{path}": leaf for path, leaf in leaves(state).items()}


def tiny_plan(tensors: dict[str, np.ndarray], prefix: str = "") -> Plan:
    """As a family plans, but of a size that no one has published."""
    shapes = {key: value.shape for key, value in tensors.items()}
    return Plan(base(), "backbone", entries(shapes, prefix), absent_norms(shapes, prefix), IGNORED)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A tiny SwinBackbone's tensors under their names in memory, and under those that `save_pretrained` writes."""
    transformers = pytest.importorskip("transformers")
    numpy = pytest.importorskip("safetensors.numpy")
    from originals import state_dict

    stages = [f"stage{k}" for k in range(1, 5)]
    config = transformers.SwinConfig(
        embed_dim=32, depths=list(TINY.depths), num_heads=[1, 2, 4, 8], out_features=stages
    )
    model = transformers.SwinBackbone(config)
    folder = tmp_path_factory.mktemp("swin")
    model.save_pretrained(folder)
    return state_dict(model), numpy.load_file(folder / "model.safetensors")


def assert_exact_round_trip(plan: Plan, tensors: dict[str, np.ndarray], window: int = 7) -> dict[str, np.ndarray]:
    values, report = apply(plan, tensors, our_leaves(TINY, window))
    assert report.complete, report.table()
    back = invert(plan, values)
    known = {entry.theirs for entry in plan.entries}
    assert set(back) == known
    for key in known:
        np.testing.assert_array_equal(back[key], tensors[key])
    return values


@pytest.mark.parametrize("prefix", ["", "model.", "backbone."])
@pytest.mark.parametrize("detection", [True, False])
def test_microsoft_checkpoints_round_trip_exactly(prefix, detection):
    tensors = {prefix + key: value for key, value in random(microsoft_shapes(TINY, 12, detection)).items()}
    values = assert_exact_round_trip(tiny_plan(tensors, prefix), tensors, window=12)
    if detection:
        np.testing.assert_array_equal(values["backbone/norms/2/bias"], tensors[f"{prefix}norm2.bias"])
    else:
        assert (values["backbone/norms/2/scale"] == 1).all() and (values["backbone/norms/2/bias"] == 0).all()


def test_classifier_and_computed_tensors_are_reported_as_ignored():
    tensors = random(microsoft_shapes(TINY, 7, detection=False))
    _, report = apply(tiny_plan(tensors), tensors, our_leaves(TINY, 7))
    told = "\n".join(report.ignored)
    for key in (
        "norm.weight: the classifier's norm",
        "head.bias: the classifier",
        "blocks.1.attn_mask: computed",
        "position_index: computed",
    ):
        assert key in told


@pytest.mark.parity
def test_hugging_face_in_memory_and_on_disk_names_convert_alike(hugging_face):
    in_memory, on_disk = hugging_face
    assert set(in_memory) != set(on_disk)
    first, second = (assert_exact_round_trip(tiny_plan(tensors), tensors) for tensors in (in_memory, on_disk))
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path])


@pytest.mark.parity
def test_hugging_face_swin_converts_under_other_models_prefixes(hugging_face):
    encoder = "model.pixel_level_module.encoder."
    for tensors in hugging_face:
        mask2former = {encoder + key: value for key, value in tensors.items()}
        bare = {key.removeprefix("swin."): value for key, value in tensors.items() if "hidden_states_norms" not in key}
        classifier = {f"swin.{key}": value for key, value in bare.items()} | {"classifier.bias": np.zeros(1000)}
        for moved, prefix in [(mask2former, encoder), (bare, ""), (classifier, "")]:
            assert_exact_round_trip(tiny_plan(moved, prefix), moved)


@pytest.mark.parity
def test_microsoft_and_hugging_face_names_convert_alike(hugging_face):
    theirs, _ = hugging_face
    microsoft = {}
    renames = {
        "swin.": "",
        "encoder.": "",
        "embeddings.norm": "patch_embed.norm",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
    }
    renames |= {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.relative_position_bias": "attn",
        "attention.o_proj": "attn.proj",
    }
    for key, value in theirs.items():
        for old, new in renames.items():
            key = key.replace(old, new)
        key = re.sub(r"hidden_states_norms\.stage(\d)", lambda stage: f"norm{int(stage[1]) - 1}", key)
        microsoft[key] = value
    for key in [key for key in microsoft if "attention.q_proj" in key]:
        parts = [microsoft.pop(key.replace("q_proj", f"{name}_proj")) for name in "qkv"]
        microsoft[key.replace("attention.q_proj", "attn.qkv")] = np.concatenate(parts)
    del microsoft["layernorm.weight"], microsoft["layernorm.bias"]
    assert set(microsoft) == {key for key in microsoft_shapes(TINY, 7) if "index" not in key}
    expected, _ = apply(tiny_plan(theirs), theirs, our_leaves(TINY, 7))
    for path, value in assert_exact_round_trip(tiny_plan(microsoft), microsoft).items():
        np.testing.assert_array_equal(value, expected[path])


def test_timm_checkpoints_with_downsampling_in_next_stage_are_converted():
    tensors = random(microsoft_shapes(TINY, 7, detection=False))
    later = lambda key: re.sub(r"layers\.(\d)\.downsample", lambda stage: f"layers.{int(stage[1]) + 1}.downsample", key)
    timm = {later(key).replace("head.", "head.fc."): value for key, value in tensors.items()}
    expected = assert_exact_round_trip(tiny_plan(tensors), tensors)
    for path, value in assert_exact_round_trip(tiny_plan(timm), timm).items():
        np.testing.assert_array_equal(value, expected[path])


@pytest.mark.parametrize("size, window", [("t", 7), ("s", 7), ("b", 12), ("l", 12)])
def test_plan_has_published_size_and_covers_every_parameter(size, window):
    shapes = microsoft_shapes(SIZES[size], window)
    plan = MICROSOFT.plan({f"model.{key}": shape for key, shape in shapes.items()})
    assert (plan.config.model.backbone.name, plan.config.model.backbone.window) == (f"swin_{size}", window)
    assert {entry.ours for entry in plan.entries} == set(our_leaves(size, window))
    assert {entry.theirs for entry in plan.entries} == {f"model.{key}" for key in shapes if "index" not in key}


def test_each_layout_is_recognized_only_by_its_family():
    microsoft = microsoft_shapes(SIZES["t"], 7)
    on_disk = {
        f"swin.encoder.layers.0.blocks.0.attention.self.{name}": ()
        for name in ("relative_position_bias_table", "query.weight")
    }
    whole_models = [
        {f"backbone.{key}": () for key in microsoft} | {"sem_seg_head.predictor.query_feat.weight": ()},
        {f"model.pixel_level_module.encoder.{key}": () for key in on_disk},
    ]
    for shapes, known in [
        (microsoft, (True, False)),
        (on_disk, (False, True)),
        *((model, (False, False)) for model in whole_models),
    ]:
        assert tuple(family.recognizes(shapes) for family in FAMILIES) == known


def test_invalid_swin_shapes_give_one_line_errors():
    shapes = microsoft_shapes(SIZES["t"], 7)
    first = "layers.0.blocks.0.attn.relative_position_bias_table"
    wrong = [
        ({"conv1.weight": (64, 3, 7, 7)}, f"{first} is missing: .* give the complete file"),
        (
            microsoft_shapes(TINY, 7),
            r"width 32 and depths \(2, 2, 4, 2\) cannot be converted; .* are t: 96, \(2, 2, 6, 2\)",
        ),
        (shapes | {first: (170, 3)}, r"shape \(170, 3\)"),
        (
            {key: shape for key, shape in shapes.items() if "patch_embed" not in key},
            r"patch_embed.proj.weight is missing",
        ),
        (shapes | {first: ()}, rf"{first} has shape \(\)"),
    ]
    for shapes, told in wrong:
        with pytest.raises(ValueError, match=told) as error:
            sizes_of(shapes)
        assert "\n" not in str(error.value)
