"""Which words may stand for a class in a caption, and which other classes they may mean."""

from __future__ import annotations

import functools
import re

from mqformer_jax.input.example import Prompt
from mqformer_jax.input.prompts import mirror
from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record

# Each of these may be any other of them: a data set that has "person" and "man" calls most men by one of the two.
_PEOPLE = frozenset(
    "person people human man men woman women boy girl child children kid baby toddler lady gentleman guy adult "
    "pedestrian rider passenger driver cyclist biker player skier surfer skater skateboarder snowboarder swimmer "
    "worker soldier officer policeman".split()
)
_BODY = frozenset("body skin head face hair eye ear nose mouth lip neck arm hand finger leg knee foot feet".split())
# Words that many classes answer to, whatever their names.
_GENERAL = frozenset(
    "thing object item animal vehicle food fruit vegetable furniture clothing clothes toy tool container other".split()
)
# What is seen in these or through them is not their own colour.
_SEE_THROUGH = frozenset(
    "glass window mirror tv television screen monitor laptop goggles sunglasses racket racquet net fence "
    "cage spoon fork knife".split()
)
_PLAIN = re.compile(r"[a-z][a-z' -]*")


class Nouns:
    """The words for the classes of one record.

    A word is used only where all that it may mean is labelled. Every class that it may mean must be complete: no crowd
    and no region of it in the record, and not partial; where the set is not exhaustive, the class must also be labelled
    here or be known to be absent. (Of a set that is not exhaustive, a class with segments is taken as labelled in full
    unless the record says partial; the sets whose objects are labelled at will, Visual Genome's and RefCOCO's, say it
    of every class.)
    """

    def __init__(self, record: Record, info: DatasetInfo):
        self._info = info
        present = {s.class_id for s in record.segments if s.class_id is not None}
        regions = {
            s.class_id
            for s in record.segments
            if s.class_id is not None and (s.crowd or not info.classes[s.class_id].thing)
        }
        self._incomplete = regions | set(record.partial_classes)
        if not info.exhaustive:
            self._incomplete |= set(range(len(info.classes))) - present - set(record.absent_classes)

    def of(self, class_id: int) -> tuple[str, ...]:
        """The words that a caption may use for the class, its display name first; () where there is none."""
        if class_id in self._incomplete:
            return ()
        texts = (" ".join(text.replace("_", " ").lower().split()) for text in self._info.classes[class_id].texts)
        return tuple(text for text in dict.fromkeys(texts) if _sayable(text) and not self._may_be_unlabelled(text))

    def _may_be_unlabelled(self, noun: str) -> bool:
        return any(belief(noun, self._info.classes[i], narrower=False) >= 0 for i in self._incomplete)


def belief(noun: str, of: ClassInfo, narrower: bool = True) -> float:
    """How surely things of the class are what the noun says: 1 if it has this name, 0 if it may be, -1 if not.

    It may be where one name ends in the other: a teddy bear may pass for a bear and, if `narrower`, a bear for a teddy
    bear.
    """
    return max(_compare(_words(noun), _words(text), narrower) for text in of.texts)


def has_looks(noun: str) -> bool:
    """Whether colour and size may be said with the noun: not of people, of whom they say something else, nor of what is
    seen through.
    """
    return _words(noun)[-1] not in _PEOPLE | _BODY and not _SEE_THROUGH.intersection(_words_kept(noun))


def _compare(noun: tuple[str, ...], name: tuple[str, ...], narrower: bool) -> float:
    if noun == name:
        return 1.0
    shorter = min(len(noun), len(name)) if narrower else len(noun)
    if noun[-shorter:] == name[-shorter:] or (noun[-1] in _PEOPLE and name[-1] in _PEOPLE):
        return 0.0
    return -1.0


def _sayable(noun: str) -> bool:
    """Whether "the ..." reads well, and does in the mirrored image: no bracket, no word that names half the world, no
    side.
    """
    mirrored = mirror(Prompt((f"the right {noun}",), True)) == Prompt((f"the left {noun}",), True)
    return bool(_PLAIN.fullmatch(noun)) and not _GENERAL.intersection(_words_kept(noun)) and mirrored


@functools.cache
def _words(text: str) -> tuple[str, ...]:
    """The words to compare by: what stands in brackets is no part of a name ("bow (weapon)"), and "skis" are a
    "ski".
    """
    *first, last = _words_kept(text) or [""]
    return (*first, last[:-1] if len(last) > 3 and last.endswith("s") and not last.endswith("ss") else last)


def _words_kept(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"\(.*?\)", "", text.lower().replace("_", " ")))
