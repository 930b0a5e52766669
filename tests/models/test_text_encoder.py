"""The text tower against Hugging Face's CLIP with random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mqformer_jax.models.text_encoder import TextEncoder
from mqformer_jax.models.tokenizer import WordTokenizer

TEXTS = ["a red dog", "", "the tall person on the left of the big green bus", "sky"]
SIZES = dict(vocab_size=40, context=8, width=16, heads=2, depth=2, embed_dim=12)


def encoder(dtype=jnp.float32) -> TextEncoder:
    return nnx.merge(*jax.jit(lambda: nnx.split(TextEncoder(**SIZES, rngs=nnx.Rngs(0), dtype=dtype)))())


def clip():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=40, max_position_embeddings=8, hidden_size=16, intermediate_size=64, num_attention_heads=2,
        num_hidden_layers=2, projection_dim=12, hidden_act="quick_gelu", bos_token_id=38, eos_token_id=39, pad_token_id=0,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def copy_weights(ours: TextEncoder, theirs) -> None:
    w = {k.removeprefix("text_model."): v.detach().numpy() for k, v in theirs.state_dict().items()}
    both = lambda name, kind: np.stack([w[f"encoder.layers.{i}.{name}.{kind}"] for i in range(2)])

    def dense(layer, *names):
        layer.kernel[...] = jnp.asarray(np.concatenate([both(n, "weight") for n in names], 1).swapaxes(1, 2))
        layer.bias[...] = jnp.asarray(np.concatenate([both(n, "bias") for n in names], 1))

    blocks = ours.blocks
    dense(blocks.qkv, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    dense(blocks.out, "self_attn.out_proj")
    dense(blocks.fc1, "mlp.fc1")
    dense(blocks.fc2, "mlp.fc2")
    for norm, name in ((blocks.norm1, "layer_norm1"), (blocks.norm2, "layer_norm2")):
        norm.scale[...], norm.bias[...] = jnp.asarray(both(name, "weight")), jnp.asarray(both(name, "bias"))
    ours.norm.scale[...] = jnp.asarray(w["final_layer_norm.weight"])
    ours.norm.bias[...] = jnp.asarray(w["final_layer_norm.bias"])
    ours.tokens[...] = jnp.asarray(w["embeddings.token_embedding.weight"])
    ours.positions[...] = jnp.asarray(w["embeddings.position_embedding.weight"])
    ours.projection.kernel[...] = jnp.asarray(w["text_projection.weight"].T)


def test_values_and_gradients_are_those_of_clip():
    theirs, ours = clip(), encoder()
    import torch

    copy_weights(ours, theirs)
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
    np.testing.assert_allclose(output, expected.detach(), atol=1e-4)
    np.testing.assert_allclose(gradient["tokens"], theirs.get_input_embeddings().weight.grad, atol=1e-4)
    wanted = dict(theirs.named_parameters())
    for i in range(2):
        name = f"encoder.layers.{i}.mlp.fc1.weight"
        (key,) = [k for k in wanted if k.endswith(name)]
        np.testing.assert_allclose(gradient["blocks"]["fc1"]["kernel"][i].T, wanted[key].grad, atol=1e-4)


def test_what_follows_the_end_token_does_not_matter():
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
