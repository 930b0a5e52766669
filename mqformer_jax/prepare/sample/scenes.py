"""The embedded sample: small scenes, drawn by this code, that carry every kind of annotation the model learns from.

One scene graph gives it all: panoptic segments (five things, five kinds of ground), expressions that name one thing
beyond doubt, expressions that name nothing, and the salient foreground with its matte. `datasets` says which three
prepared sets are made of it; `render` makes one record of one of them, in any process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from mqformer_jax.input.record import ClassInfo, Record, Segment, box_of, encode_rle
from mqformer_jax.prepare.sample.render import COLOURS, SHAPES, STUFF, Scene, Thing, draw

CLASSES = tuple(ClassInfo((name,)) for name in SHAPES) + tuple(ClassInfo((name,), thing=False) for name in STUFF)

# Words of a relation: the axis of the centres that it compares (0: x, 1: y) and the sign of "further on".
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
# Fractions of the side. Beyond CLEAR a relation holds for anyone who looks, below DENIED for nobody; between, it is
# unclear.
CLEAR, DENIED, LEAD = 0.1, 0.03, 0.06

_BLOCK = 100_000  # seeds kept for each split, so that no two share a scene and none moves when another grows


# ---- Records ------------------------------------------------------------------------------------------------------


def scene(seed: int, size: int = 96) -> Record:
    """The scene of `seed`, `size` x `size` pixels (48 or more), with all annotations.

    Segments: the things (front to back; texts hold what names them), the ground, the salient foreground with its matte.
    The same bytes on every run; another build of numpy or OpenCV may round a pixel differently.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    return _record(f"{seed:08d}", draw(rng, size), rng)


def scene_graph(seed: int, size: int = 96) -> Scene:
    """What `scene` draws for the same seed and size, before it becomes a record."""
    return draw(np.random.Generator(np.random.PCG64(seed)), size)


def _record(key: str, drawn: Scene, rng: np.random.Generator) -> Record:
    things, size = drawn.things, len(drawn.owner)
    segments = []
    for value in np.unique(drawn.owner).tolist():
        mask = drawn.owner == value
        is_thing = value < len(things)
        class_id = SHAPES.index(things[value].shape) if is_thing else len(SHAPES) + value - len(things)
        texts = expressions(rng, value, things) if is_thing else ()
        segments.append(Segment(class_id, texts, box_of(mask), encode_rle(mask)))
    solid = drawn.alpha > 127
    segments.append(Segment(box=box_of(solid), mask=encode_rle(solid), alpha=_png(drawn.alpha), foreground=True))
    return Record(key, _png(drawn.image[..., ::-1]), size, size, tuple(segments), absent_texts=absent(rng, things))


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


# ---- The three prepared sets ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """One prepared set. seeds: for each split, the seeds of its records. size: side of the pictures in pixels."""

    name: str
    classes: tuple[ClassInfo, ...]
    seeds: dict[str, range]
    size: int

    def records(self, split: str) -> Iterator[Record]:
        """The records of a split, one after the other. To share the work, call `render` for `seeds[split]` instead."""
        return (render(self.name, seed, self.size) for seed in self.seeds[split])


