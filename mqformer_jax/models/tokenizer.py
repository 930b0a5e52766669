"""Texts to token ids: CLIP's byte-pair encoding, BERT's word pieces, a table of classes, and hashed words that need no
file.
"""

from __future__ import annotations

import abc
import difflib
import html
import importlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

if TYPE_CHECKING:
    import tokenizers

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
TOKENIZER = "tokenizer.json"  # file beside a checkpoint
CLIP_MERGES = 49152 - 256 - 2  # of the longer list that OpenAI published
CLIP_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# Byte-level BPE writes a byte as one visible character: itself if it is one, else a letter from U+0100 on. In the order
# of CLIP's ids.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_SYMBOLS = {b: chr(b) for b in _VISIBLE} | {
    b: chr(0x100 + i) for i, b in enumerate(sorted({*range(256)} - {*_VISIBLE}))
}


@runtime_checkable
class Tokenizer(Protocol):
    """What the input pipeline and the predictor ask of a tokenizer.

    A row is: start token, the text, end token, zeros. A text too long for `context` loses its last tokens, never its
    end token. Of words and of CLIP, the end token has the highest id of the vocabulary, by which a `TextEncoder` finds
    it; zeros say nothing there, for 0 is CLIP's "!". Of BERT, it has no such place, but only padding is 0, by which a
    `BertTextEncoder` knows it. A class is one token without start and end, and 0 is none.
    """

    vocab_size: int
    context: int

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]: ...


class _Rows(abc.ABC):
    """What all tokenizers here share: rows padded to one length, and a memory of whole texts, for prompts come back
    over and over.

    Threads may share one; it pickles, for the processes of a data loader.
    """

    def __init__(self, vocab_size: int, context: int):
        self.vocab_size, self.context = vocab_size, context
        self._rows: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]:
        return np.concatenate([np.zeros(0, np.int32), *map(self._row, texts)]).reshape(-1, self.context)

    def _row(self, text: str) -> Int[np.ndarray, " context"]:
        row = self._rows.get(text)
        if row is None:
            if len(self._rows) >= 1 << 16:  # emptied before it grows large
                self._rows.clear()
            ids = self._ids(text)
            row = self._rows[text] = np.array(ids + [0] * (self.context - len(ids)), np.int32)
        return row

    @abc.abstractmethod
    def _ids(self, text: str) -> list[int]:
        """The tokens of one text with those that start and end it, `context` of them at most."""


class WordTokenizer(_Rows):
    """One token a word, by a stable hash, so that no vocabulary file is needed.

    Lower case, punctuation dropped. Ids: 0 pads, 1 to vocab_size - 3 are words (two of them may share one: with 4,096
    ids and a hundred different words, any one collides with 2 % chance), vocab_size - 2 starts a text, vocab_size - 1
    ends it.
    """

    def __init__(self, vocab_size: int = 4096, context: int = 16):
        if vocab_size < 4 or context < 2:
            raise ValueError(f"WordTokenizer(vocab_size={vocab_size}, context={context}): at least 4 and 2 are needed.")
        super().__init__(vocab_size, context)

    def _ids(self, text: str) -> list[int]:
        words = re.findall(r"[^\W_]+", text.lower())[: self.context - 2]
        return [
            self.vocab_size - 2,
            *(1 + zlib.crc32(w.encode()) % (self.vocab_size - 3) for w in words),
            self.vocab_size - 1,
        ]


