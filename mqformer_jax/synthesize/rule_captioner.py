"""Write captions without a model, from the class, color, size, position and neighbors of an object.

Examples: "the red ball", "the small dog", "the left brown dog", "the topmost kite", "the person left of the red car".
A caption uses only labels and pixels, and is checked against every other labeled object of the image: it is dropped
if it might also fit another one (see `referring_grammar`). `Nouns` decides which words may name a class.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from mqformer_jax.input.record import DatasetInfo, Record, Segment, box_of
from mqformer_jax.synthesize import color_names
from mqformer_jax.synthesize.nouns import Nouns, has_looks
from mqformer_jax.synthesize.referring_grammar import OF_MORE, OF_TWO, RELATIONS, Phrase, Scene, certainties, identifies
from mqformer_jax.synthesize.teachers import Caption, Picture

MAX_CAPTIONS = 5  # per box
_MAX_PER_KIND = 2  # captions of each kind: by looks, by position and by neighbor
_MAX_ANCHORS = 5  # nearest neighbors that a relation may refer to
_MIN_ANCHOR_AREA = 1 / 8  # smallest box area of a neighbor, relative to the object's: a bus is not "left of the cup"


class RuleCaptioner:
    """A `Captioner` that captions objects by rules.

    The score of a caption is the smallest certainty of its words, at most 1:

    - a noun: 1;
    - a color: the fraction of the object's pixels with this color;
    - "large": a third of the largest ratio of the object's length to that of another object of the same noun;
    - "small": the same with the inverse ratio;
    - an extreme position: 0.5 plus the lead over the next object, as a fraction of the image's width or height;
    - a relation: 0.5 plus the distance to the other object, as a fraction of the same length.
    """

    name = "rules 1"
    unique = True

    def __init__(self, where: str):
        """Make the captioner. Raises ValueError if `where` is not empty: there are no weights to load."""
        if where:
            raise ValueError(f"--teacher=rules:{where}: this teacher has no weights; give --teacher=rules.")

    def __call__(self, pictures: Sequence[Picture]) -> list[list[list[Caption]]]:
        """Return up to `MAX_CAPTIONS` captions for each box of each image.

        Three kinds of captions alternate: by looks ("the red ball"), by extreme position ("the leftmost ball") and by
        neighbor ("the ball above the dog"). A box gets no captions if its segment is not an instance of a class, or if
        no caption identifies the object. The result is deterministic.
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
        target = scene.segments.index(segment)
        rng = np.random.default_rng(zlib.crc32(f"{record.key} {segment}".encode()))
        kinds = (_by_looks, _by_extreme, _by_neighbor)
        each = [
            list(itertools.islice(kind(target, noun, scene), _MAX_PER_KIND))
            for kind, noun in zip(kinds, _draw(rng, scene.nouns[target], 3))
        ]
        texts = {str(phrase): phrase for row in itertools.zip_longest(*each) for phrase in row if phrase is not None}
        captions = [Caption(text, identifies(phrase, target, scene)) for text, phrase in texts.items()]
        found.append(captions[:MAX_CAPTIONS])
    return found


