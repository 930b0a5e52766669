"""What any caption must pass, whoever said it. No model, and nothing here changes anything but text."""

from __future__ import annotations

import functools
import importlib.resources
import re
import unicodedata
from collections.abc import Sequence

from mqformer_jax.synthesize.teachers import Caption

LONGEST = 20  # words
CHARACTERS = 200
IN_A_ROW = 2  # "very very big" is English, "the the the" a search that went round in circles

# The list that we take is for chat rooms. These of its words are what is seen in pictures, or what it looks like.
INNOCENT = frozenset(
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
_LOOP = re.compile(rf"\b(\w+(?:\W+\w+){{0,3}}?)(?:\W+\1\b){{{IN_A_ROW},}}", re.IGNORECASE)


def clean(text: str) -> str:
    """Lower case, as the tokenizers of our text encoders read it; Unicode NFKC, one space between words, no punctuation
    at the end.
    """
    # what neither prints nor separates, such as half a surrogate pair, no shard could hold
    text = "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isprintable() or c.isspace())
    return " ".join(text.split()).rstrip(" .,;:!?-–—")


def refusal(text: str, longest: int = LONGEST) -> str | None:
    """Why a cleaned caption is no use: "empty", "too long" (words, or `CHARACTERS`), "not words", "profane"; None where
    it is.

    Not words: no letter, a tokenizer's special token, or up to four words that are said more than `IN_A_ROW` times in a
    row. Raises ValueError where better-profanity, whose list is read, is not installed.
    """
    if not text:
        return "empty"
    if len(text.split()) > longest or len(text) > CHARACTERS:
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
    """At most `most` captions, cleaned, best first, none that says what a better one says but for articles. Refuses
    nothing.
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
    """The list of better-profanity (MIT) but for `INNOCENT`, and the words of its longest entry.

    Only the list: its own search takes 7 ms a sentence, joins neighbours ("the pen is on the table") and reads digits
    as letters.
    """
    try:
        text = (importlib.resources.files("better_profanity") / "profanity_wordlist.txt").read_text("utf-8")
    except ModuleNotFoundError:
        raise ValueError("better_profanity is not installed: pip install -e '.[captions]'.") from None
    entries = [line.strip().lower() for line in text.splitlines()]
    # disguised spellings ("sh!t") are left out: no captioner disguises, and without the sign they would be other words
    found = {" ".join(_WORD.findall(entry)) for entry in entries if re.fullmatch(r"[a-z][a-z .'_-]*", entry)} - INNOCENT
    return frozenset(found), max(len(entry.split()) for entry in found)
