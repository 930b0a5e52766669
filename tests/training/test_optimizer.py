import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import get_config

from mqformer_jax.models.build import build_model
from mqformer_jax.parallel.rules import path_name
from mqformer_jax.training.optimizer import NO_DECAY, make_optimizer, schedule


@pytest.fixture(scope="module")
def names():
    params = jax.eval_shape(lambda k: build_model(get_config().model, k)[1], jax.random.key(0))
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def test_weight_decay_skips_norms_and_embeddings_but_not_biases(names):
    spared = {name for name in names if NO_DECAY.search(name)}
    embeddings = {
        "learnable/content",
        "learnable/anchors",
        "region_embedding",
        "pixel_decoder/level_embed",
        "text_encoder/tokens",
        "text_encoder/positions",
    }
    assert spared == embeddings | {"heads/logit_scale", "heads/logit_bias"} | {name for name in names if "norm" in name}
    exchange = "decoder/layers/exchange/to_learnable/query/"
    assert {exchange + "kernel", exchange + "bias"} <= set(names) - spared


def test_groups_have_own_learning_rates_and_frozen_ones_skip_clipping():
    config = get_config().optimizer
    config.update(
        schedule="steps",
        warmup=0,
        learning_rate=1.0,
        weight_decay=0.0,
        backbone_lr_mult=0.1,
        text_lr_mult=0.0,
        clip_norm=1.0,
    )
    params = {"backbone": jnp.zeros(2), "text_encoder": jnp.zeros(2), "decoder": jnp.zeros(2)}
    optimizer = make_optimizer(config, 100, params)
    huge = {"backbone": jnp.ones(2), "text_encoder": jnp.full(2, jnp.inf), "decoder": jnp.ones(2)}
    state = optimizer.init(params)
    updates, state = optimizer.update(huge, state, params)
    np.testing.assert_allclose(updates["decoder"], -1.0, rtol=1e-3)
    np.testing.assert_allclose(updates["backbone"], -0.1, rtol=1e-3)
    np.testing.assert_array_equal(updates["text_encoder"], 0.0)


def test_step_schedule_warms_up_and_drops_tenfold_at_milestones():
    config = get_config().optimizer
    config.update(schedule="steps", warmup=10, learning_rate=1e-4, lr_milestones=(0.5, 0.8))
    rate = schedule(config, 1000)
    assert float(rate(0)) == pytest.approx(1e-5) and float(rate(9)) == pytest.approx(1e-4)
    assert [float(rate(s)) for s in (499, 501, 801)] == pytest.approx([1e-4, 1e-5, 1e-6])
