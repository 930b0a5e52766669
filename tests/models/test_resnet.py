"""ResNet against Hugging Face's with random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from originals import assert_agrees, load, state_dict

from mqformer_jax.convert import resnet
from mqformer_jax.models.resnet import ResNet

hf_resnet = next(family for family in resnet.FAMILIES if family.name == "hf_resnet")


def random_torch_resnet(stride_in_1x1: bool):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        layer_type="bottleneck", depths=[3, 4, 6, 3], downsample_in_bottleneck=stride_in_1x1
    )
    model = transformers.ResNetModel(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_values_and_gradients_match_torch(stride_in_1x1):
    theirs = random_torch_resnet(stride_in_1x1)
    import torch

    tensors = state_dict(theirs)
    plan = hf_resnet.plan({key: value.shape for key, value in tensors.items()})
    empty = nnx.merge(*jax.eval_shape(lambda: nnx.split(ResNet(50, stride_in_1x1=stride_in_1x1, rngs=nnx.Rngs(0)))))
    graph, params, frozen = nnx.split(load(empty, plan, tensors), nnx.Param, ...)
    image = torch.randn(1, 3, 64, 32, requires_grad=True)
    expected = theirs(image, output_hidden_states=True).hidden_states[1:]
    sum((e**2).mean() for e in expected).backward()

    @jax.jit
    def run(params, image):
        def loss(params, image):
            features = nnx.merge(graph, params, frozen)(image)
            return sum((f**2).mean() for f in features.values()), features

        (_, features), (gradient, into_image) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, image)
        return (
            features,
            into_image,
            gradient["stem"]["conv"]["kernel"],
            gradient["stages"][2]["rest"]["conv2"]["conv"]["kernel"],
        )

    features, into_image, stem, rest = run(params, jnp.asarray(image.detach().numpy().transpose(0, 2, 3, 1)))
    for (stride, ours_at), theirs_at in zip(features.items(), expected):
        assert ours_at.shape == (1, 64 // stride, 32 // stride, ResNet.channels[stride])
        close("forward", ours_at, theirs_at.detach(), (0, 2, 3, 1))
    parameters = dict(theirs.named_parameters())
    close("gradient", into_image, image.grad, (0, 2, 3, 1))
    close("gradient", stem, parameters["embedder.embedder.convolution.weight"].grad, (2, 3, 1, 0))
    close("gradient", rest[1], parameters["encoder.stages.2.layers.2.layer.1.convolution.weight"].grad, (2, 3, 1, 0))


def close(kind: str, ours, theirs, axes) -> None:
    assert_agrees("ResNet-50 (transformers)", kind, ours, theirs.permute(axes))


def test_batch_norm_statistics_are_not_parameters():
    graph, state = jax.eval_shape(lambda: nnx.split(ResNet(101, rngs=nnx.Rngs(0))))
    params, frozen = nnx.filter_state(state, nnx.Param), nnx.filter_state(state, nnx.Not(nnx.Param))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    # torchvision's ResNet-101 without its classifier
    assert count(params) + count(frozen) // 2 == 44_549_160 - 2_049_000


def test_stride_can_be_in_the_first_1x1_convolution():
    strides = []

    def run(stride_in_1x1: bool):
        net = ResNet(50, stride_in_1x1=stride_in_1x1, rngs=nnx.Rngs(0))
        first = net.stages[1].first
        strides.append([conv.conv.stride for conv in (first.conv1, first.conv2, first.shortcut)])
        return net(jnp.zeros((1, 32, 64, 3)))

    torchvision, microsoft = (jax.eval_shape(lambda m=m: run(m)) for m in (False, True))
    assert torchvision == microsoft
    assert strides == [[1, 2, 2], [2, 1, 2]]


def test_an_unknown_depth_is_refused():
    with pytest.raises(ValueError, match="depth 34"):
        ResNet(34, rngs=nnx.Rngs(0))
