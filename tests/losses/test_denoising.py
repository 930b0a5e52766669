import jax
import numpy as np

from mqformer_jax.losses.denoising import noise_targets


def test_whole_groups_of_all_targets_fill_the_slots(tiny_batch):
    noised, target = jax.device_get(noise_targets(jax.random.key(0), tiny_batch, 24))
    for count, t, group, valid in zip(tiny_batch.num_targets, target, noised.group, noised.valid):
        groups = 24 // count
        assert valid.sum() == groups * count
        np.testing.assert_array_equal(t[valid], np.tile(np.arange(count), groups))
        np.testing.assert_array_equal(group[valid], np.repeat(np.arange(groups), count))


def test_more_targets_than_slots_make_one_group_cut_short(tiny_batch):
    noised, target = jax.device_get(noise_targets(jax.random.key(0), tiny_batch, 2))
    assert noised.valid.all() and (noised.group == 0).all() and (target == [0, 1]).all()


def test_an_image_without_targets_has_no_copies(tiny_batch):
    noised, _ = noise_targets(jax.random.key(0), tiny_batch.replace(num_targets=np.zeros(8, np.int32)), 6)
    assert not noised.valid.any()


def test_copies_claim_their_targets_prompts_but_for_the_flipped(tiny_batch):
    noised, target = jax.device_get(noise_targets(jax.random.key(1), tiny_batch, 200, flip=0.0))
    own = np.take_along_axis(tiny_batch.positive, target[..., None], 1)
    assert np.take_along_axis(own, noised.prompt[..., None], 2)[noised.valid].all()
    noised, target = jax.device_get(noise_targets(jax.random.key(1), tiny_batch, 200, flip=1.0))
    assert np.take_along_axis(tiny_batch.prompt_valid, noised.prompt, 1)[noised.valid].all()
    wrong = ~np.take_along_axis(own, noised.prompt[..., None], 2)[noised.valid]
    assert wrong.mean() > 0.6


def test_boxes_move_by_no_more_than_the_jitter(tiny_batch):
    noised, target = jax.device_get(noise_targets(jax.random.key(2), tiny_batch, 100, jitter=0.4))
    boxes = np.take_along_axis(tiny_batch.boxes, target[..., None], 1)
    moved = np.abs(noised.boxes - boxes)[noised.valid]
    reach = np.concatenate([boxes[..., 2:] * 0.2, boxes[..., 2:] * 0.4], -1)[noised.valid]
    assert (moved <= reach + 1e-6).all() and (moved > 0.5 * reach).mean() > 0.3
