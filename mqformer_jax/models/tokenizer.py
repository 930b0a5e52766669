"""Tokenizers: CLIP's byte-pair encoding, BERT's word pieces, a fixed list of class names, and hashed words.

CLIP's and BERT's tokenizers read a file, tokenizer.json.
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
TOKENIZER = "tokenizer.json"  # file name in a checkpoint's folder
CLIP_MERGES = 49152 - 256 - 2  # CLIP uses this many merges, the first of a longer list that OpenAI published
CLIP_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# Byte-level BPE represents each byte by one visible character: the byte's own if it is visible, else one from U+0100
# on. The symbols are in the order of CLIP's ids.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_SYMBOLS = {b: chr(b) for b in _VISIBLE} | {
    b: chr(0x100 + i) for i, b in enumerate(sorted({*range(256)} - {*_VISIBLE}))
}


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a tokenizer.

    A call returns one row of `context` ids per text: the start token, the text, the end token, then zeros. A text that
    is too long for `context` loses its last tokens but keeps its end token.

    - Hashed words and CLIP: the end token has the highest id, by which `TextEncoder` finds it. An id of 0 is not always
      padding, since it also stands for "!" in CLIP.
    - BERT: only padding has id 0, by which `BertTextEncoder` finds it.
    - Classes: a text is one token, without start and end tokens; 0 is padding.
    """

    vocab_size: int
    context: int

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]: ...


class _Rows(abc.ABC):
    """Base class that pads each text's ids to `context` and caches them, since prompts repeat.

    Threads may share a tokenizer. It can be pickled, so that a data loader can send it to its processes.
    """

    def __init__(self, vocab_size: int, context: int):
        self.vocab_size, self.context = vocab_size, context
        self._rows: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]:
        return np.concatenate([np.zeros(0, np.int32), *map(self._row, texts)]).reshape(-1, self.context)

    def _row(self, text: str) -> Int[np.ndarray, " context"]:
        row = self._rows.get(text)
        if row is None:
            if len(self._rows) >= 1 << 16:  # bounds the memory of the cache
                self._rows.clear()
            ids = self._ids(text)
            row = self._rows[text] = np.array(ids + [0] * (self.context - len(ids)), np.int32)
        return row

    @abc.abstractmethod
    def _ids(self, text: str) -> list[int]:
        """Return the ids of one text, at most `context`. They include the start and end tokens, if there are any."""


class WordTokenizer(_Rows):
    """Tokenizer that hashes each word to one token (CRC-32), so that it needs no vocabulary file.

    Words are lower-cased and punctuation is dropped. Ids: 0 is padding, 1 to vocab_size - 3 are words, vocab_size - 2
    is the start token, and vocab_size - 1 is the end token. Two words may share an id: with 4,096 ids and a hundred
    different words, the probability that a given word shares its id is 2 %.
    """

    def __init__(self, vocab_size: int = 4096, context: int = 16):
        if vocab_size < 4 or context < 2:
            raise ValueError(
                f"config.model.text has vocab_size = {vocab_size} and context = {context}: "
                "hashed words need a vocab_size of at least 4 and a context of at least 2."
            )
        super().__init__(vocab_size, context)

    def _ids(self, text: str) -> list[int]:
        words = re.findall(r"[^\W_]+", text.lower())[: self.context - 2]
        return [
            self.vocab_size - 2,
            *(1 + zlib.crc32(w.encode()) % (self.vocab_size - 3) for w in words),
            self.vocab_size - 1,
        ]


class ClipTokenizer(_Rows):
    """CLIP's lower-case byte-level BPE (Radford et al., ICML 2021), with the same tokens as OpenAI's `SimpleTokenizer`.

    source: path or contents of a tokenizer.json, from `clip_tokenizer_json` or from a Hugging Face CLIP folder. Only
    its vocabulary and merges are read. Texts are cleaned and split here as OpenAI does. Hugging Face differs: it does
    not repair mojibake or decode HTML entities, and it follows another version of Unicode.
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
                f"expected a BPE with </w> whose last ids are {CLIP_START} and {CLIP_END}. Use CLIP's tokenizer.json."
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
    """BERT's WordPiece tokenizer (Devlin et al., NAACL 2019). source: path or contents of a tokenizer.json."""

    def __init__(self, source: str | os.PathLike, context: int = 128):
        self._json, self._engine = _engine(source, context)
        if type(self._engine.model).__name__ != "WordPiece" or self._engine.token_to_id("[PAD]") != 0:
            raise ValueError(
                f"{_name(source)} is not BERT's tokenizer: expected a WordPiece model where [PAD] is 0. "
                "Use the tokenizer.json of a BERT model."
            )
        self._engine.no_padding()
        self._engine.enable_truncation(context)
        super().__init__(self._engine.get_vocab_size(), context)

    def __reduce__(self):
        return WordPieceTokenizer, (self._json, self.context)

    def _ids(self, text: str) -> list[int]:
        # replace lone surrogates, which the engine cannot encode
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._engine.encode(text).ids


