from __future__ import annotations

import numpy as np

from mqformer_jax.input.batch import BatchSpec, collate, pack_example, unpack
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


def row(ex, indices=(2, 0, 1), seed=0, max_targets=N, lattice_stride=1):
    """A Batch of one."""
    texts, spec = [ex.prompts[i].texts[0] for i in indices], BatchSpec((H, W), P, max_targets, lattice_stride)
    return collate(
        [pack_example(ex, texts, np.array(indices, int), tokenizer, spec, 3, np.random.default_rng(seed))], spec
    )


def test_packed_masks_unpack_to_the_originals():
    ex = example()
    out = row(ex)
    bits = unpack(out.masks, (H, W))[0]
    assert bits.shape == (N, H, W)
    for i, target in enumerate(ex.targets):
        np.testing.assert_array_equal(bits[i, :13, :19], target.mask)
    assert not bits[:, 13:].any() and not bits[:, :, 19:].any() and not bits[2:].any()
    ignore = unpack(out.ignore, (H, W))[0]
    np.testing.assert_array_equal(ignore[:13, :19], ex.ignore)
    assert not ignore[13:].any() and not ignore[:, 19:].any(), "padding is told by size, not by ignore"


def test_masks_are_sampled_at_one_pixel_per_lattice_cell():
    ex = example()
    offsets = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        size, (top, left) = rng.integers(1, 9, 2), rng.integers(0, (6, 12))
        piece = rng.random(size) > 0.3
        ex.targets[1] = Target((1,), ex.targets[1].box, piece, at=(int(top), int(left)))
        out = row(ex, seed=seed, lattice_stride=4)
        mask = np.zeros((2, H, W), bool)
        mask[0, top : top + size[0], left : left + size[1]] = piece
        mask[1, :13, :19] = ex.ignore
        (y, x), bits = out.offset[0], np.stack([out.masks[0, 1], out.ignore[0]])
        assert bits.shape == (2, H // 4, 1)
        np.testing.assert_array_equal(np.unpackbits(bits, axis=-1, count=W // 4), mask[:, y::4, x::4])
        np.testing.assert_array_equal(unpack(bits, (H, W))[:, y::4, x::4], mask[:, y::4, x::4])
        offsets.add((int(y), int(x)))
    assert len(offsets) > 10 and {o for offset in offsets for o in offset} == {0, 1, 2, 3}


def test_image_is_padded_with_gray_and_size_is_the_valid_part():
    ex = example()
    out = row(ex)
    np.testing.assert_array_equal(out.image[0, :13, :19], ex.image)
    assert (out.image[0, 13:] == 128).all() and (out.image[0, :, 19:] == 128).all() and out.size.tolist() == [[13, 19]]


def test_prompts_follow_the_chosen_order():
    out = row(example())
    assert out.prompt_valid[0].tolist() == [True, True, True, False, False]
    assert out.is_region[0].tolist() == [False, False, True, False, False]
    assert out.prompt_exhaustive[0].tolist() == [False, True, True, False, False]
    assert out.positive[0, :2].tolist() == [[False, True, True, False, False], [False, False, True, False, False]]
    assert out.tokens[0].tolist() == [[3, 7, 9]] * 3 + [[0, 0, 0]] * 2 and out.source.tolist() == [3]


def test_boxes_are_center_size_relative_to_the_canvas():
    np.testing.assert_allclose(row(example()).boxes[0, 0], [7 / W, 6 / H, 10 / W, 6 / H], rtol=1e-6)


def test_targets_without_a_chosen_prompt_are_dropped():
    out = row(example(num_targets=3), indices=(1,))
    assert out.num_targets.tolist() == [2] and out.positive.sum() == 2
    assert row(example(num_targets=3), indices=()).num_targets.tolist() == [0]


def test_excess_targets_are_subsampled_and_prompts_become_non_exhaustive():
    ex = example(num_targets=9)
    kept = {row(ex, seed=s, max_targets=2).masks.tobytes() for s in range(10)}
    assert len(kept) > 3
    for seed in range(10):
        out = row(ex, seed=seed, max_targets=2)
        assert out.num_targets.tolist() == [2] and out.positive[0, :2].any(1).all()
        # Targets 0 and 1, 4, 7 own "sky", 0, 3 and 6 own "cat": of both, more than two cannot have stayed.
        assert not out.prompt_exhaustive.any()


def test_box_only_targets_have_has_mask_false():
    ex = example()
    ex.targets[1].mask = None
    assert row(ex).has_mask[0].tolist() == [True, False, False, False]


def test_object_is_negative_for_prompts_of_objects_outside_its_box():
    prompts = [Prompt((name,), False, exhaustive=False) for name in ("man", "shirt", "person", "car", "dog")] + [
        Prompt(("sky",), True)
    ]
    # the man, his shirt, the man again as a person, a car
    boxes = [
        (0, 0, 10, 12),
        (2, 4, 8, 8),
        (0, 0, 10, 11),
        (9, 2, 18, 12),
    ]
    targets = [Target((i,), np.array(box, np.float32)) for i, box in enumerate(boxes)]
    out = row(Example("t", np.zeros((13, 19, 3), np.uint8), prompts, targets, np.zeros((13, 19), bool)), range(5))
    assert out.negative[0, :4].tolist() == [
        [False, False, False, True, False],  # the man is no car; that he is no person nobody said
        [False, False, False, True, False],  # nor that what he wears is none, for a phrase may mean a part of him
        [False, False, False, True, False],
        [True, True, True, False, False],
    ], "of sky all is known already, of dogs nothing was marked"


def test_collate_stacks_rows_into_a_batch():
    spec = BatchSpec((H, W), P, N)
    rows = [
        pack_example(example(seed=s), ["a", "b"], np.array([1, 0]), tokenizer, spec, s, np.random.default_rng(0))
        for s in range(3)
    ]
    batch = collate(rows, spec)
    assert (
        batch.image.shape == (3, H, W, 3)
        and batch.num_targets.tolist() == [2, 2, 2]
        and batch.masks.shape == (3, N, H // 4, 1)
    )
    for i in range(3):
        alone = collate([rows[i]], spec)
        for name, value in vars(alone).items():
            np.testing.assert_array_equal(getattr(batch, name)[i], value[0], err_msg=name)
