"""ResNet against Hugging Face's with random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mqformer_jax.models.resnet import ResNet


def random_torch_resnet():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(layer_type="bottleneck", depths=[3, 4, 6, 3], downsample_in_bottleneck=False)
    model = transformers.ResNetModel(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


def copy_weights(ours: ResNet, theirs) -> None:
    weights = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}

    def copy(target, *prefixes):
        """Several prefixes are the blocks of a stack."""
        join = np.stack if len(prefixes) > 1 else lambda a: a[0]
        read = lambda key: join([weights[f"{p}.{key}"] for p in prefixes])
        target.conv.kernel[...] = jnp.asarray(np.moveaxis(read("convolution.weight"), (-2, -1), (-4, -3)).swapaxes(-1, -2))
        names = dict(scale="weight", bias="bias", mean="running_mean", var="running_var")
        for name, key in names.items():
            getattr(target.norm, name)[...] = jnp.asarray(read(f"normalization.{key}"))

    copy(ours.stem, "embedder.embedder")
    for s, stage in enumerate(ours.stages):
        at = lambda block, part: f"encoder.stages.{s}.layers.{block}.{part}"
        copy(stage.first.shortcut, at(0, "shortcut"))
        for c in range(3):
            copy(getattr(stage.first, f"conv{c + 1}"), at(0, f"layer.{c}"))
            rest = range(1, (3, 4, 6, 3)[s])
            copy(getattr(stage.rest, f"conv{c + 1}"), *(at(block, f"layer.{c}") for block in rest))


def blank(depth: int, **kwargs) -> ResNet:
    """Built under jit: one compilation instead of one an operation."""
    build = jax.jit(lambda: nnx.split(ResNet(depth, rngs=nnx.Rngs(0), **kwargs)))
    return nnx.merge(*build())


def test_values_and_gradients_are_those_of_torch():
    theirs = random_torch_resnet()
    import torch

    ours = blank(50)
    copy_weights(ours, theirs)
    image = np.random.default_rng(0).normal(size=(1, 3, 64, 32)).astype(np.float32)
    expected = theirs(torch.tensor(image), output_hidden_states=True).hidden_states[1:]
    sum((e**2).mean() for e in expected).backward()

    graph, params, frozen = nnx.split(ours, nnx.Param, ...)

    @jax.jit
    def run(params):
        def loss(params):
            features = nnx.merge(graph, params, frozen)(jnp.asarray(image.transpose(0, 2, 3, 1)))
            return sum((f**2).mean() for f in features.values()), features

        (_, features), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return features, gradient["stem"]["conv"]["kernel"], gradient["stages"][2]["rest"]["conv2"]["conv"]["kernel"]

    features, stem, rest = run(params)
    for (stride, ours_at), theirs_at in zip(features.items(), expected):
        theirs_at = theirs_at.detach().numpy().transpose(0, 2, 3, 1)
        assert ours_at.shape == (1, 64 // stride, 32 // stride, ResNet.channels[stride])
        np.testing.assert_allclose(ours_at, theirs_at, atol=1e-4 * np.abs(theirs_at).max())
    parameters = dict(theirs.named_parameters())
    close_to(stem, parameters["embedder.embedder.convolution.weight"].grad)
    close_to(rest[1], parameters["encoder.stages.2.layers.2.layer.1.convolution.weight"].grad)


def close_to(ours, theirs) -> None:
    theirs = theirs.numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_the_statistics_are_no_parameters():
    graph, state = jax.eval_shape(lambda: nnx.split(ResNet(101, rngs=nnx.Rngs(0))))
    params, frozen = nnx.filter_state(state, nnx.Param), nnx.filter_state(state, nnx.Not(nnx.Param))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(params) + count(frozen) // 2 == 44_549_160 - 2_049_000  # torchvision's ResNet-101 without its classifier


def test_the_stride_may_sit_in_the_first_1x1():
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
