"""Convert ResNet-50 and -101 of torchvision, timm, Hugging Face and detectron2.

There are three naming schemes for the same tensors: torchvision and timm share one. Weights do not show which
convolution of a block has stride 2. In all three schemes, it is the 3x3 convolution (`stride_in_1x1=False`). In
Microsoft's first weights (detectron2's "MSRA/R-50.pkl"), it is the 1x1 convolution. They cannot be converted.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mqformer_jax import config as recipe
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, batch_norm, conv, is_model, prefix_of
from mqformer_jax.models.resnet import BLOCKS

# weights of the last convolution of a bottleneck block; {} are the numbers of its stage and block
TORCHVISION = "layer{}.{}.conv3.weight"
HUGGING_FACE = "encoder.stages.{}.layers.{}.layer.2.convolution.weight"
DETECTRON2 = "res{}.{}.conv3.weight"
MSRA = {"conv1_w", "res2_0_branch2a_w"}  # names in Microsoft's first weights
IGNORED = {
    r"num_batches_tracked$": "a training counter",
    r"(^|\.)(fc|classifier\.1)\.": "the ImageNet classifier",
}


def torchvision_entries(ours: str, theirs: str, depth: int) -> list[Entry]:
    """Return the conversion rules for the ResNets of torchvision and timm.

    ours: path of the backbone in the model. theirs: prefix of the tensor names, e.g. "" or "backbone.". depth: 50 or
    101.
    """

    def part(stage: int, block: int, name: str) -> tuple[str, str]:
        where = f"{theirs}layer{stage + 1}.{block}."
        if name == "shortcut":
            return where + "downsample.0", where + "downsample.1"
        return where + name, where + name.replace("conv", "bn")

    return _entries(ours, depth, (f"{theirs}conv1", f"{theirs}bn1"), part)


def hugging_face_entries(ours: str, theirs: str, depth: int) -> list[Entry]:
    """Return the conversion rules for Hugging Face's `ResNetModel` and `ResNetBackbone`.

    ours, depth: see `torchvision_entries`. theirs: prefix of the tensor names, e.g. "" or "resnet.".
    """

    def part(stage: int, block: int, name: str) -> tuple[str, str]:
        inner = "shortcut" if name == "shortcut" else f"layer.{int(name[-1]) - 1}"
        where = f"{theirs}encoder.stages.{stage}.layers.{block}.{inner}."
        return where + "convolution", where + "normalization"

    stem = f"{theirs}embedder.embedder."
    return _entries(ours, depth, (stem + "convolution", stem + "normalization"), part)


def detectron2_entries(ours: str, theirs: str, depth: int) -> list[Entry]:
    """Return the conversion rules for detectron2's ResNet, which Mask2Former and Mask DINO also use.

    ours, depth: see `torchvision_entries`. theirs: prefix of the tensor names ("backbone." in these two models).
    """

    def part(stage: int, block: int, name: str) -> tuple[str, str]:
        where = f"{theirs}res{stage + 2}.{block}.{name}"
        return where, where + ".norm"

    return _entries(ours, depth, (f"{theirs}stem.conv1", f"{theirs}stem.conv1.norm"), part)


def depth_of(shapes: Shapes, bottleneck: str) -> int:
    """Return the depth of a ResNet, 50 or 101, from its number of blocks per stage. Raises ValueError for other depths.

    bottleneck: name of a tensor that every block has, with {} for the numbers of the stage and the block.
    """
    pattern = re.compile(re.escape(bottleneck).replace(r"\{\}", r"(\d+)"))
    found = [(int(match[1]), int(match[2])) for key in shapes if (match := pattern.fullmatch(key))]
    blocks = tuple(
        1 + max(number for stage, number in found if stage == s) for s in sorted({stage for stage, _ in found})
    )
    for depth, expected in BLOCKS.items():
        if blocks == expected:
            return depth
    known = " and ".join(f"ResNet-{depth} {expected}" for depth, expected in BLOCKS.items())
    seen = f"{blocks} bottlenecks per stage" if blocks else "no bottlenecks, like ResNet-18 and -34"
    raise ValueError(
        f"this ResNet has {seen} (counted by the tensors {bottleneck.replace('{}', '?')}); "
        f"only {known} can be converted."
    )


def _entries(
    ours: str, depth: int, stem: tuple[str, str], part: Callable[[int, int, str], tuple[str, str]]
) -> list[Entry]:
    """Return the conversion rules of a ResNet.

    ours, depth: see `torchvision_entries`. stem: tensor names of the stem's convolution and norm. part: a function that
    returns the tensor names of a convolution and its norm for a stage, a block and a name ("conv1" to "conv3", or
    "shortcut"). Stages and blocks are counted from 0.
    """
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


def _family(
    name: str, originals: str, make: Callable[[str, str, int], list[Entry]], bottleneck: str, keys: tuple[str, ...]
) -> Family:
    """Return the family of ResNet checkpoints with one naming scheme.

    make: returns the conversion rules. bottleneck: see `depth_of`. keys: names of tensors that identify the scheme. A
    checkpoint must have all of them with the same prefix, which may be empty. Only one of its tensor names may end in
    the first key, because this name determines the prefix.
    """

    def recognizes(shapes: Shapes) -> bool:
        return (not is_model(shapes) and prefix_of(shapes, *keys) is not None) or (
            name == "d2_resnet" and MSRA <= shapes.keys()
        )

    def plan(shapes: Shapes) -> Plan:
        if MSRA <= shapes.keys():
            raise ValueError(
                "conv1_w: these are Microsoft's Caffe2 weights, which expect BGR pixels of another scale; "
                "use detectron2's torchvision/R-50.pkl or R-101.pkl instead."
            )
        prefix = prefix_of(shapes, *keys) or ""
        depth = depth_of(shapes, prefix + bottleneck)
        config = recipe.base()
        config.model.backbone.update(name=f"resnet{depth}", stride_in_1x1=False)
        return Plan(config, "backbone", make("backbone", prefix, depth), ignored=IGNORED)

    return Family(name, originals, recognizes, plan)


FAMILIES = (
    _family(
        "resnet",
        "torchvision's and timm's ResNet-50 and -101",
        torchvision_entries,
        TORCHVISION,
        ("layer1.0.conv1.weight", "conv1.weight", "bn1.weight"),
    ),
    _family(
        "hf_resnet",
        "Hugging Face's ResNetModel, ResNetBackbone and ResNetForImageClassification, 50 and 101 layers",
        hugging_face_entries,
        HUGGING_FACE,
        ("embedder.embedder.convolution.weight",),
    ),
    _family(
        "d2_resnet",
        "detectron2's ImageNetPretrained/torchvision/R-50.pkl and R-101.pkl",
        detectron2_entries,
        DETECTRON2,
        ("res2.0.conv1.weight", "stem.conv1.weight"),
    ),
)
