import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mqformer_jax.losses import costs
from mqformer_jax.losses.costs import LossWeights
from mqformer_jax.losses.criterion import Normalizers, criterion, image_keys
from mqformer_jax.models.mqformer import Outputs, Predictions

WEIGHTS = LossWeights(num_points=64)
STAGES, QUERIES, WIDTH = 2, 14, 8


@pytest.fixture(scope="module")
def outputs(tiny_batch):
    """Random predictions whose shapes fit the batch."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (STAGES, 8, QUERIES)
    boxes = jax.nn.sigmoid(jax.random.normal(keys[1], (*shape, 4)))
    predictions = Predictions(
        jax.random.normal(keys[0], (*shape, 16)), boxes, jax.random.normal(keys[2], (*shape, WIDTH))
    )
    return Outputs(predictions, None, jax.random.normal(keys[3], (8, 16, 16, WIDTH)), num_learnable=6)


@functools.partial(jax.jit, static_argnames="weights")
def run(outputs, batch, weights=WEIGHTS):
    loss, (sums, by_image) = criterion(
        image_keys(jax.random.key(1), 8), outputs, batch, None, Normalizers.of(batch, None), weights
    )
    return loss, sums | by_image


@functools.partial(jax.jit, static_argnames="weights")
def gradients(outputs, batch, weights=WEIGHTS):
    keys, normalizers = image_keys(jax.random.key(1), 8), Normalizers.of(batch, None)
    return jax.grad(lambda o: criterion(keys, o, batch, None, normalizers, weights)[0])(outputs)


def test_the_loss_is_the_weighted_sum_of_its_terms(outputs, tiny_batch):
    one_stage = outputs.replace(matching=jax.tree.map(lambda x: x[-1:], outputs.matching))
    loss, metrics = run(one_stage, tiny_batch)
    weights = {"class": 4, "mask": 5, "dice": 5, "box": 5, "giou": 2}
    assert set(metrics) == {*weights, "total", "taken", "per_image"}, "a term of weight 0 is not computed"
    assert float(loss) == pytest.approx(sum(weights[t] * float(metrics[t]) for t in weights), rel=1e-5)
    images = metrics["per_image"] * tiny_batch.num_targets
    assert float(images.sum() / tiny_batch.num_targets.sum()) == pytest.approx(float(loss), rel=1e-5)


def test_perfect_predictions_have_near_zero_class_and_box_loss(outputs, tiny_batch):
    """Each target is predicted exactly by one query; the rest are silent."""
    n, b = tiny_batch.boxes.shape[1], 8
    masks = np.unpackbits(tiny_batch.masks, axis=-1).astype(np.float32)
    features = jnp.asarray(np.moveaxis(masks, 1, -1) * 60 - 30)
    embed = jnp.broadcast_to(jnp.eye(QUERIES, n), (STAGES, b, QUERIES, n))
    logits = np.full((STAGES, b, QUERIES, 16), -20.0, np.float32)
    boxes = np.full((STAGES, b, QUERIES, 4), 0.5, np.float32)
    for i, count in enumerate(tiny_batch.num_targets):
        logits[:, i, :count] = np.where(tiny_batch.positive[i, :count], 20.0, -20.0)
        boxes[:, i, :count] = tiny_batch.boxes[i, :count]
    perfect = Outputs(Predictions(jnp.asarray(logits), jnp.asarray(boxes), embed), None, features, num_learnable=6)
    _, metrics = run(perfect, tiny_batch)
    assert float(metrics["class"]) < 1e-6 and float(metrics["box"]) < 1e-5 and float(metrics["giou"]) < 1e-3
    _, worse = run(outputs, tiny_batch)
    assert float(metrics["dice"]) < 0.5 * float(worse["dice"])  # features are interpolated, so borders are not exact


def test_padded_targets_and_prompts_do_not_affect_the_loss(outputs, tiny_batch):
    rows = np.arange(tiny_batch.boxes.shape[1]) >= tiny_batch.num_targets[:, None]
    garbage = tiny_batch.replace(
        boxes=np.where(rows[..., None], 9.0, tiny_batch.boxes).astype(np.float32),
        masks=np.where(rows[..., None, None], np.uint8(85), tiny_batch.masks),
        positive=tiny_batch.positive | rows[..., None],
        negative=tiny_batch.negative | rows[..., None],
        prompt_exhaustive=tiny_batch.prompt_exhaustive | ~tiny_batch.prompt_valid,
    )
    np.testing.assert_allclose(run(outputs, tiny_batch)[0], run(outputs, garbage)[0], rtol=1e-6)


def test_box_only_targets_train_classes_and_boxes_and_no_masks(outputs, tiny_batch):
    box_only = tiny_batch.replace(
        has_mask=np.zeros_like(tiny_batch.has_mask), masks=np.full_like(tiny_batch.masks, 255)
    )
    found = gradients(outputs, box_only)
    assert not found.mask_features.any() and not found.matching.mask_embed.any()
    assert found.matching.class_logits.any() and found.matching.boxes.any()


@pytest.mark.slow
def test_projection_loss_applies_only_to_box_only_targets(outputs, tiny_batch):
    weights = LossWeights(num_points=64, projection=1.0)
    masked = tiny_batch.replace(has_mask=np.ones_like(tiny_batch.has_mask))
    loss, metrics = run(outputs, masked, weights)
    assert float(metrics["projection"]) == 0 and float(loss) == pytest.approx(float(run(outputs, masked)[0]), rel=1e-6)
    box_only = tiny_batch.replace(
        has_mask=np.zeros_like(tiny_batch.has_mask), size=np.tile(np.array([64, 32], np.int32), (8, 1))
    )
    loss, metrics = run(outputs, box_only, weights)
    assert float(metrics["projection"]) > 0 and "projection" not in run(outputs, box_only)[1]
    found = gradients(outputs, box_only, weights)
    assert found.matching.mask_embed.any() and np.isfinite(found.mask_features).all()
    assert found.mask_features[:, :, :8].any() and not found.mask_features[:, :, 8:].any()  # not in the padding


def test_non_exhaustive_prompts_give_no_negative_class_gradient(outputs, tiny_batch):
    unknown = tiny_batch.replace(
        prompt_exhaustive=np.zeros_like(tiny_batch.prompt_exhaustive), negative=np.zeros_like(tiny_batch.negative)
    )
    found = np.array(gradients(outputs, unknown).matching.class_logits)
    assert (found <= 0).all()  # only "yes" is taught
    per_image = [p[:n].sum() for p, n in zip(tiny_batch.positive, tiny_batch.num_targets)]
    np.testing.assert_array_equal((found < 0).sum((0, 2, 3)), STAGES * np.array(per_image))
    known = np.array(gradients(outputs, tiny_batch).matching.class_logits)
    assert (known > 0).any()


def test_known_negatives_are_trained_even_for_non_exhaustive_prompts(outputs, tiny_batch):
    unknown = tiny_batch.replace(prompt_exhaustive=np.zeros_like(tiny_batch.prompt_exhaustive))
    others = tiny_batch.prompt_valid[:, None] & ~tiny_batch.positive
    found = np.array(gradients(outputs, unknown.replace(negative=others)).matching.class_logits)
    rows = np.arange(others.shape[1]) < tiny_batch.num_targets[:, None]
    np.testing.assert_array_equal((found > 0).sum((0, 2, 3)), STAGES * (others & rows[..., None]).sum((1, 2)))


def test_ignored_pixels_give_no_mask_gradient(outputs, tiny_batch):
    ignore = np.zeros_like(tiny_batch.ignore)
    ignore[:, :, : ignore.shape[2] // 2] = 255
    found = np.array(gradients(outputs, tiny_batch.replace(ignore=ignore)).mask_features)
    assert np.abs(found[:, :, :7]).max() < 1e-8 and np.abs(found[:, :, 9:]).max() > 1e-6


def test_unmatched_queries_in_ignored_areas_get_no_class_gradient(outputs, tiny_batch):
    # the whole image is unknown: every query is in an ignored area
    ignore = np.full_like(tiny_batch.ignore, 255)
    found = np.array(gradients(outputs, tiny_batch.replace(ignore=ignore)).matching.class_logits)
    taught = found.any(-1).sum(-1)
    np.testing.assert_array_equal(taught, np.broadcast_to(tiny_batch.num_targets, (STAGES, 8)))


def test_image_padding_gives_no_mask_gradient(outputs, tiny_batch):
    cut = tiny_batch.replace(size=np.tile(np.array([64, 32], np.int32), (8, 1)))
    found = np.array(gradients(outputs, cut).mask_features)
    assert not found[:, :, 9:].any() and found[:, :, :8].any()


def test_image_without_targets_has_only_the_negative_class_loss(outputs, tiny_batch):
    empty = tiny_batch.replace(num_targets=np.zeros(8, np.int32))
    loss, metrics = run(outputs, empty)
    negatives = (
        costs.focal(outputs.matching.class_logits, jnp.zeros(1))
        * (tiny_batch.prompt_valid & tiny_batch.prompt_exhaustive)[None, :, None]
    )
    assert float(loss) == pytest.approx(4 * float(negatives.sum()), rel=1e-4)
    assert float(metrics["mask"]) == float(metrics["box"]) == 0


def test_taken_metric_counts_targets_matched_by_learnable_queries(outputs, tiny_batch):
    # learnable queries score badly: the others take all but what is left
    near = outputs.matching.class_logits.at[:, :, :6].set(-9.0)
    taken = np.array(run(outputs.replace(matching=outputs.matching.replace(class_logits=near)), tiny_batch)[1]["taken"])
    assert taken[:, 1].sum() == tiny_batch.num_targets.sum()
    assert (taken[:, 0] <= taken[:, 1]).all() and taken[:, 0].sum() < 0.3 * taken[:, 1].sum()


def test_decoupled_queries_match_only_their_own_target_type(outputs, tiny_batch):
    """OpenSeeD's hard split: 6 learnable queries take regions, 8 conditional ones instances."""
    split = outputs.replace(decoupled=True)
    taken = np.array(run(split, tiny_batch)[1]["taken"])
    instances, regions = taken
    assert instances[1] > 0 and regions[1] > 0
    assert instances[0] == 0 and regions[0] == regions[1]


def test_decoupled_targets_beyond_the_query_count_stay_unmatched(outputs, tiny_batch):
    one_learnable = outputs.replace(decoupled=True, num_learnable=1)
    loss, metrics = run(one_learnable, tiny_batch)
    assert np.isfinite(float(loss))
    (instances, _), (regions, all_regions) = np.array(metrics["taken"])
    assert instances == 0 and 0 < regions < all_regions
