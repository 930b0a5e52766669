"""What is said of pictures that are made to be hard: look-alikes, crowds, names within names."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, Segment, encode_rle
from mqformer_jax.synthesize.rule_captioner import RuleCaptioner
from mqformer_jax.synthesize.teachers import Picture

WHITE, RED, BLUE = (250, 250, 250), (220, 20, 20), (30, 60, 220)

captioner = RuleCaptioner("")


def texts_of(record, info, image=None, asked=None):
    """The captions of each asked segment (default: of all that have a box)."""
    asked = tuple(i for i, s in enumerate(record.segments) if s.box) if asked is None else asked
    boxes = np.array([record.segments[i].box for i in asked], float).reshape(-1, 4)
    image = record.decode_image() if image is None else image
    return [[c.text for c in captions] for captions in captioner([Picture(record, info, image, asked, boxes)])[0]]


def picture(*pieces, classes, size=(100, 200), masks=True, exhaustive=True, **known):
    """A record of painted rectangles (class, box, color, and what else its Segment shall hold), its info and its
    image.
    """
    image, segments = np.full((*size, 3), (120, 170, 120), np.uint8), []
    for name, (x0, y0, x1, y1), color, *more in pieces:
        image[y0:y1, x0:x1] = color
        mask = np.zeros(size, bool)
        mask[y0:y1, x0:x1] = True
        box = (float(x0), float(y0), float(x1), float(y1))
        segments.append(Segment(classes.index(name), box=box, mask=encode_rle(mask) if masks else None, **dict(*more)))
    png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    info = DatasetInfo("crafted", tuple(ClassInfo((c,) if isinstance(c, str) else c) for c in classes), {}, exhaustive)
    return Record("crafted", png, *size, tuple(segments), **known), info


LEFT, RIGHT, MIDDLE = (20, 30, 50, 60), (150, 30, 180, 60), (85, 30, 115, 60)


@pytest.mark.parametrize("masks", [True, False])
def test_two_look_alikes_are_distinguished_by_position(masks):
    assert texts_of(*picture(("dog", LEFT, WHITE), ("dog", RIGHT, WHITE), classes=["dog"], masks=masks)) == [
        ["the left dog"],
        ["the right dog"],
    ]


def test_captions_use_color_first_then_position_then_a_neighbor():
    record, info = picture(("dog", LEFT, WHITE), ("dog", RIGHT, RED), ("cat", MIDDLE, BLUE), classes=["dog", "cat"])
    white, red, cat = texts_of(record, info)
    assert white == ["the white dog", "the left dog", "the dog left of the cat"]
    assert red == ["the red dog", "the right dog", "the dog right of the cat"]
    assert cat[0] == "the cat" and "the blue cat" in cat and "the cat right of the white dog" in cat


def test_outer_two_of_three_look_alikes_are_leftmost_and_rightmost():
    pieces = [("dog", box, WHITE) for box in (MIDDLE, LEFT, RIGHT)]
    assert texts_of(*picture(*pieces, classes=["dog"])) == [[], ["the leftmost dog"], ["the rightmost dog"]]


def test_size_is_mentioned_only_for_clear_differences():
    large, middling = (10, 10, 70, 70), (130, 30, 180, 80)
    texts = texts_of(*picture(("dog", large, WHITE), ("dog", RIGHT, WHITE), classes=["dog"]))
    assert texts[0][0] == "the large dog" and texts[1][0] == "the small dog"
    texts = texts_of(*picture(("dog", large, WHITE), ("dog", middling, WHITE), classes=["dog"]))
    assert not any(size in text for of_one in texts for text in of_one for size in ("large", "small"))
    hidden = texts_of(
        *picture(("dog", large, WHITE), ("dog", RIGHT, WHITE), ("cat", (140, 20, 199, 99), RED), classes=["dog", "cat"])
    )
    assert not any("small" in text for text in hidden[1])  # who knows how much of it the cat hides


@pytest.mark.parametrize("noun", ["person", "children", "human hand", "wine glass"])
def test_color_and_size_are_not_mentioned_for_people_and_glass(noun):
    record, info = picture((noun, (10, 10, 70, 70), RED), (noun, RIGHT, WHITE), classes=[noun])
    assert texts_of(record, info) == [[f"the left {noun}"], [f"the right {noun}"]]


@pytest.mark.parametrize("known", [{"partial_classes": (0,)}, {"exhaustive": False, "partial_classes": (0, 1)}])
def test_partially_labeled_class_gets_no_captions_and_is_no_anchor(known):
    record, info = picture(("dog", LEFT, WHITE), ("cat", MIDDLE, BLUE), classes=["dog", "cat"], **known)
    dog, cat = texts_of(record, info)
    assert dog == [] and not any("dog" in text for text in cat)


def test_class_with_a_crowd_gets_no_captions():
    record, info = picture(
        ("dog", LEFT, WHITE), ("dog", RIGHT, WHITE, {"crowd": True}), ("cat", MIDDLE, BLUE), classes=["dog", "cat"]
    )
    assert [bool(texts) for texts in texts_of(record, info)] == [False, False, True]


def test_ambiguous_name_is_unused_if_a_longer_class_may_be_unlabeled():
    classes = ["bear", "teddy bear"]
    assert texts_of(*picture(("bear", LEFT, WHITE), classes=classes, exhaustive=False)) == [[]]
    assert texts_of(*picture(("bear", LEFT, WHITE), classes=classes, exhaustive=False, absent_classes=(1,)))[0]
    assert texts_of(*picture(("teddy bear", LEFT, WHITE), classes=classes, exhaustive=False))[0]


def test_class_name_ending_in_another_class_name_is_ambiguous():
    classes = ["bear", "teddy bear"]
    bear, teddy = texts_of(*picture(("bear", LEFT, RED), ("teddy bear", RIGHT, WHITE), classes=classes))
    assert "the bear" not in bear and bear[0] == "the red bear"
    assert "the teddy bear" not in teddy and teddy[0] == "the white teddy bear"
    alone, _ = texts_of(*picture(("bear", LEFT, RED), ("dog", RIGHT, WHITE), classes=["bear", "dog"]))
    assert alone[0] == "the bear"


def test_man_vs_person_and_shared_synonyms_are_ambiguous():
    man, person = texts_of(*picture(("man", LEFT, RED), ("person", RIGHT, WHITE), classes=["man", "person"]))
    assert "the man" not in man and "the person" not in person
    animal, club = texts_of(
        *picture(
            (("bat",), LEFT, RED), (("baseball bat", "bat"), RIGHT, WHITE), classes=[("bat",), ("baseball bat", "bat")]
        )
    )
    assert "the bat" not in animal + club and animal[0] == "the red bat"


@pytest.mark.parametrize("name", ["bow (weapon)", "right shoe", "in-line skate", "other animal", "24/7"])
def test_unsuitable_class_names_get_no_captions(name):
    assert texts_of(*picture((name, LEFT, RED), classes=[name])) == [[]]


def test_synonyms_are_used_and_class_names_are_normalized():
    classes = [("Alarm_Clock", "alarm")]
    found = {
        texts_of(
            *(lambda r, i: (dataclasses.replace(r, key=str(k)), i))(*picture((classes[0], LEFT, RED), classes=classes))
        )[0][0]
        for k in range(9)
    }
    assert found == {"the alarm clock", "the alarm"}


def test_segments_that_are_not_things_get_no_captions():
    record, info = picture(("dog", LEFT, WHITE), classes=["dog"])
    words, foreground = (
        Segment(texts=("a cat",), box=(1.0, 1.0, 9.0, 9.0)),
        Segment(box=(1.0, 1.0, 9.0, 9.0), foreground=True),
    )
    record = dataclasses.replace(record, segments=(*record.segments, words, foreground))
    assert texts_of(record, info) == [["the dog", "the white dog"], [], []]
    grass = dataclasses.replace(info, classes=(ClassInfo(("dog",), is_region=True),))
    assert texts_of(record, grass) == [[], [], []]
    assert texts_of(record, info, asked=()) == []
    assert texts_of(dataclasses.replace(record, segments=(words,)), dataclasses.replace(info, classes=())) == [[]]
    assert captioner([]) == []


def test_object_with_a_mask_but_no_box_is_considered():
    record, info = picture(("dog", LEFT, WHITE), ("dog", RIGHT, WHITE), classes=["dog"])
    unboxed = dataclasses.replace(
        record, segments=(record.segments[0], dataclasses.replace(record.segments[1], box=None))
    )
    assert texts_of(unboxed, info) == [["the left dog"]]


def test_dark_images_get_no_color_captions():
    record, info = picture(("dog", LEFT, WHITE), classes=["dog"])
    assert texts_of(record, info)[0] == ["the dog", "the white dog"]
    assert texts_of(record, info, image=record.decode_image() // 4) == [["the dog"]]
