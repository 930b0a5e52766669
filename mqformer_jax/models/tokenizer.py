"""Texts to token ids. CLIP's byte-pair encoding plugs in behind the same interface as the word tokenizer here."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int


class Tokenizer(Protocol):
    """What the input pipeline and the predictor ask of a tokenizer.

    A row is: start token, the text, end token, zeros. The end token has the highest id of the vocabulary, by which a
    `TextEncoder` finds it. A text too long for `context` loses its last words, never its end token.
    """

    vocab_size: int
    context: int

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]: ...


class WordTokenizer:
    """One token a word, by a stable hash, so that no vocabulary file is needed.

    Lower case, punctuation dropped. Ids: 0 pads, 1 to vocab_size - 3 are words (two of them may share one: with 4,096 ids and a
    hundred different words, any one collides with 2 % chance), vocab_size - 2 starts a text, vocab_size - 1 ends it.
    """

    def __init__(self, vocab_size: int = 4096, context: int = 16):
        if vocab_size < 4 or context < 2:
            raise ValueError(f"WordTokenizer(vocab_size={vocab_size}, context={context}): at least 4 and 2 are needed.")
        self.vocab_size, self.context = vocab_size, context
        self._rows: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]:
        return np.stack([self._row(text) for text in texts]) if len(texts) else np.zeros((0, self.context), np.int32)

    def _row(self, text: str) -> np.ndarray:
        """Prompts come back over and over, so whole texts are remembered; the memory is emptied before it grows large."""
        if text not in self._rows:
            if len(self._rows) >= 1 << 16:
                self._rows.clear()
            words = re.findall(r"[^\W_]+", text.lower())[: self.context - 2]
            ids = [self.vocab_size - 2, *(1 + zlib.crc32(w.encode()) % (self.vocab_size - 3) for w in words), self.vocab_size - 1]
            self._rows[text] = np.pad(np.array(ids, np.int32), (0, self.context - len(ids)))
        return self._rows[text]
