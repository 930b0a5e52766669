"""What a caption must pass: how it is cleaned, why it is refused, and which of several are kept."""

from __future__ import annotations

import json
import sys

import pytest

from mqformer_jax.synthesize import caption_filter
from mqformer_jax.synthesize.caption_filter import (
    ALLOWED_WORDS,
    MAX_CHARACTERS,
    MAX_WORDS,
    clean,
    distinct,
    rejection_reason,
)
from mqformer_jax.synthesize.teachers import Caption


@pytest.fixture
def list_of_profane_words():
    """Skips where the package with the list is not installed."""
    pytest.importorskip("better_profanity")


@pytest.mark.parametrize(
    "said, cleaned",
    [
        ("  A red\tcar\n\non the   road . ", "a red car on the road"),
        ("Two dogs!?…", "two dogs"),
        ("ﬁne Ａｂｃ", "fine abc"),
        ("a cafe\u0301", "a café"),
        ("no. 5, 3.5 m", "no. 5, 3.5 m"),
        ("t-shirt --", "t-shirt"),
        ("zero\u200bwidth \ud800 \x00", "zerowidth"),
        (" .,! ", ""),
    ],
)
def test_caption_text_is_cleaned(said, cleaned):
    assert clean(said) == cleaned


def test_cleaning_is_idempotent_for_every_unicode_character():
    for code in range(0x30000):
        once = clean(f"a{chr(code)}b{chr(code)}")
        assert clean(once) == once == once.lower(), hex(code)
        once.encode()  # a shard can hold it


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "empty"),
        (" ".join(f"word{i}" for i in range(MAX_WORDS + 1)), "too long"),
        ("a" * (MAX_CHARACTERS + 1), "too long"),
        ("the the the the", "not words"),
        ("a man in the man in the man in the hat", "not words"),
        ("a, a, a, a", "not words"),
        ("123 - 456", "not words"),
        ("a dog<loc_1><loc_20>", "not words"),
        ("a dog </s>", "not words"),
        ("[unk] on a table", "not words"),
        ("a \ufffd dog", "not words"),
        ("a fucking dog", "profane"),
        ("what an ass", "profane"),
        ("this son of a bitch", "profane"),
        ("son-of-a-bitch", "profane"),
    ],
)
def test_unusable_captions_are_rejected_with_a_reason(text, reason, list_of_profane_words):
    assert rejection_reason(text) == reason


@pytest.mark.parametrize(
    "text",
    [
        " ".join(f"word{i}" for i in range(MAX_WORDS)),
        "a very very small dog",
        "the theatre, the thesis",  # no loop: "the" begins each, and is whole in two only
        "the pen is on the table",  # better-profanity's own search reads "penis"
        "bus 455",  # and "ass"
        "une tasse à thé",
        "a rooster's cock comb",
        "blue tit on a branch",
        "flower pot",
        "a white urinal",
        "brown shower curtain",
        "scunthorpe, cocktail glass, shuttlecock, grass, titmouse",
    ],
)
def test_legitimate_captions_are_accepted(text, list_of_profane_words):
    assert rejection_reason(text) is None


def test_caller_can_set_the_maximum_length():
    assert rejection_reason("one two three", longest=2) == "too long"


def test_allowed_words_would_otherwise_be_rejected_as_profane(list_of_profane_words, monkeypatch):
    assert not [word for word in ALLOWED_WORDS if rejection_reason(word)]
    monkeypatch.setattr(caption_filter, "ALLOWED_WORDS", frozenset())
    caption_filter._profane.cache_clear()
    try:
        assert not [word for word in ALLOWED_WORDS if rejection_reason(word) != "profane"]
    finally:
        caption_filter._profane.cache_clear()


def test_real_class_names_and_human_expressions_are_accepted(real_data, list_of_profane_words):
    names = {
        name
        for part in ("lvis", "instances_train")
        for name in _names(json.load(open(real_data / "coco" / f"{part}.json")))
    }
    sentences = {s for ref in json.load(open(real_data / "coco" / "referring.json"))["refs"] for s in _sentences(ref)}
    assert len(names) > 400 and len(sentences) > 150
    refused = {text: reason for text in names | sentences if (reason := rejection_reason(clean(text)))}
    assert set(refused.values()) <= {"too long"} and len(refused) < 3, refused


def _names(annotations: dict) -> list[str]:
    return [name.replace("_", " ") for c in annotations["categories"] for name in (c["name"], *c.get("synonyms", ()))]


def _sentences(ref: dict) -> list[str]:
    return [s if isinstance(s, str) else s.get("raw", s.get("sent")) for s in ref["sentences"]]


def test_missing_profanity_package_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "better_profanity", None)
    caption_filter._profane.cache_clear()
    with pytest.raises(
        ValueError, match=r"^better_profanity is not installed: pip install 'mqformer_jax\[captions\]'\.$"
    ):
        rejection_reason("a dog")
    assert rejection_reason("") == "empty"  # which no list is needed for


def test_best_scored_of_equivalent_captions_is_kept():
    said = [
        Caption("The red car.", 0.2),
        Caption("a red car", 0.5),
        Caption("Red  car!", 0.9),
        Caption("a dog", 0.7),
        Caption("a cat", 0.1),
    ]
    assert distinct(said, 5) == [Caption("red car", 0.9), Caption("a dog", 0.7), Caption("a cat", 0.1)]
    assert distinct(said, 2) == [Caption("red car", 0.9), Caption("a dog", 0.7)]
    assert distinct([], 5) == [] and said[0].text == "The red car."


def test_distinct_captions_with_tied_scores_keep_their_order():
    assert [c.text for c in distinct([Caption("b", 0.5), Caption("c", 0.5), Caption("d", 0.5)], 2)] == ["b", "c"]