class ClassTokenizer(_Rows):
    """Tokenizer for checkpoints without a text encoder: a prompt is a class name, and its token is the class's row + 1.

    Case and spacing do not matter. A class "a/b", "a, b" or "a; b" is found by its full name and by each of its parts.
    If several classes match, a full name wins over a part, then an earlier part wins, then an earlier class. The empty
    text has token 0, padding.
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
                f"which has no text encoder: use a name in config.model.text.classes; the closest is {closest[0]!r}."
            )
        return [self._tokens[name]]


def make_tokenizer(text: ConfigDict, folder: str | None = None) -> Tokenizer:
    """Return the tokenizer that `text` (`config.model.text`) describes.

    folder: a folder with a tokenizer.json, which "clip" and "wordpiece" read (a workdir or a converted text encoder).
    Raises ValueError or FileNotFoundError, with a message of one line, if a file or package is missing or if `text`
    does not fit the file.
    """
    if text.tokenizer == "words":
        return WordTokenizer(text.vocab_size, text.context)
    if text.tokenizer == "classes":
        if not text.classes:
            raise ValueError(
                "config.model.text.classes is empty: list the class of each row of the checkpoint's class table."
            )
        return ClassTokenizer(text.classes)
    path = os.path.join(folder or "", "tokenizer.json")
    if folder is None or not os.path.isfile(path):
        raise FileNotFoundError(
            f"config.model.text.tokenizer = {text.tokenizer!r} reads {path}, which does not exist: "
            "convert the text encoder first (mqformer convert), then list the converted folder in config.init_from."
        )
    tokenizer = {"clip": ClipTokenizer, "wordpiece": WordPieceTokenizer}[text.tokenizer](path, text.context)
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"config.model.text.vocab_size = {text.vocab_size}, but {path} has {tokenizer.vocab_size} tokens: "
            f"set it to {tokenizer.vocab_size}."
        )
    return tokenizer


def clip_tokenizer_json(merges: str) -> str:
    """Return the contents of a tokenizer.json for CLIP.

    merges: contents of CLIP's bpe_simple_vocab_16e6.txt: a header, then two symbols per line.

    The 49,408 ids are, in this order: the bytes, the bytes at the end of a word, the merges, the start token and the
    end token. Other programs can read the file, but they clean and split texts as Hugging Face does (see
    `ClipTokenizer`). Raises ValueError if a line is malformed.
    """
    pairs = [line.split() for line in merges.strip().split("\n")[1 : CLIP_MERGES + 1]]
    wrong = [number for number, pair in enumerate(pairs, 2) if len(pair) != 2]
    if wrong or not pairs:
        raise ValueError(
            f"line {wrong[0] if wrong else 2} of the merge list is not two symbols: "
            "use CLIP's bpe_simple_vocab_16e6.txt."
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
    """Return the name of a source for an error message."""
    return "the given JSON" if _is_json(source) else str(source)


def _engine(source: str | os.PathLike, context: int) -> tuple[str, tokenizers.Tokenizer]:
    """Return the contents of a tokenizer.json and the Hugging Face tokenizer made from it."""
    if context < 2:
        raise ValueError(
            f"config.model.text.context = {context}: use at least 2 tokens, for the start and the end of a text."
        )
    contents = source if _is_json(source) else pathlib.Path(source).read_text(encoding="utf-8")
    engine = _package("tokenizers").Tokenizer
    try:
        return contents, engine.from_str(contents)
    except Exception as e:  # the library raises no narrower type
        raise ValueError(
            f"{_name(source)} is not a valid tokenizer.json ({e}): replace it, or convert the text encoder again."
        ) from None


def _package(name: str) -> ModuleType:
    """Import an optional package. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError(f"this tokenizer needs the package {name}: pip install 'mqformer_jax[text]'.") from None
