"""Captions without a model: a thing's class, colour, size, place and neighbours, where these name it and nothing else
of the image.

"the red ball", "the small dog", "the left brown dog", "the topmost kite", "the person left of the red car". All that is
said is read off the labels and the pixels, and held against every other thing that is labelled: what is unclear of any
of them is not said (see `phrases`). What a class may be called, and when that can be checked, is `Nouns`.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from mqformer_jax.input.record import DatasetInfo, Record, Segment, box_of
from mqformer_jax.synthesize import colour_names
from mqformer_jax.synthesize.nouns import Nouns, has_looks
from mqformer_jax.synthesize.phrases import OF_MORE, OF_TWO, RELATIONS, Phrase, Scene, beliefs, sole
from mqformer_jax.synthesize.teachers import Caption, Picture

MOST = 5  # captions of one box
_OF_A_KIND = 2
_ANCHORS = 5  # the nearest things by which a place is told
_ANCHOR_AREA = 1 / 8  # of the thing's own: nobody looks for a bus by a cup


class Attributes:
    """The captioner. A caption's score is how clear its least clear part is.

    Of a colour, the share of the thing's pixels that has it. Of a place, half and the lead, or the distance, as a
    fraction of the picture's side. Of a size, a third of how many times longer the thing is than another of its noun,
    or shorter. 1 where its name alone is enough.
    """

    name = "attributes 1"
    unique = True

    def __init__(self, where: str):
        """Raises ValueError where `where` is not empty: there are no weights to be found."""
        if where:
            raise ValueError(f"--teacher=attributes:{where}: it has no weights; give --teacher=attributes.")

    def __call__(self, pictures: Sequence[Picture]) -> list[list[list[Caption]]]:
        """For each box of each picture up to five captions, best first: by looks, by extreme place, by a neighbour,
        then again.

        Nothing is said of a box whose segment is no thing of a class or that nothing names beyond doubt. The same for
        the same record.
        """
        return [_captions(picture) for picture in pictures]


def _captions(picture: Picture) -> list[list[Caption]]:
    record = picture.record
    scene = look(record, picture.info, picture.image) if picture.segments else None
    found = []
    for segment in picture.segments:
        if scene is None or segment not in scene.segments:
            found.append([])
            continue
        thing = scene.segments.index(segment)
        rng = np.random.default_rng(zlib.crc32(f"{record.key} {segment}".encode()))
        kinds = (_by_looks, _by_extreme, _by_neighbour)
        each = [
            list(itertools.islice(kind(thing, noun, scene), _OF_A_KIND))
            for kind, noun in zip(kinds, _draw(rng, scene.nouns[thing], 3))
        ]
        said = {str(phrase): phrase for row in itertools.zip_longest(*each) for phrase in row if phrase is not None}
        found.append([Caption(text, sole(phrase, thing, scene)) for text, phrase in said.items()][:MOST])
    return found


def _draw(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """So many of the words, one in two the first, which is the plainest; [] where there are none."""
    draws = rng.integers(2, size=count) * rng.integers(len(words), size=count) if words else ()
    return [words[i] for i in draws]


# ---- What is in the picture ------------------------------------------------------------------------------------------


def look(record: Record, info: DatasetInfo, image: UInt8[np.ndarray, "h w 3"]) -> Scene:
    """The things of a record, with what their pixels show. Crowds, regions, foregrounds and what has no class are
    none.
    """
    kept = [(i, s, _whole_box(record, s)) for i, s in enumerate(record.segments) if _is_thing(s, info)]
    kept = [(i, s, box) for i, s, box in kept if box is not None]
    boxes = np.array([box for _, _, box in kept], np.int64).reshape(-1, 4)
    names, of_class = Nouns(record, info), {}
    for _, segment, _ in kept:
        if segment.class_id not in of_class:
            of_class[segment.class_id] = names.of(segment.class_id)
    looks = [_look_at(record, segment, k, boxes, image) for k, (_, segment, _) in enumerate(kept)]
    if not colour_names.fair_light(image):
        looks = [(lengths, np.zeros_like(colours)) for lengths, colours in looks]
    return Scene(
        segments=[i for i, _, _ in kept],
        classes=[info.classes[s.class_id] for _, s, _ in kept],
        nouns=[of_class[s.class_id] for _, s, _ in kept],
        boxes=boxes.astype(float),
        lengths=np.array([lengths for lengths, _ in looks]).reshape(-1, 2),
        colours=np.array([colours for _, colours in looks]).reshape(-1, len(colour_names.TERMS)),
        width=record.width,
        height=record.height,
    )


def _is_thing(segment: Segment, info: DatasetInfo) -> bool:
    return (
        segment.class_id is not None
        and info.classes[segment.class_id].thing
        and not (segment.crowd or segment.foreground)
    )


def _whole_box(record: Record, segment: Segment) -> tuple[int, ...] | None:
    """The box in whole pixels, cut at the image's border; None where nothing is left."""
    box = segment.box or (segment.mask and box_of(record.decode_mask(segment.mask)))
    if not box:
        return None
    x0, y0, x1, y1 = np.clip(np.rint(box), 0, [record.width, record.height] * 2).astype(int).tolist()
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _look_at(
    record: Record, segment: Segment, k: int, boxes: np.ndarray, image: np.ndarray
) -> tuple[tuple[float, float], Float[np.ndarray, " 11"]]:
    """Bounds of a thing's length, and the beliefs in its colours."""
    x0, y0, x1, y1 = boxes[k].tolist()
    others = np.delete(boxes, k, 0)
    others = others[(np.minimum(others[:, 2:], boxes[k, 2:]) > np.maximum(others[:, :2], boxes[k, :2])).all(1)]
    hidden = _hidden(boxes[k], others, record)
    if segment.mask is not None:
        mask, at = record.decode_window(segment.mask)
        area = max(float(mask.sum()), 1.0)
        return (area**0.5, (area + hidden) ** 0.5), colour_names.of_mask(image, mask, at)
    area = (x1 - x0) * (y1 - y0)
    # A turned square fills half of its box: the box tells the size roughly.
    return (0.85 * area**0.5, (area + hidden) ** 0.5 / 0.85), colour_names.of_box(
        image, (x0, y0, x1, y1), _free(boxes[k], others)
    )


