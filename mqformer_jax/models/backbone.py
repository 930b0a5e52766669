"""The interface of all image encoders, and `make_backbone`. CONTRIBUTING.md explains how to add an encoder."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Key
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.models.convnet import ConvNet
from mqformer_jax.models.efficientnet import EfficientNetLite0
from mqformer_jax.models.resnet import ResNet
from mqformer_jax.models.swin import Swin


@runtime_checkable
class Backbone(Protocol):
    """The interface of an image encoder.

    channels: {stride: number of channels} of the feature maps. Strides are powers of two and include
    `config.model.mask_stride` and the first of `config.model.strides`. The pixel decoder computes the coarser levels
    that the encoder lacks. mean, std: per-channel statistics that normalize RGB pixels of 0 to 255.

    For a new encoder, check three tables that match the paths of its parameters (`backbone/...`): `NO_DECAY` in
    training/optimizer.py (norms and position tables), `SHARDING_RULES` in config.py (kernels), and `MEANING` in
    training/warm_start.py (config fields that change what weights mean, but not their shapes).
    """

    channels: dict[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(
        self, image: Float[Array, "b h w 3"], keys: Key[Array, " b"] | None = None
    ) -> dict[int, Float[Array, "b _h _w _c"]]:
        """Return the feature maps as {stride: feature}.

        image: normalized. keys: one per image, for drop path in training; None in evaluation.
        """
        ...


def make_backbone(config: ConfigDict, remat: str, rngs: nnx.Rngs, dtype: DTypeLike) -> Backbone:
    """Return the image encoder that `config` describes.

    config: `config.model.backbone` or `config.matting.backbone`. remat: the activations that Swin stores for the
    backward pass (see `layers.scan_layers`); all other encoders ignore it. Raises ValueError if the name is unknown.
    """
    name = config.name
    if name.startswith("resnet"):
        return ResNet(int(name.removeprefix("resnet")), stride_in_1x1=config.stride_in_1x1, rngs=rngs, dtype=dtype)
    if name.startswith("swin"):
        return Swin(name.removeprefix("swin_"), config.window, config.drop_path, remat, rngs=rngs, dtype=dtype)
    if name == "efficientnet_lite0":
        return EfficientNetLite0(rngs=rngs, dtype=dtype)
    if name == "convnet":
        return ConvNet(tuple(config.widths), rngs=rngs, dtype=dtype)
    raise ValueError(
        f"backbone {name!r} is unknown: set config.model.backbone.name (for matting, config.matting.backbone.name) "
        "to resnet50, resnet101, swin_t, swin_s, swin_b, swin_l, efficientnet_lite0 or convnet, "
        f"or add a new encoder to make_backbone in {__name__}."
    )
