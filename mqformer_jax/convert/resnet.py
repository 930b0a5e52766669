"""ResNet-50 and -101 of torchvision, timm, Hugging Face and detectron2: three ways to name the same tensors.

Weights do not say where a stage's stride sits; all three put it into the 3x3 (`stride_in_1x1=False`). Only Microsoft's first
weights, which detectron2 offers as "MSRA/R-50.pkl", have it in the 1x1.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mqformer_jax import config as recipe
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, batch_norm, conv
from mqformer_jax.models.resnet import BLOCKS

IGNORED = {r"num_batches_tracked$": "a counter of training", r"(^|\.)(fc|classifier\.1)\.": "the classifier of ImageNet"}


def torchvision_entries(ours: str, theirs: str, depth: int) -> list[Entry]:
    """The backbone at path `ours` from keys that follow `theirs` ("" or "backbone."), as torchvision and timm name them."""

    def part(stage: int, block: int, name: str) -> tuple[str, str]:
        where = f"{theirs}layer{stage + 1}.{block}."
        if name == "shortcut":
            return where + "downsample.0", where + "downsample.1"
        return where + name, where + name.replace("conv", "bn")

    return _entries(ours, depth, (f"{theirs}conv1", f"{theirs}bn1"), part)


def hugging_face_entries(ours: str, theirs: str, depth: int) -> list[Entry]:
    """The same of Hugging Face's `ResNetModel` and `ResNetBackbone`; `theirs`: what their names start with ("" or "resnet.")."""

    def part(stage: int, block: int, name: str) -> tuple[str, str]:
        inner = "shortcut" if name == "shortcut" else f"layer.{int(name[-1]) - 1}"
        where = f"{theirs}encoder.stages.{stage}.layers.{block}.{inner}."
        return where + "convolution", where + "normalization"

    stem = f"{theirs}embedder.embedder."
    return _entries(ours, depth, (stem + "convolution", stem + "normalization"), part)


def detectron2_entries(ours: str, theirs: str, depth: int) -> list[Entry]:
    """The same of detectron2's ResNet, and so of Mask2Former's and Mask DINO's backbones (`theirs` = "backbone.")."""

    def part(stage: int, block: int, name: str) -> tuple[str, str]:
        where = f"{theirs}res{stage + 2}.{block}.{name}"
        return where, where + ".norm"

    return _entries(ours, depth, (f"{theirs}stem.conv1", f"{theirs}stem.conv1.norm"), part)


def depth_of(shapes: Shapes, block: str) -> int:
    """50 or 101, by the blocks of each stage. block: a regex of a key of every bottleneck, with groups for its stage and number."""
    found = [match.groups() for key in shapes if (match := re.match(block, key))]
    stages = sorted({int(stage) for stage, _ in found})
    blocks = tuple(1 + max(int(number) for stage, number in found if int(stage) == s) for s in stages)
    for depth, expected in BLOCKS.items():
        if blocks == expected:
            return depth
    raise ValueError(
        f"keys like {block} show a ResNet with {blocks or 'no'} bottlenecks a stage; "
        f"only {' and '.join(f'ResNet-{depth} {expected}' for depth, expected in BLOCKS.items())} can be converted."
    )


def _entries(ours: str, depth: int, stem: tuple[str, str], part: Callable[[int, int, str], tuple[str, str]]) -> list[Entry]:
    """part(stage, block, name): keys of a convolution and of its BatchNorm; name is conv1, conv2, conv3 or shortcut."""
    entries = _conv_norm(f"{ours}/stem", stem)
    for stage, blocks in enumerate(BLOCKS[depth]):
        for name in ("conv1", "conv2", "conv3", "shortcut"):
            entries += _conv_norm(f"{ours}/stages/{stage}/first/{name}", part(stage, 0, name))
        for block in range(1, blocks):
            for name in ("conv1", "conv2", "conv3"):
                entries += _conv_norm(f"{ours}/stages/{stage}/rest/{name}", part(stage, block, name), block - 1)
    return entries


def _conv_norm(ours: str, theirs: tuple[str, str], index: int | None = None) -> list[Entry]:
    return conv(f"{ours}/conv", theirs[0], index) + batch_norm(f"{ours}/norm", theirs[1], index)


def _plan(depth: int, entries: list[Entry]) -> Plan:
    config = recipe.base()
    config.model.backbone.update(name=f"resnet{depth}", stride_in_1x1=False)
    return Plan(config, "backbone", entries, ignored=IGNORED)


def _torchvision(shapes: Shapes) -> Plan:
    depth = depth_of(shapes, r"layer(\d)\.(\d+)\.conv3\.weight")
    return _plan(depth, torchvision_entries("backbone", "", depth))


def _hugging_face(shapes: Shapes) -> Plan:
    prefix = "resnet." if "resnet.embedder.embedder.convolution.weight" in shapes else ""
    depth = depth_of(shapes, re.escape(prefix) + r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.2\.convolution\.weight")
    return _plan(depth, hugging_face_entries("backbone", prefix, depth))


def _detectron2(shapes: Shapes) -> Plan:
    if "conv1_w" in shapes:
        raise ValueError(
            "conv1_w: Microsoft's Caffe2 weights expect BGR pixels of another scale; take detectron2's torchvision/R-50.pkl or R-101.pkl."
        )
    depth = depth_of(shapes, r"res(\d)\.(\d+)\.conv3\.weight")
    return _plan(depth, detectron2_entries("backbone", "", depth))


FAMILIES = (
    Family(
        "resnet",
        "torchvision's and timm's ResNet-50 and -101",
        lambda shapes: {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= shapes.keys(),
        _torchvision,
    ),
    Family(
        "hf_resnet",
        "Hugging Face's ResNetModel, ResNetBackbone and ResNetForImageClassification, 50 and 101 layers",
        lambda shapes: any(f"{prefix}embedder.embedder.convolution.weight" in shapes for prefix in ("", "resnet.")),
        _hugging_face,
    ),
    Family(
        "d2_resnet",
        "detectron2's ImageNetPretrained/torchvision/R-50.pkl and R-101.pkl",
        lambda shapes: {"stem.conv1.weight", "res2.0.conv1.weight"} <= shapes.keys() or {"conv1_w", "res2_0_branch2a_w"} <= shapes.keys(),
        _detectron2,
    ),
)
