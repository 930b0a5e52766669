"""ResNets by three names: the same leaves, every tensor placed, and the exact way back."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mqformer_jax.convert.resnet import FAMILIES
from mqformer_jax.convert.rules import apply, invert, leaves
from mqformer_jax.models.resnet import BLOCKS, ResNet

families = {family.name: family for family in FAMILIES}


def torchvision(depth: int) -> dict[str, tuple[int, ...]]:
    """torchvision's names and shapes."""
    shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64), "fc.weight": (1000, 2048), "fc.bias": (1000,)}
    inputs = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        width = 64 << stage
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            sizes = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for k, size in enumerate(sizes, 1):
                shapes |= {f"{at}.conv{k}.weight": size, **norm(f"{at}.bn{k}", size[0])}
            if block == 0:
                shapes |= {
                    f"{at}.downsample.0.weight": (4 * width, inputs, 1, 1),
                    **norm(f"{at}.downsample.1", 4 * width),
                }
            inputs = 4 * width
    return shapes


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    vectors = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return vectors | {f"{name}.num_batches_tracked": ()}


def detectron2(depth: int) -> dict[str, tuple[int, ...]]:
    """torchvision's weights as detectron2's conversion script renames them."""

    def rename(key: str) -> str:
        key = key if key.startswith("layer") else f"stem.{key}"
        for k in (1, 2, 3, 4):
            key = key.replace(f"layer{k}.", f"res{k + 1}.").replace(f"bn{k}.", f"conv{k}.norm.")
        return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")

    return {rename(key): shape for key, shape in torchvision(depth).items()}


def hugging_face(depth: int, name: str = "ResNetBackbone") -> dict[str, tuple[int, ...]]:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = getattr(transformers, name)(
            transformers.ResNetConfig(layer_type="bottleneck", depths=list(BLOCKS[depth]))
        )
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


LAYOUTS = dict(resnet=torchvision, d2_resnet=detectron2, hf_resnet=hugging_face)


def backbone(depth: int) -> dict[str, jax.ShapeDtypeStruct]:
    _, state = jax.eval_shape(lambda: nnx.split(ResNet(depth, rngs=nnx.Rngs(0))))
    return leaves({"backbone": nnx.to_pure_dict(state)})


def numbers(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_mapped_and_round_trips_exactly(name):
    tensors = numbers(LAYOUTS[name](50))
    plan = families[name].plan({key: value.shape for key, value in tensors.items()})
    values, report = apply(plan, tensors, backbone(50))
    assert report.complete, report.table(10)
    assert plan.part == "backbone" and plan.config.model.backbone.name == "resnet50"
    assert all(key.split(":")[0].endswith("num_batches_tracked") or "fc." in key for key in report.ignored)
    back = invert(plan, values)
    assert set(back) == {key for key in tensors if "num_batches" not in key and "fc." not in key}
    for key, value in back.items():
        np.testing.assert_array_equal(value, tensors[key])


@pytest.mark.parametrize("depth", [50, 101])
def test_all_layouts_map_to_the_same_parameters(depth):
    plans = [families[name].plan(layout(depth)) for name, layout in LAYOUTS.items()]
    places = [[dataclasses.replace(entry, theirs="") for entry in plan.entries] for plan in plans]
    assert places[0] == places[1] == places[2]
    assert {entry.ours for entry in places[0]} == set(backbone(depth))
    assert all(plan.config.model.backbone.name == f"resnet{depth}" for plan in plans)
    assert len(places[0]) == len(
        [key for key in torchvision(depth) if not key.startswith("fc") and "num_batches" not in key]
    )


@pytest.mark.parity
def test_each_layout_is_recognized_only_by_its_family():
    layouts = [torchvision(50), detectron2(50), hugging_face(50), hugging_face(50, "ResNetForImageClassification")]
    owners = [[name for name, family in families.items() if family.recognizes(layout)] for layout in layouts]
    assert owners == [["resnet"], ["d2_resnet"], ["hf_resnet"], ["hf_resnet"]]


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "net.backbone."])
@pytest.mark.parametrize("name", LAYOUTS)
def test_name_prefixes_from_wrapper_models_are_accepted(name, prefix):
    layout = LAYOUTS[name](50)
    prefixed = {prefix + key: shape for key, shape in layout.items()}
    assert [n for n, family in families.items() if family.recognizes(prefixed)] == [name]
    expected, found = families[name].plan(layout).entries, families[name].plan(prefixed).entries
    assert found == [dataclasses.replace(entry, theirs=prefix + entry.theirs) for entry in expected]


def test_whole_models_are_not_recognized_as_resnet_backbones():
    for more in (
        "sem_seg_head.predictor.decoder_norm.weight",
        "model.pixel_level_module.decoder.level_embed",
        "visual.proj",
    ):
        shapes = {f"backbone.{key}": shape for key, shape in detectron2(50).items()} | torchvision(50) | {more: (256,)}
        assert not any(family.recognizes(shapes) for family in families.values())


@pytest.mark.parity
def test_hugging_face_classifier_is_reported_as_ignored():
    shapes = hugging_face(50, "ResNetForImageClassification")
    plan = families["hf_resnet"].plan(shapes)
    assert all(entry.theirs in shapes for entry in plan.entries)
    _, report = apply(plan, {"classifier.1.weight": np.zeros((2, 2))}, {})
    assert report.ignored == ["classifier.1.weight: the ImageNet classifier"]


def test_unsupported_resnet_depths_are_rejected():
    shapes = {key: shape for key, shape in torchvision(50).items() if not key.startswith("layer3.5.")}
    with pytest.raises(ValueError, match=r"\(3, 4, 5, 3\) bottlenecks per stage .*; only ResNet-50 .* and ResNet-101"):
        families["resnet"].plan(shapes)
    basic = {key: shape for key, shape in torchvision(50).items() if "conv3" not in key}
    with pytest.raises(
        ValueError,
        match=r"no bottlenecks, like ResNet-18 and -34 \(counted by the tensors layer\?\.\?\.conv3\.weight\)",
    ):
        families["resnet"].plan(basic)


def test_weights_for_bgr_input_are_rejected():
    msra = {"conv1_w": (64, 3, 7, 7), "res2_0_branch2a_w": (64, 64, 1, 1)}
    assert families["d2_resnet"].recognizes(msra)
    with pytest.raises(ValueError, match="BGR"):
        families["d2_resnet"].plan(msra)
