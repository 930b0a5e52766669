import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from tiny import get_config

from mqformer_jax.losses.denoising import noise_targets
from mqformer_jax.models.mqformer import MQFormer


@functools.cache
def build(queries="mixed", interaction="exchange"):
    """The tiny model as (graph, parameters, constants); one seed, so that parts two variants share are equal."""
    config = ConfigDict(get_config().model)
    config.update(queries=queries, interaction=interaction)
    graph, params, rest = nnx.split(MQFormer(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


@functools.cache
def forward(queries="mixed", interaction="exchange"):
    graph, _, rest = build(queries, interaction)

    @jax.jit
    def run(params, batch, denoising=None):
        model = nnx.merge(graph, params, rest)
        return model(
            batch.image, batch.size, model.embed_text(batch.tokens, batch.is_region), batch.prompt_valid, denoising
        )

    return run


def assert_close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=1e-4), a, b)


@pytest.mark.parametrize("queries, stages, learnable", [("mixed", 4, 6), ("conditional", 4, 0), ("learnable", 3, 14)])
def test_every_query_strategy_predicts_for_all_queries_and_prompts(tiny_batch, queries, stages, learnable):
    out = forward(queries)(build(queries)[1], tiny_batch)
    assert out.matching.class_logits.shape == (stages, 8, 14, 16)
    assert out.matching.boxes.shape == (stages, 8, 14, 4)
    assert out.num_learnable == learnable
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


def test_untrained_exchange_is_the_identity(tiny_batch):
    with_exchange, without = forward()(build()[1], tiny_batch), forward("mixed", "none")
    params = jax.tree.map(lambda x: x, build()[1])
    params["decoder"]["layers"].pop("exchange")
    assert_close(with_exchange.matching, without(params, tiny_batch).matching)


def test_exchange_carries_information_in_both_directions(tiny_batch):
    params = build()[1]

    def opened(way):
        changed = jax.tree.map(lambda x: x, params)
        out = changed["decoder"]["layers"]["exchange"][way]["out"]
        out["kernel"] = jax.random.normal(jax.random.key(1), out["kernel"].shape)
        return forward()(changed, tiny_batch).matching.mask_embed[2]  # after the first layer: one exchange was made

    before = forward()(params, tiny_batch).matching.mask_embed[2]
    learnable, conditional = np.s_[:, :6], np.s_[:, 6:]
    to_learnable, to_conditional = opened("to_learnable"), opened("to_conditional")
    assert (
        np.abs(to_learnable - before)[learnable].max() > 1e-3
        and np.abs(to_conditional - before)[conditional].max() > 1e-3
    )
    assert_close(to_learnable[conditional], before[conditional])
    assert_close(to_conditional[learnable], before[learnable])


def test_query_types_interact_only_through_exchange_or_joint_attention(tiny_batch):
    params = jax.tree.map(lambda x: x, build("mixed", "none")[1])
    moved = jax.tree.map(lambda x: x, params)
    moved["learnable"]["content"] = moved["learnable"]["content"] + 1.0
    change = lambda kind: np.abs(
        forward("mixed", kind)(moved, tiny_batch).matching.class_logits
        - forward("mixed", kind)(params, tiny_batch).matching.class_logits
    )
    assert change("none")[:, :, :6].max() > 1e-2 and change("none")[:, :, 6:].max() < 1e-5
    assert change("joint")[2:, :, 6:].max() > 1e-4


def test_denoising_queries_do_not_affect_matching_queries_or_other_groups(tiny_batch):
    params = build()[1]
    denoising = noise_targets(jax.random.key(0), tiny_batch, 24).queries
    with_noise, without = forward()(params, tiny_batch, denoising), forward()(params, tiny_batch)
    assert_close(with_noise.matching, without.matching)
    assert with_noise.denoising.class_logits.shape == (3, 8, 24, 16)
    other = denoising.replace(boxes=denoising.boxes.at[:, 0].set(0.5))
    changed = forward()(params, tiny_batch, other).denoising.boxes
    separate = (denoising.group != denoising.group[:, :1]) & denoising.valid
    assert separate.any()
    assert_close(changed[:, separate], with_noise.denoising.boxes[:, separate])


def test_outputs_are_prompt_order_equivariant_and_ignore_padded_prompts(tiny_batch):
    params, batch = build()[1], tiny_batch
    order = np.random.default_rng(0).permutation(16)
    shuffled = batch.replace(
        tokens=batch.tokens[:, order],
        prompt_valid=batch.prompt_valid[:, order],
        is_region=batch.is_region[:, order],
    )
    expected = forward()(params, batch).matching
    found = forward()(params, shuffled).matching
    assert_close(found.class_logits, expected.class_logits[..., order])
    assert_close(found.boxes, expected.boxes)
    poisoned = batch.replace(tokens=np.where(batch.prompt_valid[..., None], batch.tokens, 7))
    assert_close(forward()(params, poisoned).matching.boxes, expected.boxes)


def test_region_flag_changes_class_logits(tiny_batch):
    params = build()[1]
    asked = lambda region: (
        forward()(params, tiny_batch.replace(is_region=np.full_like(tiny_batch.is_region, region))).matching
    )
    assert np.abs(asked(True).class_logits - asked(False).class_logits).max() > 1e-3


def test_proposals_train_conditional_and_decoder_stages_learnable_queries(tiny_batch):
    def loss(params, stage):
        return (forward()(params, tiny_batch).matching.class_logits[stage] ** 2).mean()

    gradient = jax.jit(jax.grad(loss))  # the stage is traced: one compilation for all
    size = lambda tree: float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(tree)))
    last, proposals = gradient(build()[1], 3), gradient(build()[1], 0)
    assert (
        size(last["learnable"]) > 0
        and size(gradient(build()[1], 1)["learnable"]) > 0
        and size(proposals["learnable"]) == 0
    )
    assert size(last["conditional"]) == 0 and size(proposals["conditional"]) > 0
