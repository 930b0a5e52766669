"""Swin against Hugging Face's SwinBackbone with random weights, and what the original leaves to its users."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees, load, state_dict

from mqformer_jax.config import base
from mqformer_jax.convert.rules import Plan, invert, leaves
from mqformer_jax.convert.swin import IGNORED, entries
from mqformer_jax.models.swin import SIZES, Block, Size, Swin, drop_path, resize_table


def random_torch_swin(size: Size, window: int):
    """A SwinBackbone whose every parameter is random, norms and position tables too."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        embed_dim=size.width,
        depths=list(size.depths),
        num_heads=[size.width // 32 * 2**k for k in range(4)],
        window_size=window,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = transformers.SwinBackbone(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def blank(make) -> nnx.Module:
    """A module of shapes only: no compilation."""
    return nnx.merge(*jax.eval_shape(lambda: nnx.split(make(nnx.Rngs(0)))))


def filled(make) -> nnx.Module:
    """A module of random numbers around the starting values of norms."""
    graph, state = nnx.split(blank(make))
    draw = np.random.default_rng(0)
    values = lambda path, leaf: jnp.asarray(0.05 * draw.normal(size=leaf.shape) + ("scale" in str(path)), leaf.dtype)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(values, state))


# half the time to compile
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick_jit, static_argnums=0)
def run(graph, state, *args):
    return nnx.merge(graph, state)(*args)


def close(kind: str, ours, theirs, told: str) -> None:
    """An NHWC array against a torch NCHW one."""
    assert_agrees("Swin (transformers)", kind, ours, theirs.detach().permute(0, 2, 3, 1), 2e-5, told)


def converted(theirs, size: Size, window: int, **kwargs) -> tuple[Swin, Plan]:
    """Ours with the weights of theirs, and the plan by which they came."""
    tensors = state_dict(theirs)
    plan = Plan(base(), "backbone", entries({key: value.shape for key, value in tensors.items()}), ignored=IGNORED)
    return load(blank(lambda rngs: Swin(size, window, rngs=rngs, **kwargs)), plan, tensors), plan


