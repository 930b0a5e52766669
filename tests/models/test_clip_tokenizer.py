"""CLIP's tokenizer: by hand with a handful of merges, and against OpenAI's file where its package can be had."""

from __future__ import annotations

import gzip
import importlib.util
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mqformer_jax.models.tokenizer import ClipTokenizer, clip_tokenizer_json

pytest.importorskip("ftfy")
pytest.importorskip("regex")
engine = pytest.importorskip("tokenizers")

# 512 symbols come first: the bytes, from "!" on, and the bytes that end a word. Then the merges, the start and the end.
FEW = clip_tokenizer_json("#version\nc a\nca t</w>\nt h\nth e</w>\n")
CA, CAT, TH, THE, START, END = range(512, 518)
BANG, A, UNDERSCORE, ONE = (256 + ord(c) - ord("!") for c in "!a_1")  # each ends a word

TEXTS = """
a photo of a cat
two dogs lying on a couch, one of them asleep.
woman in red (3rd from the left)
aerosol_can, TV/monitor, wall-other-merged
it's what they'd've said; I'LL say no more, WE'RE done
$1,299.00 at 5:30pm on 12/24
naïve café, Größe, señor; ½ ² Ⅷ x³
Привет мир, שלום עולם, مرحبا بالعالم
日本語のテキスト 한국어 문장 中文句子没有空格 नमस्ते ไทย
ΑΣ ΣΑΣ İstanbul ISTANBUL ıŞ ﬁne Ａｂｃ
👩‍👩‍👧 🇩🇪 👍🏽
\u00e2\u20ac\u0153quoted\u00e2\u20ac it\u00e2\u20ac\u2122s caf\u00c3\u00a9
&lt;b&gt; &amp;amp; &#39;x&#39; &eacute; &nbsp; &lt;|endoftext|&gt;
<|endoftext|> x<|startoftext|>y!<|endoftext|> <|ENDOFTEXT|> <|\u017ftartoftext|>
e\u0301 a\u0308\u0304 zero\u200bwidth \ufeff \ud800 \udc00\ud83d\ude00
\x00 \x1b[31m \x1f \x85 spaces\t and \u3000 lines\r \u2028
''s '\u017f _ __ ' '"'
""".strip().split("\n")


@pytest.fixture(scope="module")
def openai(published):
    """The folder of OpenAI's merge list and tokenizer."""
    return published("clip-anytorch") / "clip"


