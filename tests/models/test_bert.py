"""The mean of BERT's tokens against Hugging Face's BertModel with random weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees, build, load, state_dict

from mqformer_jax.convert import minilm
from mqformer_jax.models.bert import BertTextEncoder

SIZES = dict(vocab_size=40, context=8, width=384, heads=12, depth=2)
TOKENS = np.array([[2, 7, 9, 3, 0, 0], [2, 11, 12, 13, 14, 3], [2, 3, 0, 0, 0, 0]])  # [CLS] 2, [SEP] 3, padding 0


def random_original():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=1536,
        layer_norm_eps=1e-12,
    )
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def sentence_of(original, tokens):
    """sentence-transformers' pooling: the mean over the tokens that are no padding."""
    import torch

    tokens = torch.as_tensor(tokens, dtype=torch.long)
    real = (tokens != 0).long()
    hidden = original(input_ids=tokens, attention_mask=real).last_hidden_state
    return (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)


@functools.cache
def encoder(dtype=jnp.float32) -> BertTextEncoder:
    return build(lambda rngs: BertTextEncoder(40, 8, 32, 2, 2, positions=8, rngs=rngs, dtype=dtype))


@pytest.mark.parity
def test_values_and_gradients_match_bert():
    theirs = random_original()
    import torch

    tensors = state_dict(theirs)
    plan = minilm.plan({key: value.shape for key, value in tensors.items()})
    ours = load(nnx.eval_shape(lambda: BertTextEncoder(**SIZES, rngs=nnx.Rngs(0))), plan, tensors)
    expected = sentence_of(theirs, TOKENS)
    cotangent = np.random.default_rng(0).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(cotangent)).sum().backward()

    graph, state = nnx.split(ours)

    @jax.jit
    def run(state):
        output, pull_back = jax.vjp(lambda s: nnx.merge(graph, s)(TOKENS), state)
        return output, pull_back(jnp.asarray(cotangent))[0]

    output, gradient = run(state)
    assert_agrees("MiniLM (transformers)", "forward", output, expected.detach(), 1e-5)
    close = functools.partial(assert_agrees, "MiniLM (transformers)", "gradient")
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    close(gradient["tokens"], wanted["embeddings.word_embeddings.weight"])
    close(gradient["positions"], wanted["embeddings.position_embeddings.weight"])
    close(gradient["types"], wanted["embeddings.token_type_embeddings.weight"])
    close(gradient["norm"]["scale"], wanted["embeddings.LayerNorm.weight"])
    for i in range(2):
        blocks, layer = gradient["blocks"], f"encoder.layer.{i}"
        close(blocks["fc1"]["kernel"][i].T, wanted[f"{layer}.intermediate.dense.weight"])
        close(blocks["norm1"]["bias"][i], wanted[f"{layer}.attention.output.LayerNorm.bias"])
        close(blocks["norm2"]["scale"][i], wanted[f"{layer}.output.LayerNorm.weight"])
        for k, name in enumerate(("query", "key", "value")):
            close(
                blocks["qkv"]["kernel"][i][:, 384 * k : 384 * (k + 1)].T,
                wanted[f"{layer}.attention.self.{name}.weight"],
            )


def test_padding_does_not_affect_outputs():
    run = jax.jit(encoder())
    np.testing.assert_allclose(run(TOKENS[:1, :4]), run(TOKENS)[:1], atol=1e-5)


def test_all_padding_text_gives_zero_output_and_finite_gradients():
    graph, state = nnx.split(encoder())
    tokens = np.array([[0, 0, 0], [2, 7, 3]])

    @jax.jit
    def run(state):
        output, pull_back = jax.vjp(lambda s: nnx.merge(graph, s)(tokens), state)
        return output, pull_back(jnp.ones_like(output))[0]

    output, gradient = run(state)
    np.testing.assert_array_equal(output[0], 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((output, gradient)))


def test_leading_axes_are_kept():
    run = jax.jit(encoder(jnp.bfloat16))
    tokens = np.stack([TOKENS, TOKENS[::-1]])
    output = run(tokens)
    assert output.shape == (2, 3, 32) and output.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        output.reshape(6, 32).astype(jnp.float32), run(tokens.reshape(6, -1)).astype(jnp.float32), atol=0.02
    )


def test_context_longer_than_the_position_table_is_rejected():
    with pytest.raises(ValueError, match="context = 600: BERT has 512 positions"):
        BertTextEncoder(40, 600, 32, 2, 2, rngs=nnx.Rngs(0))
