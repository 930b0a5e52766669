import jax
import numpy as np

from mqformer_jax.losses.denoising import noise_targets


def test_denoising_slots_hold_as_many_full_target_groups_as_fit(tiny_batch):
    noised = jax.device_get(noise_targets(jax.random.key(0), tiny_batch, 24))
    rows = zip(tiny_batch.num_targets, noised.target, noised.queries.group, noised.queries.valid)
    for count, t, group, valid in rows:
        groups = 24 // count
        assert valid.sum() == groups * count
        np.testing.assert_array_equal(t[valid], np.tile(np.arange(count), groups))
        np.testing.assert_array_equal(group[valid], np.repeat(np.arange(groups), count))


def test_more_targets_than_denoising_slots_give_one_truncated_group(tiny_batch):
    noised = jax.device_get(noise_targets(jax.random.key(0), tiny_batch, 2))
    assert noised.queries.valid.all() and (noised.queries.group == 0).all() and (noised.target == [0, 1]).all()


def test_image_without_targets_has_no_denoising_queries(tiny_batch):
    noised = noise_targets(jax.random.key(0), tiny_batch.replace(num_targets=np.zeros(8, np.int32)), 6)
    assert not noised.queries.valid.any()


def test_denoising_queries_use_target_prompts_unless_label_noise_applies(tiny_batch):
    noised = jax.device_get(noise_targets(jax.random.key(1), tiny_batch, 200, label_noise=0.0))
    own, queries = np.take_along_axis(tiny_batch.positive, noised.target[..., None], 1), noised.queries
    assert np.take_along_axis(own, queries.prompt[..., None], 2)[queries.valid].all()
    queries = jax.device_get(noise_targets(jax.random.key(1), tiny_batch, 200, label_noise=1.0)).queries
    assert np.take_along_axis(tiny_batch.prompt_valid, queries.prompt, 1)[queries.valid].all()
    wrong = ~np.take_along_axis(own, queries.prompt[..., None], 2)[queries.valid]
    assert wrong.mean() > 0.6


def test_denoising_box_shift_is_bounded_by_box_noise(tiny_batch):
    noised = jax.device_get(noise_targets(jax.random.key(2), tiny_batch, 100, box_noise=0.4))
    boxes, valid = np.take_along_axis(tiny_batch.boxes, noised.target[..., None], 1), noised.queries.valid
    moved = np.abs(noised.queries.boxes - boxes)[valid]
    reach = np.concatenate([boxes[..., 2:] * 0.2, boxes[..., 2:] * 0.4], -1)[valid]
    assert (moved <= reach + 1e-6).all() and (moved > 0.5 * reach).mean() > 0.3
