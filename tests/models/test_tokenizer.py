"""The tokenizers of words, word pieces and classes, and the choice of one. CLIP's has a file of its own."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mqformer_jax.config import base
from mqformer_jax.models.tokenizer import (
    ClassTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
    clip_tokenizer_json,
    make_tokenizer,
)

START, END = 98, 99
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "dog", "##s", "cafe", "!", "##g", "d", "##o"]
CLASSES = ("screen door, screen", "Dining  Table", "screen, silver screen", "tv/monitor", "car; auto")


def tokens(*texts: str) -> list[list[int]]:
    return WordTokenizer(vocab_size=100, context=5)(texts).tolist()


def test_token_row_is_start_words_end_and_zero_padding():
    (row,) = tokens("red dog")
    assert row[0] == START and row[3:] == [END, 0]
    assert all(1 <= word <= 97 for word in row[1:3])


def test_case_and_punctuation_are_ignored():
    assert tokens("Red_dog!") == tokens("red, dog")
    assert tokens("red dog") != tokens("dog red")


def test_empty_text_is_start_and_end_tokens():
    assert tokens("", "?!") == [[START, END, 0, 0, 0]] * 2


def test_a_long_text_keeps_its_end_token():
    (row,) = tokens("the small red dog on the left")
    assert row[:4] == tokens("the small red")[0][:4] and row[4] == END


def test_word_ids_are_derived_from_crc32():
    assert WordTokenizer(4096, 4)(["dog"]).tolist() == [[4094, 1 + 0x812C397D % 4093, 4095, 0]]  # CRC-32 of "dog"


def test_non_latin_letters_form_words():
    assert tokens("собака")[0][1:3] != [END, 0]


def test_empty_text_list_gives_zero_rows():
    assert WordTokenizer(100, 5)([]).shape == (0, 5)
    assert WordTokenizer(100, 5)(["a"]).dtype == np.int32


def test_modifying_returned_tokens_does_not_affect_later_calls():
    tokenizer = WordTokenizer(100, 5)
    tokenizer(["dog"])[:] = 0
    assert tokenizer(["dog"])[0, 0] == START


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size of at least 4 and a context of at least 2"):
        WordTokenizer(vocab_size=3)


def test_word_tokenizer_is_thread_safe_and_survives_pickling():
    tokenizer, texts = WordTokenizer(1000, 5), [str(i % 97) for i in range(300)]
    rows = tokenizer(texts)
    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(got, rows) for got in threads.map(WordTokenizer(1000, 5), [texts] * 4))
    assert np.array_equal(pickle.loads(pickle.dumps(tokenizer))(texts), rows)


@pytest.fixture(scope="module")
def word_pieces() -> str:
    """A tokenizer.json as BERT's, with a few words, and as some files are: cut and padded to lengths of its own."""
    engine = pytest.importorskip("tokenizers")
    bert = engine.Tokenizer(engine.models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    bert.normalizer = engine.normalizers.BertNormalizer()
    bert.pre_tokenizer = engine.pre_tokenizers.BertPreTokenizer()
    bert.post_processor = engine.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert.enable_truncation(4)
    bert.enable_padding(length=6)
    return bert.to_str()


def pieces(word_pieces: str, *texts: str, context: int = 8) -> list[list[str]]:
    return [[PIECES[i] for i in row] for row in WordPieceTokenizer(word_pieces, context)(texts)]


def test_word_pieces_are_longest_matches_in_the_vocabulary(word_pieces):
    (row,) = pieces(word_pieces, "Dogs, RED café!")
    assert row == ["[CLS]", "dog", "##s", "[UNK]", "red", "cafe", "!", "[SEP]"]


def test_word_piece_rows_are_padded_and_truncated_to_the_context(word_pieces):
    assert pieces(word_pieces, "", "dog", context=4) == [
        ["[CLS]", "[SEP]", "[PAD]", "[PAD]"],
        ["[CLS]", "dog", "[SEP]", "[PAD]"],
    ]
    assert pieces(word_pieces, "red dogs red", context=4) == [["[CLS]", "red", "dog", "[SEP]"]]
    assert pieces(word_pieces, "red", context=2) == [["[CLS]", "[SEP]"]]


@pytest.mark.parity
def test_word_pieces_match_transformers(word_pieces):
    transformers = pytest.importorskip("transformers")
    fast = pytest.importorskip("tokenizers").Tokenizer.from_str(word_pieces)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]")
    texts = ["", "red dogs", "Café\u0301 d0g!!", "dogs " * 9, "日本 \x00\u200b red", "[CLS] dog [SEP]", "doggo" * 30]
    expected = reference(texts, padding="max_length", truncation=True, max_length=7)["input_ids"]
    assert WordPieceTokenizer(word_pieces, 7)(texts).tolist() == expected