@pytest.mark.slow
@pytest.mark.parity
def test_values_and_all_gradients_match_torch():
    # there is something to pad at the patches, windows and merges
    size, window, shape = (
        Size(32, (2, 2, 4, 2)),
        7,
        (2, 3, 75, 104),
    )
    theirs = random_torch_swin(size, window)
    import torch

    ours, plan = converted(theirs, size, window)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    pixels = torch.tensor(image, requires_grad=True)
    expected = theirs(pixels).feature_maps
    weights = [np.random.default_rng(k).normal(size=e.shape).astype(np.float32) for k, e in enumerate(expected)]
    sum((e * torch.tensor(w)).sum() for e, w in zip(expected, weights)).backward()

    graph, state = nnx.split(ours)

    @quick_jit
    def differentiate(state, image):
        def loss(state, image):
            features = nnx.merge(graph, state)(image)
            return sum((f * w.transpose(0, 2, 3, 1)).sum() for f, w in zip(features.values(), weights)), features

        return jax.grad(loss, (0, 1), has_aux=True)(state, image)

    (gradient, image_gradient), features = differentiate(state, jnp.asarray(image.transpose(0, 2, 3, 1)))
    for (stride, feature), e in zip(features.items(), expected):
        assert feature.shape == (shape[0], -(-shape[2] // stride), -(-shape[3] // stride), ours.channels[stride])
        close("forward", feature, e, f"stride {stride}")
    close("gradient", image_gradient, pixels.grad, "image")
    by_path = {f"backbone/{path}": np.asarray(leaf) for path, leaf in leaves(nnx.to_pure_dict(gradient)).items()}
    mine = invert(plan, by_path)
    expected = {key: theirs.get_parameter(key).grad.numpy() for key in mine}
    scale = max(np.abs(gradient).max() for gradient in expected.values())
    for key, gradient in expected.items():
        assert_agrees("Swin (transformers)", "gradient", mine[key], gradient, 5e-5, key, scale)


@pytest.mark.parity
def test_window_12_larger_than_the_last_feature_map_matches_torch():
    size, image = Size(32, (2, 2, 2, 2)), np.random.default_rng(0).normal(size=(1, 3, 60, 110)).astype(np.float32)
    theirs = random_torch_swin(size, 12)
    import torch

    ours, _ = converted(theirs, size, 12, drop_path=0.5)  # which does nothing without a key
    features = run(*nnx.split(ours), jnp.asarray(image.transpose(0, 2, 3, 1)))
    with torch.no_grad():
        for feature, expected in zip(features.values(), theirs(torch.tensor(image)).feature_maps):
            close("forward", feature, expected, f"{feature.shape}")


def test_bfloat16_stays_near_float32():
    exact, rounded = (
        filled(lambda rngs, dtype=dtype: Block(64, 3, 1, rngs=rngs, dtype=dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 8, 64)), jnp.bfloat16)
    y = run(*nnx.split(rounded), x)
    assert y.dtype == jnp.bfloat16
    assert jnp.abs(y - run(*nnx.split(exact), x.astype(jnp.float32))).mean() < 0.01


@pytest.mark.slow
def test_drop_path_differs_by_key_and_by_sample():
    model = filled(lambda rngs: Swin(Size(32, (2, 2, 2, 2)), window=3, drop_path=0.5, rngs=rngs))
    image = np.repeat(np.random.default_rng(0).normal(size=(1, 32, 48, 3)).astype(np.float32), 8, 0)
    first, again, other = (
        run(*nnx.split(model), image, jax.random.split(jax.random.key(seed), 8))[32] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(np.unique(np.asarray(first).reshape(8, -1), axis=0)) > 1


def test_drop_path_keeps_the_mean_and_grows_with_depth():
    dropped = np.asarray(
        drop_path(jnp.full((4000, 1, 1, 1), 3.0), jnp.float32(0.4), jax.random.split(jax.random.key(0), 4000))
    )
    np.testing.assert_allclose(np.unique(dropped), [0, 5], rtol=1e-6)
    assert abs(dropped.mean() - 3) < 0.15
    model = blank(lambda rngs: Swin("t", drop_path=0.3, rngs=rngs))
    pairs = [[rate for rate, _ in model.drops(stage, jax.random.split(jax.random.key(0), 2))] for stage in range(4)]
    rates = np.concatenate([np.stack(pair, 1).ravel() for pair in pairs])
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 12), rtol=1e-6)
    assert model.drops(3, None) is None


@pytest.mark.parity
@pytest.mark.parametrize("window, other", [(7, 12), (12, 7), (12, 8)])
def test_position_bias_table_resizing_matches_torch(window, other):
    torch = pytest.importorskip("torch")
    tables = np.random.default_rng(0).normal(size=(2, (2 * window - 1) ** 2, 3)).astype(np.float32)
    grid = torch.tensor(tables).reshape(2, 2 * window - 1, 2 * window - 1, 3).permute(0, 3, 1, 2)
    size = (2 * other - 1, 2 * other - 1)
    expected = torch.nn.functional.interpolate(grid, size, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    resized = resize_table(tables, other)
    assert_agrees("Swin table resizing (torch)", "forward", resized, expected.reshape(2, -1, 3), 1e-5)
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resize_table(tables, window), tables)


def test_parameter_counts_match_the_original_models():
    """Microsoft's ImageNet models, less classifier and its norm, with our output norms."""
    counts = {"t": 28_288_354, "s": 49_606_258, "b": 87_768_224, "l": 196_532_476}
    for size, count in counts.items():
        state = nnx.state(blank(lambda rngs, size=size: Swin(size, rngs=rngs)))
        width = SIZES[size].width
        classifier, norms = 1000 * (8 * width + 1), 2 * (1 + 2 + 4) * width
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == count - classifier + norms


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="Swin size 'xl': it must be one of t, s, b, l"):
        Swin("xl", rngs=nnx.Rngs(0))
