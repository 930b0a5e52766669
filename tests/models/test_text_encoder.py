"""The text tower against Hugging Face's CLIP with random weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees, build, load, state_dict

from mqformer_jax.convert import clip_text
from mqformer_jax.models.text_encoder import TextEncoder
from mqformer_jax.models.tokenizer import WordTokenizer

hf_clip_text = next(family for family in clip_text.FAMILIES if family.name == "hf_clip_text")
TEXTS = ["a red dog", "", "the tall person on the left of the big green bus", "sky"]
SIZES = dict(vocab_size=40, context=8, width=128, heads=2, depth=2, embed_dim=12)


def encoder(dtype=jnp.float32) -> TextEncoder:
    return build(lambda rngs: TextEncoder(**SIZES, rngs=rngs, dtype=dtype))


def clip():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=40, max_position_embeddings=8, hidden_size=128, intermediate_size=512, num_attention_heads=2,
        num_hidden_layers=2, projection_dim=12, hidden_act="quick_gelu",
        bos_token_id=38, eos_token_id=39, pad_token_id=0,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parity
def test_values_and_gradients_match_clip():
    theirs = clip()
    import torch

    tensors = state_dict(theirs)
    plan = hf_clip_text.plan({key: value.shape for key, value in tensors.items()})
    ours = load(encoder(), plan, tensors)
    text = plan.config.model.text
    sizes = dict(
        vocab_size=text.vocab_size, context=text.context, width=text.width, heads=text.heads, depth=text.layers
    )
    assert dict(sizes, embed_dim=text.embed_dim) == SIZES
    tokens = WordTokenizer(40, 8)(TEXTS)
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).text_embeds
    cotangent = np.random.default_rng(0).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(cotangent)).sum().backward()

    graph, state = nnx.split(ours)

    @jax.jit
    def run(state):
        output, pull_back = jax.vjp(lambda s: nnx.merge(graph, s)(tokens), state)
        return output, pull_back(jnp.asarray(cotangent))[0]

    output, gradient = run(state)
    assert_agrees("CLIP text (transformers)", "forward", output, expected.detach())
    close = functools.partial(assert_agrees, "CLIP text (transformers)", "gradient")
    wanted = {name.removeprefix("text_model."): parameter.grad for name, parameter in theirs.named_parameters()}
    close(gradient["tokens"], wanted["embeddings.token_embedding.weight"])
    for i in range(2):
        close(gradient["blocks"]["fc1"]["kernel"][i].T, wanted[f"encoder.layers.{i}.mlp.fc1.weight"])
        close(gradient["blocks"]["qkv"]["kernel"][i, :, :128].T, wanted[f"encoder.layers.{i}.self_attn.q_proj.weight"])


def test_tokens_after_the_end_token_are_ignored():
    tokens = WordTokenizer(40, 8)(["sky"])
    longer = tokens.copy()
    longer[0, 3:] = 7
    model = encoder()
    np.testing.assert_array_equal(model(tokens), model(longer))
    np.testing.assert_allclose(model(tokens), model(tokens[:, :3]), atol=1e-6)


def test_leading_axes_are_kept():
    tokens = WordTokenizer(40, 8)(TEXTS)
    model = encoder(jnp.bfloat16)
    output = model(tokens.reshape(2, 2, 8))
    assert output.shape == (2, 2, 12) and output.dtype == jnp.bfloat16
    np.testing.assert_array_equal(output.reshape(4, 12), model(tokens))


def test_untrained_encoder_weights_all_words_equally_for_every_seed():
    """Without the mean over texts, two words of a text have the same share in the embedding, for every seed."""
    colors, shapes = ["red", "blue", "white", "orange"], ["ball", "square", "star", "ring"]
    texts = [f"the {color} {shape}" for color in colors for shape in shapes]
    tokens = WordTokenizer(1024, 12)(texts)
    graph, params = nnx.split(
        nnx.vmap(lambda key: TextEncoder(1024, 12, 64, 2, 2, 96, rngs=nnx.Rngs(key)))(
            jax.random.split(jax.random.key(0), 8)
        )
    )
    embeddings = jax.vmap(lambda p: nnx.merge(graph, p)(tokens))(params)
    centered = embeddings - embeddings.mean(1, keepdims=True)
    unit = (centered / jnp.linalg.norm(centered, axis=-1, keepdims=True)).reshape(8, 4, 4, -1)
    of_colors, of_shapes = (jnp.sum(unit.mean(axis) ** 2, -1).mean(1) for axis in (2, 1))
    np.testing.assert_allclose(of_colors, 0.5, atol=0.12)
    np.testing.assert_allclose(of_shapes, 0.5, atol=0.12)
