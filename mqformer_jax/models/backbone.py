"""Image encoders behind one interface, so that another one is one file and one line here."""

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
    """What the model asks of an image encoder.

    channels: width of its feature at each stride it offers. mean, std: of its pixels, RGB, 0 to 255.
    """

    channels: dict[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(
        self, image: Float[Array, "b h w 3"], keys: Key[Array, " b"] | None = None
    ) -> dict[int, Float[Array, "b _h _w _c"]]:
        """image: normalized. keys: of the randomness of training (drop path), one an image; None in evaluation. Returns
        {stride: feature}.
        """
        ...


def make_backbone(config: ConfigDict, remat: str, rngs: nnx.Rngs, dtype: DTypeLike) -> Backbone:
    """The image encoder of `config.model.backbone`. remat: of Swin's blocks, see `layers.scan_layers`."""
    name = config.name
    if name.startswith("resnet"):
        return ResNet(int(name.removeprefix("resnet")), stride_in_1x1=config.stride_in_1x1, rngs=rngs, dtype=dtype)
    if name.startswith("swin"):
        return Swin(name.removeprefix("swin_"), config.window, config.drop_path, remat, rngs=rngs, dtype=dtype)
    if name == "efficientnet_lite0":
        return EfficientNetLite0(rngs=rngs, dtype=dtype)
    return ConvNet(tuple(config.widths), rngs=rngs, dtype=dtype)