def _draw(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """Return `count` random words, or [] if `words` is empty.

    On average, at least half of the draws are the first word, usually the class's display name.
    """
    draws = rng.integers(2, size=count) * rng.integers(len(words), size=count) if words else ()
    return [words[i] for i in draws]


# ---- The scene -------------------------------------------------------------------------------------------------------


def look(record: Record, info: DatasetInfo, image: UInt8[np.ndarray, "h w 3"]) -> Scene:
    """Return the scene of a record: its objects, with their sizes and colors.

    Crowds, regions, foregrounds and segments without a class are not objects. If `fair_light` is
    False, no color is certain.
    """
    kept = [(i, s, _whole_box(record, s)) for i, s in enumerate(record.segments) if _is_object(s, info)]
    kept = [(i, s, box) for i, s, box in kept if box is not None]
    boxes = np.array([box for _, _, box in kept], np.int64).reshape(-1, 4)
    names, of_class = Nouns(record, info), {}
    for _, segment, _ in kept:
        if segment.class_id not in of_class:
            of_class[segment.class_id] = names.of(segment.class_id)
    looks = [_look_at(record, segment, k, boxes, image) for k, (_, segment, _) in enumerate(kept)]
    if not color_names.fair_light(image):
        looks = [(lengths, np.zeros_like(colors)) for lengths, colors in looks]
    return Scene(
        segments=[i for i, _, _ in kept],
        classes=[info.classes[s.class_id] for _, s, _ in kept],
        nouns=[of_class[s.class_id] for _, s, _ in kept],
        boxes=boxes.astype(float),
        lengths=np.array([lengths for lengths, _ in looks]).reshape(-1, 2),
        colors=np.array([colors for _, colors in looks]).reshape(-1, len(color_names.TERMS)),
        width=record.width,
        height=record.height,
    )


def _is_object(segment: Segment, info: DatasetInfo) -> bool:
    return (
        segment.class_id is not None
        and not info.classes[segment.class_id].is_region
        and not (segment.crowd or segment.foreground)
    )


def _whole_box(record: Record, segment: Segment) -> tuple[int, ...] | None:
    """Return the box of a segment in whole pixels, clipped to the image, or None if it is empty."""
    box = segment.box or (segment.mask and box_of(record.decode_mask(segment.mask)))
    if not box:
        return None
    x0, y0, x1, y1 = np.clip(np.rint(box), 0, [record.width, record.height] * 2).astype(int).tolist()
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _look_at(
    record: Record, segment: Segment, k: int, boxes: np.ndarray, image: np.ndarray
) -> tuple[tuple[float, float], Float[np.ndarray, " 11"]]:
    """Return the bounds of the length of object `k` (see `Scene`), and the certainty of each color term for it."""
    x0, y0, x1, y1 = boxes[k].tolist()
    others = np.delete(boxes, k, 0)
    others = others[(np.minimum(others[:, 2:], boxes[k, 2:]) > np.maximum(others[:, :2], boxes[k, :2])).all(1)]
    hidden = _hidden(boxes[k], others, record)
    if segment.mask is not None:
        mask, at = record.decode_window(segment.mask)
        area = max(float(mask.sum()), 1.0)
        return (area**0.5, (area + hidden) ** 0.5), color_names.of_mask(image, mask, at)
    area = (x1 - x0) * (y1 - y0)
    # A rotated square fills half of its box, so the box gives only a rough size.
    return (0.85 * area**0.5, (area + hidden) ** 0.5 / 0.85), color_names.of_box(
        image, (x0, y0, x1, y1), _free(boxes[k], others)
    )


def _hidden(box: np.ndarray, others: np.ndarray, record: Record) -> float:
    """Return an upper bound of the number of hidden pixels that an object has outside its own box.

    others: the boxes that overlap the object's box. The object may continue behind their objects. The bound is the area
    of the smallest box that encloses `others` and the object's box, minus the area of the object's box. It is infinity
    if the object's box touches the image's border, since the object may continue outside the image.
    """
    if box[:2].min() <= 1 or box[2] >= record.width - 1 or box[3] >= record.height - 1:
        return np.inf
    low, high = np.vstack([others, box])[:, :2].min(0), np.vstack([others, box])[:, 2:].max(0)
    return float(np.prod(high - low) - np.prod(box[2:] - box[:2]))


def _free(box: np.ndarray, others: np.ndarray) -> Bool[np.ndarray, "h w"]:
    """Return the pixels of a box that no other box covers."""
    free = np.ones((box[3] - box[1], box[2] - box[0]), bool)
    for x0, y0, x1, y1 in np.maximum(others - np.tile(box[:2], 2), 0).tolist():
        free[y0:y1, x0:x1] = False
    return free


# ---- Phrases for an object, best first -------------------------------------------------------------------------------


def _heads(target: int, noun: str, scene: Scene) -> list[Phrase]:
    """Return the phrases "the [size] [color] noun" that certainly fit the object `target`, shortest first.

    Captions with a position or a neighbor extend these phrases.
    """
    phrases = [Phrase(noun)]
    if has_looks(noun):
        own = [
            t
            for t, held in zip(color_names.TERMS, scene.colors[target])
            if held > 0 and not set(noun.split()) & set(color_names.TERMS)
        ]
        phrases += [Phrase(noun, color) for color in own]
        phrases += [Phrase(noun, color, size) for color in (None, *own) for size in ("small", "large")]
    return [p for p in phrases if certainties(p, scene)[target] > 0]


def _by_looks(target: int, noun: str, scene: Scene) -> Iterator[Phrase]:
    return (p for p in _heads(target, noun, scene) if identifies(p, target, scene) > 0)


def _by_extreme(target: int, noun: str, scene: Scene) -> Iterator[Phrase]:
    """Yield phrases with an extreme position, at most one per axis.

    The words are "left" or "upper" among two objects, "leftmost" or "topmost" among more, and their opposites. Phrases
    with a size are left out. In "the topmost small kite", size and position both compare kites, so the phrase may mean
    the topmost of the small kites, or the kite that is topmost of all and small.
    """
    axes = set()
    for head in (head for head in _heads(target, noun, scene) if head.size is None):
        held = certainties(head, scene)
        words = {} if (held > 0).sum() < 2 else OF_TWO if (held >= 0).sum() == 2 else OF_MORE
        for word, (axis, _) in words.items():
            phrase = dataclasses.replace(head, extreme=word)
            if axis not in axes and identifies(phrase, target, scene) > 0:
                axes.add(axis)
                yield phrase


def _by_neighbor(target: int, noun: str, scene: Scene) -> Iterator[Phrase]:
    """Yield at most one phrase per neighbor, preferring phrases that need the neighbor to identify the object."""
    heads = _heads(target, noun, scene)
    heads.sort(key=lambda head: identifies(head, target, scene) > 0)
    for anchor in _neighbors(target, scene):
        for head, relation in itertools.product(heads, RELATIONS):
            phrase = dataclasses.replace(head, relation=relation, anchor=anchor)
            if identifies(phrase, target, scene) > 0:
                yield phrase
                break


def _neighbors(target: int, scene: Scene) -> Iterator[tuple[int, Phrase]]:
    """Yield (index, phrase) of neighbors, nearest first. The phrase is the shortest that identifies the neighbor.

    The phrase describes only looks (`_by_looks`). Only the `_MAX_ANCHORS` nearest objects that are large enough are
    tried.
    """
    low, high = scene.boxes[:, :2], scene.boxes[:, 2:]
    gap = np.maximum(np.maximum(low, low[target]) - np.minimum(high, high[target]), 0)
    areas = np.prod(high - low, 1)
    nearest = np.lexsort((np.hypot(*((low + high - low[target] - high[target]) / 2).T), np.hypot(*gap.T)))
    large = [k for k in nearest.tolist() if k != target and areas[k] >= _MIN_ANCHOR_AREA * areas[target]]
    for k in large[:_MAX_ANCHORS]:
        name = next((p for noun in scene.nouns[k][:1] for p in _by_looks(k, noun, scene)), None)
        if name is not None:
            yield k, name
