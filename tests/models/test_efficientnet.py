"""EfficientNet-Lite0 against the package that its torch weights come with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees, load, state_dict

from mqformer_jax.convert import efficientnet
from mqformer_jax.models.efficientnet import EfficientNetLite0, SameConv, convolve, depthwise


def random_original():
    """Weights that keep the signal's size through all blocks, so that ReLU6 cuts on both sides."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = package.EfficientNet.from_name("efficientnet-lite0").eval()
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor)
        elif name.endswith("running_mean") or name.endswith("bias"):
            tensor.normal_(0, 0.3)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    return model


def features_of(original, image):
    x, features = original._swish(original._bn0(original._conv_stem(image))), []
    for k, block in enumerate(original._blocks):
        x = block(x)
        if k in (2, 4, 10, 15):
            features.append(x)
    return features


@pytest.mark.parity
def test_values_and_gradients_match_the_original():
    theirs = random_original()
    import torch

    tensors = state_dict(theirs)
    shapes = {key: value.shape for key, value in tensors.items()}
    ours = load(nnx.eval_shape(lambda: EfficientNetLite0(rngs=nnx.Rngs(0))), efficientnet.plan(shapes), tensors)
    image = np.random.default_rng(0).normal(size=(2, 3, 64, 32)).astype(np.float32)
    image_there = torch.tensor(image, requires_grad=True)
    expected = features_of(theirs, image_there)
    sum((e**2).mean() for e in expected).backward()

    graph, params, frozen = nnx.split(ours, nnx.Param, ...)

    @jax.jit
    def run(params, image):
        def loss(params, image):
            features = nnx.merge(graph, params, frozen)(image)
            return sum((f**2).mean() for f in features.values()), features

        (_, features), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, image)
        return features, *gradients

    features, gradient, d_image = run(params, jnp.asarray(image.transpose(0, 2, 3, 1)))
    for (stride, here), there in zip(features.items(), expected):
        assert here.shape == (2, 64 // stride, 32 // stride, EfficientNetLite0.channels[stride])
        assert_agrees("EfficientNet-Lite0 (its package)", "forward", here, there.detach().permute(0, 2, 3, 1))
    close = functools.partial(assert_agrees, "EfficientNet-Lite0 (its package)", "gradient")
    close(d_image, image_there.grad.permute(0, 2, 3, 1))
    blocks = theirs._blocks
    for here, there in {
        "stem": theirs._conv_stem,
        "1/depthwise": blocks[1]._depthwise_conv,  # stride 2
        "6/depthwise": blocks[6]._depthwise_conv,
        "11/depthwise": blocks[11]._depthwise_conv,  # 5x5, stride 2
        "12/expand": blocks[12]._expand_conv,
        "15/project": blocks[15]._project_conv,
    }.items():
        block, _, name = here.partition("/")
        kernel = (gradient["blocks"][int(block)][name] if name else gradient["stem"])["conv"]["kernel"]
        close(kernel, there.weight.grad.permute(2, 3, 1, 0))


@pytest.mark.parametrize("size, stride, sides", [(3, 1, (5, 4)), (5, 1, (3, 6)), (3, 2, (8, 5)), (5, 2, (7, 6))])
def test_depthwise_matches_a_grouped_convolution(size, stride, sides):
    draw = np.random.default_rng(0).normal
    x, kernel = (jnp.asarray(draw(size=shape), jnp.float32) for shape in ((2, *sides, 3), (size, size, 1, 3)))

    @jax.jit
    def run(x, kernel):
        outputs = []
        for apply in (depthwise, convolve):
            y, pull_back = jax.vjp(lambda x, kernel, apply=apply: apply(x, kernel, stride), x, kernel)
            outputs.append((y, *pull_back(jnp.cos(y))))
        return outputs

    for here, there in zip(*run(x, kernel)):
        np.testing.assert_allclose(here, there, atol=2e-5)


def test_odd_same_padding_is_added_at_the_end():
    for groups in (1, 3):
        conv = SameConv(3, 3, 3, 2, groups, rngs=nnx.Rngs(0), dtype=jnp.float32)
        conv.kernel[...] = jnp.ones_like(conv.kernel[...]) * groups / 3
        np.testing.assert_allclose(conv(jnp.ones((1, 4, 4, 3)))[0, :, :, 0], [[9, 6], [6, 4]], rtol=1e-6)


def test_batch_norm_statistics_are_not_parameters():
    state = jax.eval_shape(lambda: nnx.state(EfficientNetLite0(rngs=nnx.Rngs(0))))
    count = lambda kind: sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(state, kind)))
    classifier = 1280 * 320 + 2 * 1280 + 1280 * 1000 + 1000
    assert count(nnx.Param) + count(nnx.Not(nnx.Param)) // 2 == 4_652_008 - classifier  # as published


def test_features_have_the_requested_dtype():
    model = lambda image: EfficientNetLite0(rngs=nnx.Rngs(0), dtype=jnp.bfloat16)(image)
    features = jax.eval_shape(model, jax.ShapeDtypeStruct((1, 96, 64, 3), jnp.float32))
    assert {stride: (f.shape, f.dtype) for stride, f in features.items()} == {
        stride: ((1, 96 // stride, 64 // stride, width), jnp.bfloat16)
        for stride, width in EfficientNetLite0.channels.items()
    }
