"""`make_backbone`: every name of a recipe makes an encoder of its own."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mqformer_jax.config import BACKBONES, base
from mqformer_jax.models.backbone import Backbone, make_backbone
from mqformer_jax.models.convnet import ConvNet
from mqformer_jax.models.efficientnet import EfficientNetLite0
from mqformer_jax.models.resnet import ResNet
from mqformer_jax.models.swin import Swin

CLASSES = {"resnet": ResNet, "swin": Swin, "efficientnet": EfficientNetLite0, "convnet": ConvNet}


def make(name: str) -> Backbone:
    config = base().model.backbone
    config.name = name
    return nnx.eval_shape(lambda: make_backbone(config, "none", nnx.Rngs(0), jnp.float32))


def test_every_backbone_name_builds_a_distinct_encoder():
    shapes = {}
    for name in BACKBONES:
        backbone = make(name)
        (kind,) = (kind for start, kind in CLASSES.items() if name.startswith(start))
        assert type(backbone) is kind and isinstance(backbone, Backbone)
        assert all(stride & (stride - 1) == 0 for stride in backbone.channels)
        shapes[name] = tuple(leaf.shape for leaf in jax.tree.leaves(nnx.state(backbone)))
    assert len(set(shapes.values())) == len(BACKBONES)


def test_unknown_backbone_name_is_rejected():
    with pytest.raises(ValueError, match="backbone 'vgg16' is unknown"):
        make("vgg16")
