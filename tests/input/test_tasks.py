from __future__ import annotations

import cv2
import numpy as np
import pytest

from mqformer_jax.input.record import BadRecord, ClassInfo, DatasetInfo, Record, Segment, encode_rle
from mqformer_jax.input.tasks import needs_whole_image, to_example

CAT, DOG, SKY = 0, 1, 2
CLASSES = (ClassInfo(("cat", "kitty")), ClassInfo(("dog",)), ClassInfo(("sky",), is_region=True))
INFO = DatasetInfo("toy", CLASSES, {"train": 1})
FEDERATED = DatasetInfo("toy", CLASSES, {"train": 1}, exhaustive=False)
H, W = 12, 16


def area(x0, y0, x1, y1):
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def segment(*box, **fields):
    return Segment(mask=encode_rle(area(*box)), **fields)


def whole(target):
    """A target's mask on its image."""
    (top, left), (h, w) = target.at, target.mask.shape
    mask = np.zeros((H, W), bool)
    mask[top : top + h, left : left + w] = target.mask
    return mask


def record(*segments, **fields):
    image = cv2.imencode(".png", np.zeros((H, W, 3), np.uint8))[1].tobytes()
    return Record("a", image, H, W, segments, **fields)


def asked(example):
    """{(first text, region): (exhaustive, targets that it names)}"""
    return {
        (p.texts[0], p.is_region): (p.exhaustive, [t for t in example.targets if i in t.prompts])
        for i, p in enumerate(example.prompts)
    }


def test_panoptic_prompts_every_class_and_merges_stuff_into_one_region():
    sky = [segment(x, 8, x + 2, 12, class_id=SKY) for x in (0, 8)]
    rec = record(segment(0, 0, 4, 4, class_id=CAT), segment(6, 0, 9, 4, class_id=CAT), *sky)
    example = to_example(rec, INFO, ("panoptic",), "toy/a")
    prompts = asked(example)
    assert set(prompts) == {("cat", False), ("dog", False), ("sky", True)}
    assert len(prompts["cat", False][1]) == 2 and prompts["dog", False] == (True, [])
    (sky,) = prompts["sky", True][1]
    np.testing.assert_array_equal(whole(sky), area(0, 8, 2, 12) | area(8, 8, 10, 12))
    np.testing.assert_array_equal(sky.box, [0, 8, 10, 12])
    assert example.prompts[0].texts == ("cat", "kitty")


def test_object_with_class_and_expressions_is_one_target_with_many_prompts():
    rec = record(segment(0, 0, 4, 4, class_id=CAT, texts=("left cat", "small one")), segment(6, 0, 9, 4, class_id=CAT))
    example = to_example(rec, INFO, ("instance", "referring"), "toy/a")
    assert len(example.targets) == 2
    both, other = sorted(example.targets, key=lambda t: -len(t.prompts))
    texts = [example.prompts[i].texts for i in both.prompts]
    assert sorted(texts) == [("cat", "kitty"), ("left cat",), ("small one",)]
    assert len(other.prompts) == 1 and example.prompts[max(both.prompts)].is_region


def test_expression_shared_by_two_objects_is_one_prompt_with_two_targets():
    rec = record(segment(0, 0, 4, 4, texts=("a cat", "a cat", "left")), segment(6, 0, 9, 4, texts=("a cat",)))
    example = to_example(rec, INFO, ("referring",), "toy/a")
    assert [p.texts for p in example.prompts] == [("a cat",), ("left",)]
    assert [t.prompts for t in example.targets] == [(0, 1), (0,)]


def test_semantic_merges_the_segments_of_a_class():
    rec = record(
        segment(0, 0, 4, 4, class_id=CAT), segment(6, 0, 9, 4, class_id=CAT), segment(0, 5, 9, 9, class_id=DOG)
    )
    example = to_example(rec, INFO, ("semantic", "instance"), "toy/a")
    prompts = asked(example)
    (cats,) = prompts["cat", True][1]
    np.testing.assert_array_equal(whole(cats), area(0, 0, 4, 4) | area(6, 0, 9, 4))
    assert prompts["dog", True][1][0] is prompts["dog", False][1][0], "the only dog is one target under both questions"
    assert ("sky", False) not in prompts


def test_detection_drops_masks_and_box_only_targets_have_none():
    rec = record(
        segment(1, 2, 5, 6, class_id=CAT, box=(1.0, 2.0, 5.5, 6.0)), Segment(class_id=DOG, box=(2.5, 3.0, 9.0, 8.0))
    )
    for task, has_mask in (("detection", False), ("instance", True)):
        example = to_example(rec, INFO, (task,), "toy/a")
        cat, dog = example.targets
        assert (cat.mask is not None) == has_mask and dog.mask is None
        np.testing.assert_array_equal(dog.box, [2.5, 3, 9, 8])
        assert not example.ignore.any()


