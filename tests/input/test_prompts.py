from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mqformer_jax.input.example import Example, Prompt, Target
from mqformer_jax.input.prompts import choose_prompts, mirror


def example(num_prompts, owned, unsure=()):
    prompts = [Prompt((f"{i}a", f"{i}b"), is_region=False, exhaustive=i not in unsure) for i in range(num_prompts)]
    targets = [Target((i,), np.array([0, 0, 4, 4], np.float32)) for i in owned]
    return Example("t", np.zeros((8, 8, 3), np.uint8), prompts, targets, np.zeros((8, 8), bool))


def test_positives_come_before_negatives():
    for seed in range(20):
        texts, indices = choose_prompts(example(30, owned=[3, 7, 20]), 5, np.random.default_rng(seed))
        assert {3, 7, 20} <= set(indices.tolist()) and len(set(indices.tolist())) == 5
        assert all(text[:-1] == str(i) for text, i in zip(texts, indices))


def test_negatives_are_drawn_by_their_weights_without_repeats():
    crowd = example(30, owned=[0])
    for i, prompt in enumerate(crowd.prompts):
        crowd.prompts[i] = dataclasses.replace(prompt, weight=9.0 if i in (5, 6) else 1.0)
    counts = np.zeros(30)
    for seed in range(400):
        _, indices = choose_prompts(crowd, 4, np.random.default_rng(seed))
        assert len(set(indices.tolist())) == 4
        counts[indices] += 1
    assert counts[0] == 400
    # Of 45 parts of weight, two prompts hold 9 each: three draws without replacement take each of them with 0.50,
    # another with 0.074.
    assert abs(counts[[5, 6]].mean() / 400 - 0.50) < 0.06 and abs(counts[np.r_[1:5, 7:30]].mean() / 400 - 0.074) < 0.01


def test_negative_prompt_with_the_text_of_a_positive_is_dropped():
    prompts = [Prompt(("man",), True), Prompt(("man",), True), Prompt(("man",), False), Prompt(("dog",), True)]
    two = Example(
        "t",
        np.zeros((8, 8, 3), np.uint8),
        prompts,
        [Target((1,), np.array([0, 0, 4, 4], np.float32))],
        np.zeros((8, 8), bool),
    )
    texts, indices = choose_prompts(two, 9, np.random.default_rng(0))
    assert sorted(indices.tolist()) == [1, 2, 3] and len(texts) == 3


def test_random_subset_of_positives_is_kept_beyond_the_prompt_limit():
    chosen = [
        frozenset(choose_prompts(example(30, owned=range(10)), 4, np.random.default_rng(s))[1].tolist())
        for s in range(20)
    ]
    assert all(len(c) == 4 and max(c) < 10 for c in chosen) and len(set(chosen)) > 10


def test_prompt_order_wording_and_negatives_are_deterministic_per_seed():
    draws = [choose_prompts(example(30, owned=[3]), 5, np.random.default_rng(s)) for s in (1, 1, 2)]
    assert draws[0][0] == draws[1][0] != draws[2][0]
    wordings = {choose_prompts(example(1, owned=[0]), 5, np.random.default_rng(s))[0][0] for s in range(20)}
    assert wordings == {"0a", "0b"}


def test_prompt_neither_present_nor_known_absent_is_dropped():
    assert sorted(choose_prompts(example(4, owned=[1], unsure=[1, 2]), 9, np.random.default_rng(0))[1].tolist()) == [
        0,
        1,
        3,
    ]
    texts, indices = choose_prompts(example(0, owned=[]), 9, np.random.default_rng(0))
    assert texts == [] and indices.shape == (0,)


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("man on the left", "man on the right"),
        ("Left-most Cat, not the right one", "Right-most Cat, not the left one"),
        ("leftmost topright rightside", "rightmost topleft leftside"),
        ("lft guy", "rgt guy"),
        ("bright upright leftovers, copyright", "bright upright leftovers, copyright"),
        ("frightened left cat", "frightened right cat"),
    ],
)
def test_mirror_swaps_left_and_right_in_prompt_texts(text, mirrored):
    assert mirror(Prompt((text,), True)).texts == (mirrored,)
    assert mirror(mirror(Prompt((text,), True))).texts == (text,)


@pytest.mark.parametrize(
    "text",
    [
        "2nd from l",
        "the man right behind her",
        "plate at 3 o'clock",
        "lt blue shirt",
        "leftish",
        "rightfront",
        "rigth",
        "all right",
        "lhs",
    ],
)
def test_mirror_returns_none_for_ambiguous_or_unknown_direction_words(text):
    assert mirror(Prompt(("a cat", text), True)) is None
