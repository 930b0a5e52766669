from __future__ import annotations

import numpy as np

from mqformer_jax.input.batch import collate, to_row
from mqformer_jax.input.example import Example, Prompt, Target

H, W, P, N = 16, 24, 5, 4


def tokenizer(texts):
    return np.array([[len(t), 7, 9] for t in texts], np.int32)


def example(num_targets=2, h=13, w=19, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [Prompt(("cat",), False), Prompt(("sky",), True), Prompt(("dog",), False, exhaustive=False)]
    box = np.array([2, 3, 12, 9], np.float32)
    targets = [Target((0, 1) if i == 0 else (i % 3,), box, rng.random((h, w)) > 0.5) for i in range(num_targets)]
    return Example("t", rng.integers(0, 255, (h, w, 3), np.uint8), prompts, targets, rng.random((h, w)) > 0.5)


def row(ex, indices=(2, 0, 1), seed=0, max_targets=N):
    texts = [ex.prompts[i].texts[0] for i in indices]
    return to_row(ex, texts, np.array(indices, int), tokenizer, (H, W), max_targets, P, 3, np.random.default_rng(seed))


def test_masks_come_back_from_their_bits():
    ex = example()
    out = row(ex)
    bits = np.unpackbits(out.masks, axis=-1).astype(bool)
    assert out.masks.shape == (N, H, W // 8) and bits.shape == (N, H, W)
    for i, target in enumerate(ex.targets):
        np.testing.assert_array_equal(bits[i, :13, :19], target.mask)
    assert not bits[:, 13:].any() and not bits[:, :, 19:].any() and not bits[2:].any()
    ignore = np.unpackbits(out.ignore, axis=-1).astype(bool)
    np.testing.assert_array_equal(ignore[:13, :19], ex.ignore)
    assert not ignore[13:].any() and not ignore[:, 19:].any(), "padding is told by size, not by ignore"


def test_image_is_padded_with_grey_and_size_is_the_valid_part():
    ex = example()
    out = row(ex)
    np.testing.assert_array_equal(out.image[:13, :19], ex.image)
    assert (out.image[13:] == 128).all() and (out.image[:, 19:] == 128).all() and out.size.tolist() == [13, 19]


def test_prompts_follow_the_chosen_order():
    out = row(example())
    assert out.prompt_valid.tolist() == [True, True, True, False, False]
    assert out.prompt_region.tolist() == [False, False, True, False, False]
    assert out.prompt_exhaustive.tolist() == [False, True, True, False, False]
    assert out.positive[:2].tolist() == [[False, True, True, False, False], [False, False, True, False, False]]
    assert out.tokens.tolist() == [[3, 7, 9]] * 3 + [[0, 0, 0]] * 2 and int(out.source) == 3


def test_boxes_are_centres_and_sizes_as_fractions_of_the_canvas():
    np.testing.assert_allclose(row(example()).boxes[0], [7 / W, 6 / H, 10 / W, 6 / H], rtol=1e-6)


def test_targets_that_no_chosen_prompt_names_are_left_out():
    out = row(example(num_targets=3), indices=(1,))
    assert int(out.num_targets) == 2 and out.positive.sum() == 2
    assert int(row(example(num_targets=3), indices=()).num_targets) == 0


def test_too_many_targets_leave_a_random_subset_and_unsure_prompts():
    ex = example(num_targets=9)
    kept = {row(ex, seed=s, max_targets=2).masks.tobytes() for s in range(10)}
    assert len(kept) > 3
    for seed in range(10):
        out = row(ex, seed=seed, max_targets=2)
        assert int(out.num_targets) == 2 and out.positive.any(1).all()
        # Targets 0 and 1, 4, 7 own "sky", 0, 3 and 6 own "cat": of both, more than two cannot have stayed.
        assert not out.prompt_exhaustive.any()


def test_boxes_only_targets_say_so():
    ex = example()
    ex.targets[1].mask = None
    assert row(ex).has_mask.tolist() == [True, False, False, False]


def test_rows_stack_into_a_batch():
    batch = collate([row(example(seed=s)) for s in range(3)])
    assert batch.image.shape == (3, H, W, 3) and batch.num_targets.tolist() == [2, 2, 2] and batch.masks.shape == (3, N, H, W // 8)
