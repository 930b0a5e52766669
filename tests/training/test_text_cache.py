import jax
import numpy as np
import pytest
from flax import nnx
from tiny import get_config

from mqformer_jax.models.mqformer import MQFormer
from mqformer_jax.parallel.mesh import gather_to_host, make_mesh
from mqformer_jax.train import train
from mqformer_jax.training.step import TrainStep
from mqformer_jax.training.text_cache import TextCache


@pytest.fixture(scope="module")
def tiny(tiny_weights):
    return get_config(), *tiny_weights


def test_cached_vectors_match_the_text_encoder(tiny, tiny_batch):
    config, params, frozen = tiny
    graph, _, _ = nnx.split(nnx.eval_shape(lambda: MQFormer(config.model, rngs=nnx.Rngs(0))), nnx.Param, ...)
    embed = jax.jit(lambda tokens: nnx.merge(graph, params, frozen).embed_text(tokens, tiny_batch.is_region))
    cache = TextCache(config.model, params["text_encoder"])
    for _ in range(2):  # the second time from memory
        given = cache(tiny_batch)
        assert given.tokens.shape == (*tiny_batch.tokens.shape[:2], config.model.text.embed_dim)
        np.testing.assert_allclose(embed(given.tokens), embed(tiny_batch.tokens), atol=1e-5)


def test_each_text_is_encoded_once(tiny, tiny_batch, monkeypatch):
    config, params, _ = tiny
    cache = TextCache(config.model, params["text_encoder"])
    seen = []
    encode = cache._vectors
    monkeypatch.setattr(cache, "_vectors", lambda tokens: seen.append(len(tokens)) or encode(tokens))
    cache(tiny_batch)
    cache(tiny_batch)
    assert seen == [len(np.unique(tiny_batch.tokens.reshape(-1, tiny_batch.tokens.shape[-1]), axis=0))]


@pytest.mark.slow
def test_frozen_text_encoder_is_unchanged_by_training(tiny_run, tmp_path):
    from mqformer_jax.checkpoint import load_weights

    config = tiny_run
    config.optimizer.text_lr_mult, config.steps = 0.0, 2
    train(config, str(tmp_path))
    start = TrainStep(config, make_mesh(config.mesh)).init().params
    trained = load_weights(str(tmp_path)).params
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(trained["text_encoder"]),
        jax.tree.leaves(jax.device_get(start["text_encoder"])),
    )
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(trained["decoder"]), jax.tree.leaves(jax.device_get(start["decoder"])))
    )


def test_gather_to_host_reassembles_sharded_parameters():
    mesh = make_mesh((2, 2, 2))
    table = np.arange(32.0).reshape(8, 4)
    split = jax.device_put(table, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor")))
    np.testing.assert_array_equal(gather_to_host({"a": split}, mesh)["a"], table)