class ClipTokenizer(_Rows):
    """CLIP's lower-case byte-level BPE (Radford et al., ICML 2021), token for token that of OpenAI's `SimpleTokenizer`.

    source: a tokenizer.json, as path or as its text: of `clip_tokenizer_json`, or of Hugging Face's CLIP folders. Only
    its vocabulary and merges are read. Cleaning and splitting are done here, since Hugging Face's differ from OpenAI's:
    no mending of mojibake, no HTML entities, letters by another version of Unicode.
    """

    def __init__(self, source: str | os.PathLike, context: int = 77):
        self._ftfy, self._regex = _package("ftfy"), _package("regex")
        self._json, engine = _engine(source, context)
        super().__init__(engine.get_vocab_size(with_added_tokens=False), context)
        self._special = {CLIP_START: engine.token_to_id(CLIP_START), CLIP_END: engine.token_to_id(CLIP_END)}
        self._model = engine.model
        ends = [self.vocab_size - 2, self.vocab_size - 1]  # the text encoder finds the end token by the highest id
        if list(self._special.values()) != ends or getattr(self._model, "end_of_word_suffix", None) != "</w>":
            raise ValueError(
                f"{_name(source)} is not CLIP's tokenizer: "
                f"a BPE with </w> whose last ids are {CLIP_START} and {CLIP_END}."
            )

    def __reduce__(self):
        return ClipTokenizer, (self._json, self.context)

    def _ids(self, text: str) -> list[int]:
        text = html.unescape(html.unescape(self._ftfy.fix_text(text)))
        text = self._regex.sub(r"\s+", " ", text.strip()).strip().lower()
        ids: list[int] = []
        for piece in self._regex.findall(CLIP_PIECES, text, flags=self._regex.IGNORECASE):
            ids += [self._special[piece]] if piece in self._special else self._pairs(piece)
            if len(ids) >= self.context:
                break
        return [self._special[CLIP_START], *ids[: self.context - 2], self._special[CLIP_END]]

    def _pairs(self, piece: str) -> list[int]:
        return [token.id for token in self._model.tokenize(piece.encode().decode("latin-1").translate(BYTE_SYMBOLS))]


class WordPieceTokenizer(_Rows):
    """BERT's word pieces (Devlin et al., NAACL 2019), all of it as the tokenizer.json says (a path, or its text)."""

    def __init__(self, source: str | os.PathLike, context: int = 128):
        self._json, self._engine = _engine(source, context)
        if type(self._engine.model).__name__ != "WordPiece" or self._engine.token_to_id("[PAD]") != 0:
            raise ValueError(f"{_name(source)} is not BERT's tokenizer: a WordPiece model in which [PAD] is 0.")
        self._engine.no_padding()
        self._engine.enable_truncation(context)
        super().__init__(self._engine.get_vocab_size(), context)

    def __reduce__(self):
        return WordPieceTokenizer, (self._json, self.context)

    def _ids(self, text: str) -> list[int]:
        # halves of an emoji would stop the engine
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._engine.encode(text).ids


class ClassTokenizer(_Rows):
    """For checkpoints with a classifier row a class and no text encoder: a prompt is the name of a class, its one token
    row + 1.

    Case and spacing do not count. "a/b", "a, b" and "a; b" are found as a whole and by each of the names; where classes
    share one, that whose whole name it is has it, else that which gives it earlier in its list, else the first. "" is
    0, padding.
    """

    def __init__(self, classes: Sequence[str]):
        names = [[_fold(name), *(_fold(part) for part in re.split("[,/;]", name))] for name in classes]
        self._tokens = {"": 0}
        for _, row, name in sorted(
            (place, row, name) for row, parts in enumerate(names) for place, name in enumerate(parts)
        ):
            self._tokens.setdefault(name, row + 1)
        super().__init__(len(classes) + 1, context=1)

    def _ids(self, text: str) -> list[int]:
        name = _fold(text)
        if name not in self._tokens:
            closest = difflib.get_close_matches(name, self._tokens, n=1, cutoff=0)
            raise ValueError(
                f"{text!r} is not among the {self.vocab_size - 1} classes of this checkpoint, "
                f"which has no text encoder; the closest is {closest[0]!r}."
            )
        return [self._tokens[name]]


