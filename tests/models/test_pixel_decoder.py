"""The segmentation encoder against Mask DINO's recorded numbers, and what padding may not change."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees, load
from safetensors.numpy import load_file

from mqformer_jax.convert.maskdino import head_plan
from mqformer_jax.models.pixel_decoder import PixelDecoder, _resize

CHANNELS = {4: 6, 8: 8, 16: 10}


def build(*args, **kwargs) -> PixelDecoder:
    return nnx.merge(*jax.jit(lambda: nnx.split(PixelDecoder(*args, **kwargs, rngs=nnx.Rngs(0))))())


@pytest.fixture(scope="module")
def split():
    """A small decoder, split, so that a test may change its copy."""
    return nnx.split(build(CHANNELS, 16, 2, 2, 2, 24, (8, 16), 12))


def random_features(height: int, width: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(0)
    return {s: rng.normal(size=(2, height // s, width // s, c)).astype(np.float32) for s, c in CHANNELS.items()}


def test_pixel_decoder_matches_recorded_mask_dino_outputs(fixtures):
    stem = fixtures / "maskdino" / "maskdino_tiny_s0"
    arrays, weights = np.load(stem.with_suffix(".npz")), load_file(stem.with_suffix(".safetensors"))
    about = json.loads(stem.with_suffix(".json").read_text())["model"]
    sizes = (
        about["hidden_dim"],
        about["enc_nheads"],
        about["enc_n_points"],
        about["enc_layers"],
        about["enc_dim_feedforward"],
    )
    channels = dict(zip(about["in_strides"], about["in_channels"]))
    ours = nnx.eval_shape(lambda: PixelDecoder(channels, *sizes, rngs=nnx.Rngs(0), mask_dim=about["mask_dim"]))
    plan = head_plan({key: value.shape for key, value in weights.items()})
    ours = load(ours, plan, weights, part="pixel_decoder")
    features = {s: arrays[f"in/res{k}"].transpose(0, 2, 3, 1) for s, k in ((4, 2), (8, 3), (16, 4), (32, 5))}
    canvas = tuple(about["image_size"])
    size = np.full((len(features[4]), 2), canvas)
    memory, mask_features = jax.jit(lambda f: ours(f, size, canvas))(features)
    np.testing.assert_array_equal(memory.shapes, arrays["enc/spatial_shapes"])
    assert memory.valid.all()
    cuts = np.cumsum([h * w for h, w in arrays["enc/spatial_shapes"]])[:-1]
    for i, level in enumerate(np.split(np.asarray(memory.tokens), cuts, 1)):
        expected = arrays[f"px/multi_scale_{i}"].transpose(0, 2, 3, 1)
        assert_agrees(
            "Mask DINO pixel decoder (recorded)", "forward", level.reshape(expected.shape), expected, told=f"level {i}"
        )
    expected = arrays["px/mask_features"].transpose(0, 2, 3, 1)
    assert_agrees("Mask DINO pixel decoder (recorded)", "forward", mask_features, expected, told="mask features")


def test_padding_does_not_affect_valid_tokens(split):
    """Without GroupNorm (whose statistics see the padding), an image on a larger canvas full of noise is as if
    alone.
    """
    decoder = nnx.merge(*split)
    for project in decoder.input_proj:
        project.norm = jax.nn.tanh
    for part in (decoder.layers.attention.sampling_offsets, decoder.layers.attention.attention_weights):
        part.kernel[...] = jnp.asarray(
            np.random.default_rng(1).normal(size=part.kernel.shape, scale=0.2).astype(np.float32)
        )
    noisy = random_features(64, 128)
    alone = {s: f[:, : 32 // s, : 64 // s] for s, f in noisy.items()}
    run = lambda features, canvas: jax.jit(lambda f: decoder(f, np.full((2, 2), (32, 64)), canvas)[0])(features)
    expected, memory = run(alone, (32, 64)), run(noisy, (64, 128))
    assert expected.valid.all() and not memory.valid.all()
    np.testing.assert_allclose(memory.tokens[memory.valid], expected.tokens.reshape(-1, 16), atol=1e-5)


def test_token_is_valid_if_its_cell_overlaps_the_image(split):
    size = np.array([[41, 65], [64, 96]])
    run = lambda: nnx.merge(*split)(random_features(64, 96), size, (64, 96))
    memory, mask_features = jax.jit(run)()
    assert memory.shapes == ((8, 12), (4, 6))
    fine, coarse = np.split(np.asarray(memory.valid), [96], 1)
    assert fine[0].reshape(8, 12).tolist() == (np.outer(np.arange(8) < 6, np.arange(12) < 9)).tolist()
    assert coarse[0].reshape(4, 6).tolist() == (np.outer(np.arange(4) < 3, np.arange(6) < 5)).tolist()
    assert memory.valid[1].all() and np.isfinite(memory.tokens).all() and mask_features.shape == (2, 16, 24, 12)


@pytest.mark.slow
def test_remat_changes_no_gradient(split):
    graph, state = split
    features = random_features(32, 64)

    def gradient(remat: str):
        def loss(state):
            decoder = nnx.merge(graph, state)
            decoder.remat = remat
            memory, _ = decoder(features, np.full((2, 2), (32, 64)), (32, 64))
            return memory.tokens[:, 0, 0].sum()

        return jax.jit(jax.grad(loss))(state)

    kept, *others = map(gradient, ("none", "layers", "dots"))
    for a, b in ((a, b) for again in others for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again))):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(kept["input_proj"]))


@pytest.mark.parametrize("strides, mask_stride", [((4, 8), 4), ((4, 8, 16, 32), 4), ((16, 32, 64), 4)])
def test_mask_features_have_the_mask_stride(strides, mask_stride):
    def run():
        decoder = PixelDecoder(
            CHANNELS, 16, 2, 2, 1, 24, strides, 12, mask_stride, rngs=nnx.Rngs(0), dtype=jnp.bfloat16
        )
        memory, mask_features = decoder(random_features(64, 96), np.full((2, 2), 64), (64, 96))
        assert list(memory.shapes) == [(64 // s, -(-96 // s)) for s in strides]
        return memory.tokens, mask_features

    tokens, mask_features = jax.eval_shape(run)
    assert tokens.dtype == mask_features.dtype == jnp.bfloat16
    assert mask_features.shape == (2, 16, 24, 12)


@pytest.mark.parity
def test_bilinear_resizing_matches_torch():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(1, 3, 5, 2)).astype(np.float32)
    for shape in ((6, 10), (7, 11), (3, 20)):
        expected = torch.nn.functional.interpolate(
            torch.tensor(x.transpose(0, 3, 1, 2)), shape, mode="bilinear", align_corners=False
        )
        assert_agrees(
            "bilinear resizing (torch)", "forward", _resize(jnp.asarray(x), shape), expected.permute(0, 2, 3, 1), 1e-5
        )


@pytest.mark.parametrize("strides, mask_stride", [((8, 32), 4), ((32, 64), 4), ((8, 16), 2)])
def test_strides_incompatible_with_the_backbone_are_rejected(strides, mask_stride):
    with pytest.raises(ValueError, match="double the one before"):
        PixelDecoder(CHANNELS, 16, 2, 2, 1, 24, strides, 12, mask_stride, rngs=nnx.Rngs(0))


def test_canvas_not_divisible_by_the_backbone_stride_is_rejected(split):
    with pytest.raises(ValueError, match="60x96: its sides must be multiples of the backbone's stride 16"):
        nnx.merge(*split)(random_features(64, 96), np.full((2, 2), 60), (60, 96))