def datasets(seed: int = 0, train: int = 4000, val: int = 128, size: int = 96) -> list[SampleSet]:
    """The sample as three sets that share no scene: full scenes, boxes only (a quarter of `train`), mattes only (an
    eighth).

    Raises ValueError where a split would hold more than 100,000 scenes.
    """
    if max(train, val) > _BLOCK:
        raise ValueError(f"sample: {max(train, val)} scenes wanted; a split holds {_BLOCK} at most.")
    counts = (train, val, train // 4, train // 8, val // 4)
    first = [(5 * seed + block) * _BLOCK for block in range(len(counts))]
    seeds = [range(start, start + count) for start, count in zip(first, counts)]
    return [
        SampleSet("sample_scenes", CLASSES, {"train": seeds[0], "val": seeds[1]}, size),
        SampleSet("sample_boxes", CLASSES[: len(SHAPES)], {"train": seeds[2]}, size),
        SampleSet("sample_mattes", (), {"train": seeds[3], "val": seeds[4]}, size),
    ]


def render(name: str, seed: int, size: int = 96) -> Record:
    """The record of `seed` as the set `name` holds it. Raises KeyError for a set that is not in `datasets`."""
    return {"sample_scenes": lambda r: r, "sample_boxes": _boxes_only, "sample_mattes": _matte_only}[name](
        scene(seed, size)
    )


def _boxes_only(record: Record) -> Record:
    things = (s for s in record.segments if s.class_id is not None and CLASSES[s.class_id].thing)
    return dataclasses.replace(record, segments=tuple(Segment(s.class_id, box=s.box) for s in things), absent_texts=())


def _matte_only(record: Record) -> Record:
    return dataclasses.replace(record, segments=tuple(s for s in record.segments if s.foreground), absent_texts=())


# ---- Expressions ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Phrase:
    """'the [extreme] [size] [colour] noun [relation anchor]'. The noun is a shape, or "thing" for any."""

    noun: str
    colour: str | None = None
    size: str | None = None
    extreme: str | None = None
    relation: str | None = None
    anchor: Phrase | None = None

    def __str__(self) -> str:
        words = [
            "the",
            self.extreme,
            self.size,
            self.colour,
            self.noun,
            self.relation,
            self.anchor and str(self.anchor),
        ]
        return " ".join(word for word in words if word)


def expression_kind(text: str) -> str:
    """Of an expression of this module: 'extremal', 'relation', 'class' (a bare shape) or 'attribute'."""
    words = text.split()
    if words[1] in EXTREMES:
        return "extremal"
    if any(f" {relation} " in text for relation in RELATIONS):
        return "relation"
    return "class" if len(words) == 2 else "attribute"


def referents(phrase: Phrase, things: Sequence[Thing]) -> tuple[list[int], list[int]]:
    """Indices of the things that `phrase` names for certain, and of all that it may name (the certain ones among them).

    The anchor of a relation must itself name one thing for certain, or the phrase names nothing.
    """
    head = [i for i, thing in enumerate(things) if _fits(phrase, thing)]
    if phrase.extreme is not None:
        along = _along(things, *EXTREMES[phrase.extreme])
        head.sort(key=lambda i: -along[i])
        if len(head) > 1 and along[head[0]] - along[head[1]] > LEAD:
            return head[:1], head[:1]
        return [], head
    if phrase.relation is not None:
        anchor = sole(phrase.anchor, things)
        if anchor is None:
            return [], []
        along = _along(things, *RELATIONS[phrase.relation])
        possible = [i for i in head if along[i] - along[anchor] > DENIED]
        return [i for i in possible if along[i] - along[anchor] > CLEAR], possible
    return head, head


def sole(phrase: Phrase, things: Sequence[Thing]) -> int | None:
    """The one thing that `phrase` names beyond doubt, or None."""
    certain, possible = referents(phrase, things)
    return certain[0] if len(certain) == len(possible) == 1 else None


def expressions(rng: np.random.Generator, target: int, things: Sequence[Thing]) -> tuple[str, ...]:
    """Up to three phrases that name `things[target]` and nothing else: its own looks, its place, and one of either
    sort.

    Phrases that need all their words are preferred (a relation whose noun alone would name several things).
    """
    heads = _heads(things[target])
    plain = [p for p in heads if sole(p, things) == target]
    vague = [p for p in heads if p not in plain]
    extremal = [q for p in vague for e in EXTREMES if sole(q := dataclasses.replace(p, extreme=e), things) == target]
    chosen = []
    if plain:
        fewest = min(len(str(p).split()) for p in plain)
        chosen.append(_pick(rng, [p for p in plain if len(str(p).split()) == fewest]))
    chosen += _related(rng, target, things, vague if vague and rng.random() < 0.85 else heads)
    rest = extremal if extremal and rng.random() < 0.6 else plain
    if rest:
        chosen.append(_pick(rng, rest))
    return tuple(dict.fromkeys(str(p) for p in chosen))


def absent(rng: np.random.Generator, things: Sequence[Thing]) -> tuple[str, ...]:
    """One or two phrases that name nothing here, though something of what they say is in the picture."""
    colour = _pick(rng, things).colour
    shapes = [s for s in SHAPES if not any((t.shape, t.colour) == (s, colour) for t in things)]
    colours = [c for c in COLOURS if not any(t.colour == c for t in things)]
    # Six things at most: if one colour comes in all five shapes, another colour is free.
    found = [Phrase(_pick(rng, shapes), colour) if shapes else Phrase("thing", _pick(rng, colours))]
    for _ in range(4):
        head, anchor = _pick(rng, _heads(_pick(rng, things))), _anchor(rng, int(rng.integers(len(things))), things)
        if anchor is None:
            continue
        phrase = dataclasses.replace(head, relation=_pick(rng, tuple(RELATIONS)), anchor=anchor)
        # The anchor must not answer to the head either: "the ball left of the red ball" would look like a slip.
        if not referents(phrase, things)[1] and sole(anchor, things) not in referents(head, things)[0]:
            found.append(phrase)
            break
    return tuple(str(p) for p in found)


def _related(rng: np.random.Generator, target: int, things: Sequence[Thing], heads: list[Phrase]) -> list[Phrase]:
    """One phrase that names the target by its place beside another thing, or none where a few tries find none."""
    others = [i for i in range(len(things)) if i != target]
    for _ in range(12):
        anchor = _anchor(rng, _pick(rng, others), things)
        phrase = dataclasses.replace(_pick(rng, heads), relation=_pick(rng, tuple(RELATIONS)), anchor=anchor)
        if anchor is not None and sole(phrase, things) == target:
            return [phrase]
    return []


def _anchor(rng: np.random.Generator, index: int, things: Sequence[Thing]) -> Phrase | None:
    names = [p for p in _heads(things[index]) if p.noun != "thing" and sole(p, things) == index]
    return _pick(rng, names) if names else None


def _heads(thing: Thing) -> list[Phrase]:
    """All that can be said of a thing by its looks alone; "thing" stands for the shape only where a colour is said."""
    shaped = [Phrase(thing.shape, colour, size) for colour in (None, thing.colour) for size in (None, thing.size)]
    return [*shaped, Phrase("thing", thing.colour), Phrase("thing", thing.colour, thing.size)]


def _fits(phrase: Phrase, thing: Thing) -> bool:
    return (
        phrase.noun in (thing.shape, "thing")
        and phrase.colour in (thing.colour, None)
        and phrase.size in (thing.size, None)
    )


def _along(things: Sequence[Thing], axis: int, sign: int) -> list[float]:
    return [sign * (thing.y if axis else thing.x) for thing in things]


def _pick(rng: np.random.Generator, items: Sequence) -> object:
    return items[int(rng.integers(len(items)))]
