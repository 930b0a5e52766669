"""Decide which words may name a class in a caption, and which other classes these words may mean."""

from __future__ import annotations

import functools
import re

from mqformer_jax.input.example import Prompt
from mqformer_jax.input.prompts import mirror
from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record

# These words may mean the same object: with the classes "person" and "man", a man may be labeled as either of the two.
_PEOPLE = frozenset(
    "person people human man men woman women boy girl child children kid baby toddler lady gentleman guy adult "
    "pedestrian rider passenger driver cyclist biker player skier surfer skater skateboarder snowboarder swimmer "
    "worker soldier officer policeman".split()
)
_BODY = frozenset("body skin head face hair eye ear nose mouth lip neck arm hand finger leg knee foot feet".split())
# Words that may mean many classes.
_GENERAL = frozenset(
    "thing object item animal vehicle food fruit vegetable furniture clothing clothes toy tool container other".split()
)
# Transparent, reflective or thin objects: their pixels also show the colors of other things.
_SEE_THROUGH = frozenset(
    "glass window mirror tv television screen monitor laptop goggles sunglasses racket racquet net fence "
    "cage spoon fork knife".split()
)
_PLAIN = re.compile(r"[a-z][a-z' -]*")


class Nouns:
    """The words that captions may use for the classes of one record.

    A word is allowed only if all objects in the image to which it could refer are labeled. So every class to which the
    word could refer must be completely labeled: the record has no crowd and no region of the class, and does not list
    the class in `partial_classes`. If the data set is not exhaustive, the record must also have segments of the class
    or list it in `absent_classes`. Data sets that label objects selectively, such as Visual Genome and RefCOCO, list
    all classes in `partial_classes`, so no word is allowed.
    """

    def __init__(self, record: Record, info: DatasetInfo):
        self._info = info
        present = {s.class_id for s in record.segments if s.class_id is not None}
        regions = {
            s.class_id
            for s in record.segments
            if s.class_id is not None and (s.crowd or info.classes[s.class_id].is_region)
        }
        self._incomplete = regions | set(record.partial_classes)
        if not info.exhaustive:
            self._incomplete |= set(range(len(info.classes))) - present - set(record.absent_classes)

    def of(self, class_id: int) -> tuple[str, ...]:
        """Return the words that captions may use for a class, its display name first, or () if there are none."""
        if class_id in self._incomplete:
            return ()
        texts = (" ".join(text.replace("_", " ").lower().split()) for text in self._info.classes[class_id].texts)
        return tuple(text for text in dict.fromkeys(texts) if _usable(text) and not self._may_be_unlabeled(text))

    def _may_be_unlabeled(self, noun: str) -> bool:
        return any(certainty(noun, self._info.classes[i], narrower=False) >= 0 for i in self._incomplete)


def certainty(noun: str, of: ClassInfo, narrower: bool = True) -> float:
    """Return how certainly the noun names objects of the class: 1 (it is a name of the class), 0 (maybe) or -1 (no).

    The result is 0 if a name of the class ends with the noun (a "bear" may be a teddy bear), if both are words for
    people, and, with `narrower`, if the noun ends with a name of the class (a "teddy bear" may be labeled as a bear).
    """
    return max(_compare(_words(noun), _words(text), narrower) for text in of.texts)


def has_looks(noun: str) -> bool:
    """Return whether captions may describe the color and size of objects of this noun.

    Return False for people and body parts, where such words have another meaning, and for transparent, reflective or
    thin objects.
    """
    return _words(noun)[-1] not in _PEOPLE | _BODY and not _SEE_THROUGH.intersection(_words_kept(noun))


def _compare(noun: tuple[str, ...], name: tuple[str, ...], narrower: bool) -> float:
    if noun == name:
        return 1.0
    shorter = min(len(noun), len(name)) if narrower else len(noun)
    if noun[-shorter:] == name[-shorter:] or (noun[-1] in _PEOPLE and name[-1] in _PEOPLE):
        return 0.0
    return -1.0


def _usable(noun: str) -> bool:
    """Return whether a caption can use the noun.

    The noun must have no digits or brackets, no general word such as "object", and no "left" or "right", which would be
    wrong in a mirrored image.
    """
    mirrored = mirror(Prompt((f"the right {noun}",), True)) == Prompt((f"the left {noun}",), True)
    return bool(_PLAIN.fullmatch(noun)) and not _GENERAL.intersection(_words_kept(noun)) and mirrored


@functools.cache
def _words(text: str) -> tuple[str, ...]:
    """Return the words of a name, for comparison.

    Words in brackets are left out ("bow (weapon)"), and the last word is in the singular.
    """
    *first, last = _words_kept(text) or [""]
    return (*first, last[:-1] if len(last) > 3 and last.endswith("s") and not last.endswith("ss") else last)


def _words_kept(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"\(.*?\)", "", text.lower().replace("_", " ")))