@pytest.fixture(scope="module")
def clip(openai):
    return ClipTokenizer(
        clip_tokenizer_json(gzip.decompress((openai / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()), 77
    )


@pytest.fixture(scope="module")
def reference(openai):
    """OpenAI's `SimpleTokenizer`, from its own file."""
    spec = importlib.util.spec_from_file_location("simple_tokenizer", openai / "simple_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def strings(count: int) -> list[str]:
    """Hard texts as they are, then texts of random pieces of them, then random code points of one or of many blocks."""
    draw = random.Random(0)
    pieces = [*TEXTS, *(word for text in TEXTS for word in text.split()), *" \t'_-.,!?0123456789&;<|>"]
    mixed = ["".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(count // 2)]
    starts = [draw.choice([0, 0x2000, 0x1F300, draw.randrange(0x110000 - 400)]) for _ in range(count // 4)]
    blocks = ["".join(chr(start + draw.randrange(400)) for _ in range(12)) for start in starts]
    anywhere = ["".join(chr(draw.randrange(0x110000)) for _ in range(12)) for _ in range(count // 4)]
    return ["", " ", *TEXTS, *mixed, *blocks, *anywhere]


def few(*texts: str, context: int = 8) -> list[list[int]]:
    return [np.trim_zeros(row, "b").tolist() for row in ClipTokenizer(FEW, context)(texts)]


def test_merges_apply_within_words():
    assert few("the cat", "thecat") == [[START, THE, CAT, END], [START, TH, ord("e") - ord("!"), CAT, END]]


def test_case_and_whitespace_are_normalized():
    assert few("  The\t\n CAT ", "the\u3000cat") == few("the cat", "the cat")


def test_html_entities_and_mojibake_are_fixed_before_tokenizing():
    assert few("&amp;amp;", "&nbsp;cat&#33;", "donâ€™t") == few("&", "cat!", "don't")


def test_digits_are_split_and_punctuation_runs_stay_together():
    assert few("11 a1") == [[START, ONE, ONE, A, ONE, END]]
    assert few("!_ .!") == [[START, 0, UNDERSCORE, ord(".") - ord("!"), BANG, END]]


def test_empty_text_is_start_and_end_tokens():
    assert few("", " \n", "\x00") == [[START, END]] * 3


def test_long_text_is_truncated_but_keeps_the_end_token():
    assert few("cat the cat the cat", context=4) == [[START, CAT, THE, END]]
    assert few("cat the", context=4) == [[START, CAT, THE, END]]
    assert few("cat", context=2) == [[START, END]]


def test_the_end_token_has_the_highest_id():
    tokenizer = ClipTokenizer(FEW, 8)
    assert tokenizer.vocab_size == END + 1
    assert tokenizer(["cat", "", "the cat !"]).argmax(-1).tolist() == [2, 1, 4]


def test_special_tokens_in_a_text_are_parsed_as_openai_does():
    assert few("cat<|endoftext|>") == [[START, CAT, END, END]]
    assert len(few("!<|endoftext|>", context=40)[0]) > 10  # signs before it swallow its first two


def test_only_vocabulary_and_merges_of_a_hugging_face_file_are_used(tmp_path):
    contents = json.loads(FEW)
    contents["model"]["merges"] = [" ".join(pair) for pair in contents["model"]["merges"]]  # as files were written once
    contents["pre_tokenizer"] = contents["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    assert np.array_equal(ClipTokenizer(tmp_path / "tokenizer.json", 40)(TEXTS), ClipTokenizer(FEW, 40)(TEXTS))


def test_tokenizers_library_gives_the_same_ids_for_clean_text():
    for text in ("The cat", "the cat's 11 cats!", "", "日本語 naïve"):
        assert [engine.Tokenizer.from_str(FEW).encode(text).ids] == few(text, context=60)


def test_clip_tokenizer_survives_pickling():
    tokenizer = ClipTokenizer(FEW, 8)
    assert np.array_equal(pickle.loads(pickle.dumps(tokenizer))(["the cat"]), tokenizer(["the cat"]))


def test_clip_tokenizer_is_thread_safe():
    texts = strings(200)
    alone, shared = ClipTokenizer(FEW, 16)(texts), ClipTokenizer(FEW, 16)
    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(rows, alone) for rows in threads.map(shared, [texts] * 4))


def test_invalid_tokenizer_files_and_context_are_rejected(tmp_path):
    word = dict(version="1.0", model=dict(type="WordLevel", vocab={"a": 0}, unk_token="a"))
    (tmp_path / "words.json").write_text(json.dumps(word))
    with pytest.raises(ValueError, match="words.json is not CLIP's tokenizer"):
        ClipTokenizer(tmp_path / "words.json")
    with pytest.raises(ValueError, match="a BPE with </w> whose last ids"):
        ClipTokenizer(FEW.replace('"end_of_word_suffix": "</w>"', '"end_of_word_suffix": null'))
    with pytest.raises(ValueError, match="the given JSON is not a valid tokenizer.json"):
        ClipTokenizer("{}")
    with pytest.raises(ValueError, match="at least 2 tokens"):
        ClipTokenizer(FEW, 1)


def test_malformed_merge_list_is_rejected():
    with pytest.raises(ValueError, match="line 3 of the merge list is not two symbols"):
        clip_tokenizer_json("#version\na b\nabc\n")
    with pytest.raises(ValueError, match="line 2"):
        clip_tokenizer_json("")


def test_token_ids_match_known_clip_ids(clip):
    assert clip.vocab_size == 49408
    for text, ids in {
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "hello world!!": [3306, 1002, 748],
        "a diagram": [320, 22697],
        "a dog": [320, 1929],
    }.items():
        assert clip([text])[0].tolist() == [49406, *ids, 49407] + [0] * (75 - len(ids))


def test_token_ids_match_openai_on_thousands_of_strings(clip, reference):
    texts = strings(5000)
    expected = [[49406, *reference.encode(text)[:75], 49407] for text in texts]
    wrong = [
        text for text, row, ids in zip(texts, clip(texts), expected) if row.tolist() != ids + [0] * (77 - len(ids))
    ]
    assert not wrong, f"{len(wrong)} of {len(texts)}, the first {wrong[:3]!a}"
