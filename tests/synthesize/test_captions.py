"""Which captions of a box are taken."""

import numpy as np
import pytest
from sets import CLASSES, Says, record, two_boxes

from mqformer_jax.input.record import DatasetInfo, Segment
from mqformer_jax.synthesize.annotations import usable_box, with_annotations
from mqformer_jax.synthesize.captions import Captions
from mqformer_jax.synthesize.teachers import Picture

pytest.importorskip("better_profanity")
INFO = DatasetInfo("toy", CLASSES, {})


def picture_of(made) -> Picture:
    wanted = tuple(range(len(made.segments)))
    return Picture(made, INFO, made.decode_image(), wanted, np.stack([usable_box(made, i) for i in wanted]))


def asked(cat: tuple[str, ...], dog: tuple[str, ...], verifier=None, made=None):
    (found,) = Captions(Says({0: cat, 1: dog}), verifier)([picture_of(made or two_boxes(1)[0])])
    return found


def texts(annotation) -> list[str]:
    return [text for text, _ in annotation.captions]


def test_five_best_captions_are_cleaned_and_deduplicated():
    cat, dog = asked(("A grey cat. ", "the grey  cat", "a cat", "c one", "d one", "e one", "f one"), ("a dog",))
    assert texts(cat) == ["a grey cat", "a cat", "c one", "d one", "e one"] and dict(cat.rejected) == {"duplicate": 1}
    assert cat.score == pytest.approx(0.9) and cat.captions[1][1] == pytest.approx(0.7)
    assert texts(dog) == ["a dog"] and not dog.reason and not dog.rejected


def test_unusable_captions_are_rejected_with_reasons():
    cat, dog = asked(("", "a a a a a", " ".join(["word"] * 40)), ("a fucking dog", "1234"))
    assert not cat.captions and cat.reason in ("empty", "not words", "too long")
    assert dict(cat.rejected) == {"empty": 1, "not words": 1, "too long": 1}
    assert dict(dog.rejected) == {"profane": 1, "not words": 1} and not dog.captions
    (nothing, _) = asked((), ("a dog",))
    assert nothing.reason == "no caption"


def test_caption_given_to_two_objects_is_rejected():
    cat, dog = asked(("an animal", "a cat"), ("a dog", "an animal"))
    assert texts(cat) == ["a cat"] and texts(dog) == ["a dog"] and dict(cat.rejected) == {"given to several boxes": 1}
    same = record(0, Segment(0, box=(4.0, 4.0, 40.0, 40.0)), Segment(1, box=(5.0, 4.0, 40.0, 40.0)))
    cat, dog = asked(("an animal",), ("an animal",), made=same)
    assert texts(cat) == texts(dog) == ["an animal"]  # one object in two boxes


class Picks:
    """Takes words for the box that they name."""

    name = "picks 1"

    def __call__(self, pictures, captions):
        return [
            [np.array([["cat" in t, "dog" in t] for t in some], np.float32).reshape(-1, 2) for some in boxes]
            for boxes in captions
        ]


def test_verifier_rejects_captions_not_fitting_their_own_box_best():
    cat, dog = asked(("a cat", "the dog beside it", "a thing"), ("a dog", "a small cat"), Picks())
    assert texts(cat) == ["a cat"] and dict(cat.rejected) == {"does not fit its own box best": 2}
    assert texts(dog) == ["a dog"] and Captions(Says({}), Picks()).name == "says 1, verified by picks 1"
    same = record(0, Segment(0, box=(4.0, 4.0, 40.0, 40.0)), Segment(1, box=(5.0, 4.0, 40.0, 40.0)))
    cat, _ = asked(("a dog",), ("a hound",), Picks(), same)
    assert texts(cat) == ["a dog"]  # the other box may be the same object


def test_captions_are_added_to_the_record_beside_human_expressions():
    made = record(
        0, Segment(0, ("people's cat",), box=(4.0, 8.0, 28.0, 40.0)), Segment(1, box=(36.0, 10.0, 60.0, 30.0))
    )
    new = with_annotations(made, asked(("a cat", "a pet"), ("",), made=made), "says 1")
    cat, dog = new.segments
    assert cat.expressions == ("people's cat", "a cat", "a pet") and cat.captions_by == "says 1" and cat.mask is None
    assert dog == made.segments[1]
    assert type(new).from_bytes(new.to_bytes()) == new


def test_captions_are_requested_for_things_not_stuff_crowds_or_foregrounds():
    box = dict(box=(1.0, 1.0, 9.0, 9.0))
    made = record(
        0,
        Segment(0, **box),
        Segment(2, **box),
        Segment(1, crowd=True, **box),
        Segment(foreground=True, **box),
        Segment(None, **box),
    )
    assert Captions(Says({})).wanted(made, INFO) == [0, 4]
