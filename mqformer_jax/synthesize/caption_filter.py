"""Clean the text of captions, and drop malformed, profane and duplicate ones. The rules apply to every captioner."""

from __future__ import annotations

import functools
import importlib.resources
import re
import unicodedata
from collections.abc import Sequence

from mqformer_jax.synthesize.teachers import Caption

MAX_WORDS = 20
MAX_CHARACTERS = 200
MAX_REPEATS = 2  # in a row: "very very big" is English, "the the the" is a typical failure of beam search

# The profanity list (`_profane`) is made for chat rooms. Its entries below are allowed, as they may describe an image.
ALLOWED_WORDS = frozenset(
    """
    blue waffle/breasts/brown shower/cock/cocks/cow girl/cow girls/cowgirl/cowgirls/crotch/drunk/dummy/enlargement/erect
    facial/fanny/fat/flange/gay/god/golden shower/hemp/hoar/hookah/hump/humped/jerk/kill/knob/len/loin/loins/maxi/muff
    naked/nappy/nipple/nipples/nude/nudes/oral/organ/paddy/pantie/panties/panty/pasty/pawn/pee/playboy/pollock/poop/pot
    potty/puss/revue/rum/rump/sandbar/screw/screwed/screwing/scum/seaman/seamen/shag/slope/sniper/snuff/steamy/strip
    stroke/suck/sucking/tampon/teat/tit/titi/toots/ugly/undies/urinal/urine/uzi/virgin/vixen/vodka/vomit/wad/wang/weed
    weenie/weiner/whiz/woody
    """.strip()
    .replace("\n    ", "/")
    .split("/")
)

_WORD = re.compile(r"[^\W\d_]+")
_TOKEN = re.compile(r"<[^<>\s]*>|\[(?:unk|pad|cls|sep|mask|dec|enc)\]|\ufffd", re.IGNORECASE)
_LOOP = re.compile(rf"\b(\w+(?:\W+\w+){{0,3}}?)(?:\W+\1\b){{{MAX_REPEATS},}}", re.IGNORECASE)


def clean(text: str) -> str:
    """Return the text in lower case and Unicode NFKC, with single spaces and no punctuation at the end."""
    # Records cannot hold characters that are neither printable nor spaces, such as half a surrogate pair.
    text = "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isprintable() or c.isspace())
    return " ".join(text.split()).rstrip(" .,;:!?-–—")


def rejection_reason(text: str, longest: int = MAX_WORDS) -> str | None:
    """Return why a cleaned caption is rejected, or None if it passes.

    Reasons are "empty", "too long" (more than `longest` words or `MAX_CHARACTERS` characters), "not words" (no letter,
    a special token of a tokenizer, or a group of up to four words that occurs more than `MAX_REPEATS` times in a row)
    and "profane". Raises ValueError if the package better-profanity, whose word list is used, is not installed.
    """
    if not text:
        return "empty"
    if len(text.split()) > longest or len(text) > MAX_CHARACTERS:
        return "too long"
    words = _WORD.findall(text.lower())
    if not words or _TOKEN.search(text) or _LOOP.search(text):
        return "not words"
    profane, most = _profane()
    if any(
        " ".join(words[i:j]) in profane for i in range(len(words)) for j in range(i + 1, min(i + most, len(words)) + 1)
    ):
        return "profane"
    return None


def distinct(captions: Sequence[Caption], most: int) -> list[Caption]:
    """Return at most `most` captions, cleaned, best first.

    If several captions differ only in articles, only the one with the highest score is kept.
    """
    kept: dict[str, Caption] = {}
    for caption in sorted(captions, key=lambda caption: -caption.score):
        text = clean(caption.text)
        kept.setdefault(
            " ".join(word for word in text.split() if word not in ("a", "an", "the")), Caption(text, caption.score)
        )
    return list(kept.values())[:most]


@functools.cache
def _profane() -> tuple[frozenset[str], int]:
    """Return the word list of better-profanity (MIT) without `ALLOWED_WORDS`, and the length of its longest entry.

    The length is a number of words. The package's own search is not used: it takes 7 ms per sentence, finds words
    across spaces ("the pen is on the table") and reads digits as letters.
    """
    try:
        text = (importlib.resources.files("better_profanity") / "profanity_wordlist.txt").read_text("utf-8")
    except ModuleNotFoundError:
        raise ValueError("better_profanity is not installed: pip install 'mqformer_jax[captions]'.") from None
    entries = [line.strip().lower() for line in text.splitlines()]
    # Skip spellings with symbols ("sh!t"): captioners do not write them, and without the symbol they are other words.
    found = {
        " ".join(_WORD.findall(entry)) for entry in entries if re.fullmatch(r"[a-z][a-z .'_-]*", entry)
    } - ALLOWED_WORDS
    return frozenset(found), max(len(entry.split()) for entry in found)