def test_crowds_become_ignored_pixels_and_make_their_class_non_exhaustive():
    rec = record(
        segment(0, 0, 4, 4, class_id=CAT),
        segment(8, 0, 12, 4, class_id=CAT, crowd=True),
        Segment(class_id=DOG, box=(2.5, 6.0, 5.0, 8.0), crowd=True),
        ignore=encode_rle(area(0, 10, 16, 12)),
    )
    example = to_example(rec, INFO, ("panoptic",), "toy/a")
    assert len(example.targets) == 1
    np.testing.assert_array_equal(example.ignore, area(8, 0, 12, 4) | area(2, 6, 5, 8) | area(0, 10, 16, 12))
    prompts = asked(example)
    assert prompts["cat", False][0] is False and ("dog", False) not in prompts and prompts["sky", True][0] is True


def test_federated_sets_prompt_only_present_and_known_absent_classes():
    rec = record(
        segment(0, 0, 4, 4, class_id=CAT),
        segment(6, 0, 9, 4, class_id=SKY),
        absent_classes=(DOG,),
        partial_classes=(CAT,),
    )
    prompts = asked(to_example(rec, FEDERATED, ("panoptic",), "toy/a"))
    assert {k: v[0] for k, v in prompts.items()} == {("cat", False): False, ("dog", False): True, ("sky", True): True}
    assert prompts["dog", False][1] == []
    assert set(asked(to_example(record(segment(0, 0, 4, 4, class_id=CAT)), FEDERATED, ("instance",), "toy/a"))) == {
        ("cat", False)
    }


def test_referring_prompts_include_expressions_and_absent_texts():
    rec = record(
        segment(0, 0, 4, 4, class_id=CAT, texts=("the cat",)),
        segment(6, 0, 9, 4, class_id=DOG),
        absent_texts=("a bird",),
    )
    example = to_example(rec, INFO, ("referring",), "toy/a")
    prompts = asked(example)
    assert set(prompts) == {("the cat", True), ("a bird", True)} and prompts["a bird", True] == (True, [])
    assert (
        len(example.targets) == 1
        and needs_whole_image(rec, ("referring",))
        and not needs_whole_image(rec, ("instance",))
    )


def test_foreground_mask_is_the_matte_thresholded_at_one_half():
    matte = np.tile(np.linspace(0, 255, W).astype(np.uint8), (H, 1))
    rec = record(
        Segment(alpha=cv2.imencode(".png", matte)[1].tobytes(), foreground=True), segment(0, 0, 2, 2, class_id=CAT)
    )
    example = to_example(rec, INFO, ("foreground",), "toy/a")
    (target,) = example.targets
    np.testing.assert_array_equal(whole(target), matte > 127)
    assert [p.texts for p in example.prompts] == [("foreground",)] and needs_whole_image(rec, ("foreground",))


def test_image_without_objects_has_only_negative_prompts():
    example = to_example(record(), INFO, ("panoptic",), "toy/a")
    assert example.targets == [] and len(example.prompts) == 3 and all(p.exhaustive for p in example.prompts)


def test_templates_apply_to_class_names_but_not_to_expressions():
    rec = record(segment(0, 0, 4, 4, class_id=CAT, texts=("the cat",)))
    example = to_example(rec, INFO, ("instance", "referring"), "toy/a", ("a {}.", "my {}"))
    assert example.prompts[0].texts == ("a cat.", "my cat", "a kitty.", "my kitty") and example.prompts[-1].texts == (
        "the cat",
    )


def test_invalid_segments_and_unknown_tasks_are_rejected():
    with pytest.raises(BadRecord, match="a: segment 0 has class 7"):
        to_example(record(segment(0, 0, 4, 4, class_id=7)), INFO, ("instance",), "toy/a")
    with pytest.raises(BadRecord, match="a: segment 0 has neither a box nor a mask"):
        to_example(record(Segment(class_id=CAT)), INFO, ("instance",), "toy/a")
    with pytest.raises(ValueError, match="unknown task 'panoptics'"):
        to_example(record(), INFO, ("panoptics",), "toy/a")


def test_non_unique_phrases_are_not_exhaustive():
    phrases = record(segment(0, 0, 4, 4, texts=("a shirt", "blue cloth")))
    for unique in (True, False):
        prompts = to_example(phrases, DatasetInfo("x", (), {}, False, unique_texts=unique), ("referring",), "k").prompts
        assert [prompt.texts for prompt in prompts] == [("a shirt",), ("blue cloth",)]
        assert all(prompt.is_region and prompt.exhaustive == unique for prompt in prompts)


def test_prompt_weight_grows_with_class_frequency():
    info = DatasetInfo(
        "x", (ClassInfo(("cat",)), ClassInfo(("dog",)), ClassInfo(("emu",))), {}, class_images={"train": (16, 9, 0)}
    )
    prompts = to_example(record(), info, ("instance",), "k").prompts
    assert [p.weight for p in prompts] == [4, 3, 1]


def test_prompts_of_objects_with_empty_masks_are_not_exhaustive():
    glass = cv2.imencode(".png", np.full((H, W), 100, np.uint8))[1].tobytes()
    empty = Segment(class_id=CAT, mask=encode_rle(np.zeros((H, W), bool)), box=(1.0, 1.0, 5.0, 5.0), texts=("the cat",))
    example = to_example(
        record(Segment(alpha=glass, foreground=True), empty), INFO, ("foreground", "instance", "referring"), "k"
    )
    assert not example.targets
    found = asked(example)
    assert (
        not any(found[prompt][0] for prompt in (("foreground", True), ("cat", False), ("the cat", True)))
        and found["dog", False][0]
    )