def test_word_pieces_ignore_lone_surrogates(word_pieces):
    assert pieces(word_pieces, "red \ud83d dog", context=4) == pieces(word_pieces, "red dog", context=4)


def test_word_piece_tokenizer_survives_pickling(word_pieces):
    tokenizer = WordPieceTokenizer(word_pieces, 6)
    assert np.array_equal(pickle.loads(pickle.dumps(tokenizer))(["red dogs"]), tokenizer(["red dogs"]))


def test_word_piece_tokenizer_rejects_other_tokenizer_files(word_pieces):
    with pytest.raises(ValueError, match="the given JSON is not BERT's tokenizer"):
        WordPieceTokenizer(clip_tokenizer_json("#version\na b\n"))
    with pytest.raises(ValueError, match=r"\[PAD\] is 0"):
        WordPieceTokenizer(word_pieces.replace('"[PAD]":0', '"[PAD]":1').replace('"[UNK]":1', '"[UNK]":0'))


def test_class_token_is_its_index_plus_one():
    tokenizer = ClassTokenizer(["dog", "cat"])
    assert tokenizer(["cat", "dog", ""]).tolist() == [[2], [1], [0]]
    assert (tokenizer.vocab_size, tokenizer.context) == (3, 1)


def test_class_is_found_by_any_of_its_names_case_insensitively():
    tokenizer = ClassTokenizer(CLASSES)
    for row, names in enumerate(
        [["Screen Door"], ["dining table "], ["silver  screen"], ["TV", "monitor"], ["auto", "Car"]], 1
    ):
        assert tokenizer(names).tolist() == [[row]] * len(names)
    assert tokenizer(CLASSES)[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_shared_name_maps_to_the_class_that_lists_it_earliest():
    assert ClassTokenizer(CLASSES)(["screen"]).tolist() == [[3]]  # its first name, the second of "screen door, screen"
    assert ClassTokenizer(["a, b", "b"])(["b"]).tolist() == [[2]]


def test_prompt_that_is_not_a_class_is_rejected():
    with pytest.raises(
        ValueError,
        match="'motor' is not among the 5 classes of this checkpoint, which has no text.*closest is 'monitor'",
    ):
        ClassTokenizer(CLASSES)(["car", "motor"])


def text_config(**fields):
    text = base().model.text
    text.update(fields)
    return text


def test_make_tokenizer_builds_the_configured_tokenizer(tmp_path, word_pieces):
    words = make_tokenizer(text_config(tokenizer="words", vocab_size=100, context=5))
    assert words(["red dog"]).tolist() == tokens("red dog")
    assert make_tokenizer(text_config(tokenizer="classes", classes=("dog", "cat")))(["cat"]).tolist() == [[2]]
    (tmp_path / "tokenizer.json").write_text(word_pieces)
    row = make_tokenizer(text_config(tokenizer="wordpiece", vocab_size=12, context=5), str(tmp_path))(["dog"])
    assert row.tolist() == [[2, 5, 3, 0, 0]]
    (tmp_path / "tokenizer.json").write_text(clip_tokenizer_json("#version\na b\n"))
    pytest.importorskip("ftfy")
    assert make_tokenizer(text_config(tokenizer="clip", context=5), str(tmp_path))(["ab"]).tolist()[0][:2] == [513, 64]


@pytest.mark.parametrize(
    "fields, file, line",
    [
        (dict(tokenizer="classes"), None, "config.model.text.classes is empty"),
        (dict(tokenizer="clip"), None, "tokenizer.json, which does not exist: convert the text encoder first"),
        (
            dict(tokenizer="wordpiece", vocab_size=9),
            "pieces",
            "text.vocab_size = 9, .*tokenizer.json has 12 tokens: set it to 12",
        ),
        (dict(tokenizer="clip"), "pieces", "tokenizer.json is not CLIP's tokenizer"),
    ],
)
def test_invalid_tokenizer_config_is_a_one_line_error(fields, file, line, tmp_path, word_pieces):
    if fields["tokenizer"] == "clip" and file:
        pytest.importorskip("ftfy")
    if file:
        (tmp_path / "tokenizer.json").write_text(word_pieces)
    with pytest.raises((ValueError, FileNotFoundError), match=line) as error:
        make_tokenizer(text_config(**fields), str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["ftfy", "regex", "tokenizers"])
def test_missing_package_error_names_the_install_command(package, monkeypatch, tmp_path):
    for name in ("ftfy", "regex", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'mqformer_jax\[text\]'"):
        make_tokenizer(text_config(tokenizer="clip"), str(tmp_path))
