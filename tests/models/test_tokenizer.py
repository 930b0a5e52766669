"""The word tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from mqformer_jax.models.tokenizer import WordTokenizer

START, END = 98, 99


def tokens(*texts: str) -> list[list[int]]:
    return WordTokenizer(vocab_size=100, context=5)(texts).tolist()


def test_a_row_is_start_words_end_and_zeros():
    (row,) = tokens("red dog")
    assert row[0] == START and row[3:] == [END, 0]
    assert all(1 <= word <= 97 for word in row[1:3])


def test_case_and_punctuation_do_not_count():
    assert tokens("Red_dog!") == tokens("red, dog")
    assert tokens("red dog") != tokens("dog red")


def test_an_empty_text_is_start_and_end():
    assert tokens("", "?!") == [[START, END, 0, 0, 0]] * 2


def test_a_long_text_keeps_its_end_token():
    (row,) = tokens("the small red dog on the left")
    assert row[:4] == tokens("the small red")[0][:4] and row[4] == END


def test_ids_are_the_same_in_every_process():
    assert WordTokenizer(4096, 4)(["dog"]).tolist() == [[4094, 1 + 0x812C397D % 4093, 4095, 0]]  # CRC-32 of "dog"


def test_letters_of_any_script_are_words():
    assert tokens("собака")[0][1:3] != [END, 0]


def test_no_text_gives_no_rows():
    assert WordTokenizer(100, 5)([]).shape == (0, 5)
    assert WordTokenizer(100, 5)(["a"]).dtype == np.int32


def test_a_caller_may_change_what_it_got():
    tokenizer = WordTokenizer(100, 5)
    tokenizer(["dog"])[:] = 0
    assert tokenizer(["dog"])[0, 0] == START


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="at least 4 and 2"):
        WordTokenizer(vocab_size=3)
