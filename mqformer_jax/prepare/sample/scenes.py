"""The built-in sample: small drawn scenes with every kind of annotation that the model learns from.

One scene graph provides panoptic segments (five kinds of things, five kinds of ground), expressions that name exactly
one thing, expressions that name nothing, and the salient foreground with its matte. `datasets` defines three data sets
of scenes; `render` makes one record of one of these data sets, in any process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from mqformer_jax.input.record import ClassInfo, Record, Segment, box_of, encode_rle
from mqformer_jax.prepare.sample.render import COLORS, SHAPES, STUFF, Scene, Thing, draw

CLASSES = tuple(ClassInfo((name,)) for name in SHAPES) + tuple(ClassInfo((name,), is_region=True) for name in STUFF)

# {words: (axis, sign)}. The words compare the centers of things along an axis (0: x, 1: y): sign * center is larger for
# the thing that they describe.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
# Distances between centers, as fractions of the image's side. A relation holds above CLEAR, does not hold below DENIED,
# and is ambiguous in between. A thing is, e.g., the leftmost one if it is more than LEAD left of the next one.
CLEAR, DENIED, LEAD = 0.1, 0.03, 0.06

_BLOCK = 100_000  # seeds reserved for each split: splits share no scenes and do not depend on each other's size


# ---- Records ------------------------------------------------------------------------------------------------------


def scene(seed: int, size: int = 96) -> Record:
    """Return the record of the scene that `seed` determines, with all annotations.

    size: height and width in pixels, at least 48. The segments are the things (front to back, with the expressions that
    name them), the ground, and the salient foreground with its matte. Every call returns the same bytes; another build
    of numpy or OpenCV may round a pixel differently.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    return _record(f"{seed:08d}", draw(rng, size), rng)


def scene_graph(seed: int, size: int = 96) -> Scene:
    """Return the `Scene` (things, image, matte, owner of each pixel) from which `scene(seed, size)` makes a record."""
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


# ---- The three data sets ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """A data set of the sample. seeds: {split: seeds of the records}. size: height and width of an image in pixels."""

    name: str
    classes: tuple[ClassInfo, ...]
    seeds: dict[str, range]
    size: int

    def records(self, split: str) -> Iterator[Record]:
        """Return an iterator over the records of a split.

        To make records in several processes, call `render` for each seed in `seeds[split]` instead.
        """
        return (render(self.name, seed, self.size) for seed in self.seeds[split])