def _hidden(box: np.ndarray, others: np.ndarray, record: Record) -> float:
    """How many pixels of a thing may be out of sight: beyond the border, or behind the things that its box meets."""
    if box[:2].min() <= 1 or box[2] >= record.width - 1 or box[3] >= record.height - 1:
        return np.inf
    low, high = np.vstack([others, box])[:, :2].min(0), np.vstack([others, box])[:, 2:].max(0)
    return float(np.prod(high - low) - np.prod(box[2:] - box[:2]))


def _free(box: np.ndarray, others: np.ndarray) -> Bool[np.ndarray, "h w"]:
    free = np.ones((box[3] - box[1], box[2] - box[0]), bool)
    for x0, y0, x1, y1 in np.maximum(others - np.tile(box[:2], 2), 0).tolist():
        free[y0:y1, x0:x1] = False
    return free


# ---- Ways to name a thing: the best first --------------------------------------------------------------------------


def _heads(thing: int, noun: str, scene: Scene) -> list[Phrase]:
    """All that is certain of a thing by its looks alone, fewest words first."""
    phrases = [Phrase(noun)]
    if has_looks(noun):
        own = [
            t
            for t, held in zip(colour_names.TERMS, scene.colours[thing])
            if held > 0 and not set(noun.split()) & set(colour_names.TERMS)
        ]
        phrases += [Phrase(noun, colour) for colour in own]
        phrases += [Phrase(noun, colour, size) for colour in (None, *own) for size in ("small", "large")]
    return [p for p in phrases if beliefs(p, scene)[thing] > 0]


def _by_looks(thing: int, noun: str, scene: Scene) -> Iterator[Phrase]:
    return (p for p in _heads(thing, noun, scene) if sole(p, thing, scene) > 0)


def _by_extreme(thing: int, noun: str, scene: Scene) -> Iterator[Phrase]:
    """ "left" and "upper" of two, "leftmost" and "topmost" of more; at most one along each axis.

    Never with a size, which compares, too: is the topmost small kite the topmost, and small?
    """
    axes = set()
    for head in (head for head in _heads(thing, noun, scene) if head.size is None):
        held = beliefs(head, scene)
        words = {} if (held > 0).sum() < 2 else OF_TWO if (held >= 0).sum() == 2 else OF_MORE
        for word, (axis, _) in words.items():
            phrase = dataclasses.replace(head, extreme=word)
            if axis not in axes and sole(phrase, thing, scene) > 0:
                axes.add(axis)
                yield phrase


def _by_neighbour(thing: int, noun: str, scene: Scene) -> Iterator[Phrase]:
    """By each of the nearest things at most one; with a head that needs the neighbour, if there is one."""
    heads = _heads(thing, noun, scene)
    heads.sort(key=lambda head: sole(head, thing, scene) > 0)
    for anchor in _neighbours(thing, scene):
        for head, relation in itertools.product(heads, RELATIONS):
            phrase = dataclasses.replace(head, relation=relation, anchor=anchor)
            if sole(phrase, thing, scene) > 0:
                yield phrase
                break


def _neighbours(thing: int, scene: Scene) -> Iterator[tuple[int, Phrase]]:
    """The nearest things that are large enough to look for and have a name by their looks, each with its shortest."""
    low, high = scene.boxes[:, :2], scene.boxes[:, 2:]
    gap = np.maximum(np.maximum(low, low[thing]) - np.minimum(high, high[thing]), 0)
    areas = np.prod(high - low, 1)
    nearest = np.lexsort((np.hypot(*((low + high - low[thing] - high[thing]) / 2).T), np.hypot(*gap.T)))
    large = [k for k in nearest.tolist() if k != thing and areas[k] >= _ANCHOR_AREA * areas[thing]]
    for k in large[:_ANCHORS]:
        name = next((p for noun in scene.nouns[k][:1] for p in _by_looks(k, noun, scene)), None)
        if name is not None:
            yield k, name