def make_tokenizer(text: ConfigDict, folder: str | None = None) -> Tokenizer:
    """The tokenizer that config.model.text names.

    folder: of a converted text encoder; "clip" and "wordpiece" read tokenizer.json there.
    Raises ValueError or FileNotFoundError, one line with the mend, for a missing file or package and for fields that do
    not fit it.
    """
    if text.tokenizer == "words":
        return WordTokenizer(text.vocab_size, text.context)
    if text.tokenizer == "classes":
        if not text.classes:
            raise ValueError(
                "config.model.text.classes is empty: name the classes that the rows of the table stand for."
            )
        return ClassTokenizer(text.classes)
    path = os.path.join(folder or "", "tokenizer.json")
    if folder is None or not os.path.isfile(path):
        raise FileNotFoundError(
            f"config.model.text.tokenizer = {text.tokenizer!r} reads {path}, which is not there: "
            "convert the text encoder first (mqformer convert); its folder holds tokenizer.json."
        )
    tokenizer = {"clip": ClipTokenizer, "wordpiece": WordPieceTokenizer}[text.tokenizer](path, text.context)
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"config.model.text.vocab_size = {text.vocab_size}: {path} has {tokenizer.vocab_size} tokens; "
            "set it to that."
        )
    return tokenizer


def clip_tokenizer_json(merges: str) -> str:
    """A tokenizer.json from the text of CLIP's merge list (bpe_simple_vocab_16e6.txt: a header, then two symbols a
    line).

    Ids: the bytes, the bytes that end a word, the merges in their order, start, end: 49,408 in all. Other programs can
    read the file too; their cleaning and splitting are then those of Hugging Face.
    """
    pairs = [line.split() for line in merges.strip().split("\n")[1 : CLIP_MERGES + 1]]
    wrong = [number for number, pair in enumerate(pairs, 2) if len(pair) != 2]
    if wrong or not pairs:
        raise ValueError(
            f"line {wrong[0] if wrong else 2} of the merge list is not two symbols: "
            "give CLIP's bpe_simple_vocab_16e6.txt."
        )
    symbols = list(BYTE_SYMBOLS.values())
    vocab = {
        token: i
        for i, token in enumerate(
            [*symbols, *(s + "</w>" for s in symbols), *map("".join, pairs), CLIP_START, CLIP_END]
        )
    }
    split = dict(type="Split", pattern=dict(Regex=f"(?i:{CLIP_PIECES})"), behavior="Removed", invert=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    spaces = dict(type="Replace", pattern=dict(Regex=r"\s+"), content=" ")
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    contents = dict(
        version="1.0",
        added_tokens=[dict(id=vocab[token], content=token, **flags) for token in (CLIP_START, CLIP_END)],
        normalizer=dict(type="Sequence", normalizers=[dict(type="NFC"), spaces, dict(type="Lowercase")]),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
        post_processor=dict(
            type="RobertaProcessing",
            sep=[CLIP_END, vocab[CLIP_END]],
            cls=[CLIP_START, vocab[CLIP_START]],
            trim_offsets=False,
            add_prefix_space=False,
        ),
        decoder=byte_level,
        model=dict(
            type="BPE",
            unk_token=CLIP_END,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            vocab=vocab,
            merges=pairs,
        ),
    )
    return json.dumps(contents, ensure_ascii=False)


def _fold(name: str) -> str:
    return " ".join(name.lower().split())


def _is_json(source: str | os.PathLike) -> bool:
    return isinstance(source, str) and source.lstrip().startswith("{")


def _name(source: str | os.PathLike) -> str:
    """Of a source in an error."""
    return "the given JSON" if _is_json(source) else str(source)


def _engine(source: str | os.PathLike, context: int) -> tuple[str, tokenizers.Tokenizer]:
    """The text of a tokenizer.json, and Hugging Face's engine made of it."""
    if context < 2:
        raise ValueError(f"context = {context}: at least 2 tokens, for the start and the end of a text.")
    contents = source if _is_json(source) else pathlib.Path(source).read_text(encoding="utf-8")
    engine = _package("tokenizers").Tokenizer
    try:
        return contents, engine.from_str(contents)
    except Exception as e:  # it raises no narrower one
        raise ValueError(f"{_name(source)} is no tokenizer.json: {e}.") from None


def _package(name: str) -> ModuleType:
    """Imported only where it is needed: recipes that hash words do without."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError(f"this tokenizer needs the package {name}: pip install 'mqformer_jax[text]'.") from None