def datasets(seed: int = 0, train: int = 4000, val: int = 128, size: int = 96) -> list[SampleSet]:
    """Return three data sets that share no scenes: one with all annotations, one with boxes only, one with mattes only.

    train, val: number of scenes in the splits of the first data set. The data set of boxes has train // 4 training
    scenes. The data set of mattes has train // 8 training and val // 4 validation scenes. size: height and width of the
    images in pixels. Raises ValueError for more than 100,000 scenes per split.
    """
    if max(train, val) > _BLOCK:
        raise ValueError(
            f"sample: {max(train, val)} scenes are too many; give at most {_BLOCK} for each of --train and --val"
        )
    counts = (train, val, train // 4, train // 8, val // 4)
    first = [(5 * seed + block) * _BLOCK for block in range(len(counts))]
    seeds = [range(start, start + count) for start, count in zip(first, counts)]
    return [
        SampleSet("sample_scenes", CLASSES, {"train": seeds[0], "val": seeds[1]}, size),
        SampleSet("sample_boxes", CLASSES[: len(SHAPES)], {"train": seeds[2]}, size),
        SampleSet("sample_mattes", (), {"train": seeds[3], "val": seeds[4]}, size),
    ]


def render(name: str, seed: int, size: int = 96) -> Record:
    """Return the record of `seed` in the data set `name`. Raises KeyError if `datasets` has no set of this name."""
    return {"sample_scenes": lambda r: r, "sample_boxes": _boxes_only, "sample_mattes": _matte_only}[name](
        scene(seed, size)
    )


def _boxes_only(record: Record) -> Record:
    things = (s for s in record.segments if s.class_id is not None and not CLASSES[s.class_id].is_region)
    return dataclasses.replace(record, segments=tuple(Segment(s.class_id, box=s.box) for s in things), absent_texts=())


def _matte_only(record: Record) -> Record:
    return dataclasses.replace(record, segments=tuple(s for s in record.segments if s.foreground), absent_texts=())


# ---- Expressions ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A phrase 'the [extreme] [size] [color] noun [relation anchor]'. The noun is a shape, or "thing" for any shape."""

    noun: str
    color: str | None = None
    size: str | None = None
    extreme: str | None = None
    relation: str | None = None
    anchor: Phrase | None = None

    def __str__(self) -> str:
        words = [
            "the",
            self.extreme,
            self.size,
            self.color,
            self.noun,
            self.relation,
            self.anchor and str(self.anchor),
        ]
        return " ".join(word for word in words if word)


def expression_kind(text: str) -> str:
    """Return the kind of an expression of this module: "extremal", "relation", "class" (only a noun) or "attribute"."""
    words = text.split()
    if words[1] in EXTREMES:
        return "extremal"
    if any(f" {relation} " in text for relation in RELATIONS):
        return "relation"
    return "class" if len(words) == 2 else "attribute"


def referents(phrase: Phrase, things: Sequence[Thing]) -> tuple[list[int], list[int]]:
    """Return the indices of the things that `phrase` certainly names, and of the things that it may name.

    The second list includes the first. Both are empty if the anchor of the phrase's relation does not name exactly one
    thing.
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
    """Return the index of the thing that `phrase` certainly names, if it cannot name any other thing; else None."""
    certain, possible = referents(phrase, things)
    return certain[0] if len(certain) == len(possible) == 1 else None


def expressions(rng: np.random.Generator, target: int, things: Sequence[Thing]) -> tuple[str, ...]:
    """Return up to three phrases that name only `things[target]`.

    - The first describes the looks of the thing, in as few words as possible.
    - The second describes the position of the thing relative to another thing. Usually, the looks alone would not be
      enough: "the ball left of the star" in a scene with two balls.
    - The third is extremal ("the leftmost ball"), or describes the looks again.
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
    """Return one or two no-target expressions: phrases that describe no thing in the scene.

    Each is close to being true, such as "the red square" in a scene with a red ball but no red square.
    """
    color = _pick(rng, things).color
    shapes = [s for s in SHAPES if not any((t.shape, t.color) == (s, color) for t in things)]
    colors = [c for c in COLORS if not any(t.color == c for t in things)]
    # There are at most six things: if one color comes in all five shapes, another color is unused.
    found = [Phrase(_pick(rng, shapes), color) if shapes else Phrase("thing", _pick(rng, colors))]
    for _ in range(4):
        head, anchor = _pick(rng, _heads(_pick(rng, things))), _anchor(rng, int(rng.integers(len(things))), things)
        if anchor is None:
            continue
        phrase = dataclasses.replace(head, relation=_pick(rng, tuple(RELATIONS)), anchor=anchor)
        # The anchor must not match the head either: "the ball left of the red ball" would look like a mistake.
        if not referents(phrase, things)[1] and sole(anchor, things) not in referents(head, things)[0]:
            found.append(phrase)
            break
    return tuple(str(p) for p in found)


def _related(rng: np.random.Generator, target: int, things: Sequence[Thing], heads: list[Phrase]) -> list[Phrase]:
    """Return a list of one phrase that names the target by its position relative to another thing.

    Return [] if a few random tries find no such phrase.
    """
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
    """Return all phrases about the looks of a thing. The noun "thing" replaces the shape only together with a color."""
    shaped = [Phrase(thing.shape, color, size) for color in (None, thing.color) for size in (None, thing.size)]
    return [*shaped, Phrase("thing", thing.color), Phrase("thing", thing.color, thing.size)]


def _fits(phrase: Phrase, thing: Thing) -> bool:
    return (
        phrase.noun in (thing.shape, "thing")
        and phrase.color in (thing.color, None)
        and phrase.size in (thing.size, None)
    )


def _along(things: Sequence[Thing], axis: int, sign: int) -> list[float]:
    return [sign * (thing.y if axis else thing.x) for thing in things]


def _pick(rng: np.random.Generator, items: Sequence) -> object:
    return items[int(rng.integers(len(items)))]
