"""The embedded sample: its records say what its pictures show."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest

from mqformer_jax.prepare.sample import scenes

COUNT = 60
COLORS = {"red", "orange", "yellow", "blue", "purple", "white"}


@pytest.fixture(scope="module")
def drawn():
    return [(scenes.scene(seed), scenes.scene_graph(seed)) for seed in range(COUNT)]


def thing_texts(drawn):
    """(text, index of its thing, things) of every expression."""
    for record, graph in drawn:
        for i, segment in enumerate(record.segments):
            for text in segment.texts:
                yield text, i, graph.things


def read(text, things):
    """An independent reading of a phrase: indices of all that a lenient reader would take it for."""
    relation = re.fullmatch(r"(the .+) (left of|right of|above|below) (the .+)", text)
    if relation:
        head, words, anchor = relation.groups()
        (a,) = read(anchor, things)
        beyond = {
            "left of": lambda t: things[a].x - t.x,
            "right of": lambda t: t.x - things[a].x,
            "above": lambda t: things[a].y - t.y,
            "below": lambda t: t.y - things[a].y,
        }[words]
        return [i for i in read(head, things) if beyond(things[i]) > 0.03]
    the, *marks, noun = text.split()
    assert the == "the"
    found = [i for i, t in enumerate(things) if noun in ("thing", t.shape)]
    for mark in reversed(marks):
        if mark in ("small", "large"):
            found = [i for i in found if (things[i].radius > 0.1) == (mark == "large")]
        elif mark in COLORS:
            found = [i for i in found if things[i].color == mark]
        else:
            place = {"leftmost": "x", "rightmost": "x", "topmost": "y", "bottommost": "y"}[mark]
            far = min if mark in ("leftmost", "topmost") else max
            edge = far(getattr(things[i], place) for i in found)
            found = [i for i in found if abs(getattr(things[i], place) - edge) < 0.05]
    return found


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    script = (
        "import sys; from mqformer_jax.prepare.sample import scenes; "
        "sys.stdout.buffer.write(scenes.scene(7).to_bytes())"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    assert scenes.scene(7).to_bytes() == other
    assert scenes.scene(8).to_bytes() != other


@pytest.mark.parametrize("size", [48, 96, 130])
def test_masks_are_disjoint_and_cover_every_pixel(size):
    for seed in range(8):
        record = scenes.scene(seed, size)
        assert record.decode_image().shape == (size, size, 3)
        panoptic = [record.decode_mask(s.mask) for s in record.segments if not s.foreground]
        assert (np.sum(panoptic, 0) == 1).all()


def test_segments_agree_with_their_boxes_and_classes(drawn):
    for record, graph in drawn:
        things = [s for s in record.segments if s.class_id is not None and not scenes.CLASSES[s.class_id].is_region]
        stuff = [s.class_id for s in record.segments if s.class_id is not None and scenes.CLASSES[s.class_id].is_region]
        assert [scenes.CLASSES[s.class_id].name for s in things] == [t.shape for t in graph.things]
        assert len(set(stuff)) == len(stuff)
        for s in record.segments:
            ys, xs = np.nonzero(record.decode_mask(s.mask))
            assert s.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert len(xs) >= (20 if s in things else 30)


def test_things_show_their_color_where_their_mask_is(drawn):
    hits = total = 0
    for record, graph in drawn:
        image = record.decode_image().astype(float)
        for segment, thing in zip(record.segments, graph.things):
            mean = image[record.decode_mask(segment.mask)].mean(0)
            unit = {c: np.array(v) / np.linalg.norm(v) for c, v in scenes.COLORS.items()}
            hits += max(unit, key=lambda c: unit[c] @ mean / np.linalg.norm(mean)) == thing.color
            total += 1
    assert hits > 0.95 * total


def test_every_expression_identifies_exactly_one_thing(drawn):
    texts = list(thing_texts(drawn))
    assert len(texts) > 3 * COUNT
    for text, index, things in texts:
        assert read(text, things) == [index], text


def test_absent_expressions_match_no_thing(drawn):
    for record, graph in drawn:
        assert 1 <= len(record.absent_texts) <= 2
        for text in record.absent_texts:
            assert read(text, graph.things) == [], text


def test_vocabulary_is_small_and_every_expression_kind_occurs(drawn):
    texts = [text for text, _, _ in thing_texts(drawn)] + [text for record, _ in drawn for text in record.absent_texts]
    assert len({word for text in texts for word in text.split()}) <= 45
    assert max(len(text.split()) for text in texts) <= 10
    kinds = [scenes.expression_kind(text) for text in texts]
    assert all(kinds.count(kind) > 0.05 * len(kinds) for kind in ("class", "attribute", "relation", "extremal"))


@pytest.mark.parametrize(
    "text, kind",
    [
        ("the star", "class"),
        ("the red thing", "attribute"),
        ("the large star", "attribute"),
        ("the small ring left of the blue square", "relation"),
        ("the ball above the star", "relation"),
        ("the topmost red thing", "extremal"),
    ],
)
def test_expression_kind_is_classified(text, kind):
    assert scenes.expression_kind(text) == kind


def test_expressions_with_ambiguous_positions_are_rejected():
    def ball(x):
        return scenes.Thing("ball", "red", "small", x, 0.5, 0.07, 0.0)

    square = scenes.Thing("square", "blue", "small", 0.5, 0.5, 0.07, 0.0)
    phrase = scenes.Phrase("ball", relation="left of", anchor=scenes.Phrase("square"))
    assert scenes.sole(phrase, [ball(0.2), ball(0.8), square]) == 0
    assert scenes.sole(phrase, [ball(0.2), ball(0.44), square]) is None  # the second may count as left, too
    assert scenes.sole(phrase, [ball(0.44), ball(0.8), square]) is None  # the first is hardly left
    assert scenes.sole(phrase, [ball(0.2), square, square]) is None  # which square?
    leftmost = scenes.Phrase("ball", extreme="leftmost")
    assert scenes.sole(leftmost, [ball(0.3), ball(0.2)]) == 1
    assert scenes.sole(leftmost, [ball(0.22), ball(0.2)]) is None


def test_scenes_contain_distractors_for_most_expressions(drawn):
    described = [x for x in thing_texts(drawn) if scenes.expression_kind(x[0]) in ("attribute", "relation")]
    tempted = [
        any(t.shape == a[i].shape or t.color == a[i].color for j, t in enumerate(a) if j != i) for _, i, a in described
    ]
    assert np.mean(tempted) > 0.6


def test_matte_is_soft_and_its_mask_is_the_front_thing(drawn):
    for record, _ in drawn:
        (foreground,) = [s for s in record.segments if s.foreground]
        alpha = cv2.imdecode(np.frombuffer(foreground.alpha, np.uint8), cv2.IMREAD_UNCHANGED)
        assert alpha.shape == (96, 96) and alpha.dtype == np.uint8 and alpha.max() == 255
        assert ((alpha > 10) & (alpha < 245)).sum() > 80
        solid = record.decode_mask(foreground.mask)
        assert np.array_equal(solid, alpha > 127)
        assert np.array_equal(solid, record.decode_mask(record.segments[0].mask))


def test_ring_mask_excludes_its_hole(drawn):
    seen = 0
    for record, graph in drawn:
        for segment, thing in zip(record.segments, graph.things):
            if thing.shape == "ring":
                seen += 1
                assert not record.decode_mask(segment.mask)[int(thing.y * 96), int(thing.x * 96)]
    assert seen > 10


def test_things_occlude_each_other(drawn):
    hidden = 0
    for record, graph in drawn:
        for segment, thing in zip(record.segments, graph.things):
            if thing.shape == "ball" and not np.array_equal(graph.things[0], thing):
                full = np.pi * (thing.radius * 96) ** 2
                hidden += 0.3 < record.decode_mask(segment.mask).sum() / full < 0.85
    assert hidden > 3


def test_box_set_has_only_boxes():
    boxes, full = scenes.render("sample_boxes", 5), scenes.scene(5)
    things = [s for s in full.segments if s.class_id is not None and s.class_id < 5]
    assert [(s.class_id, s.box) for s in boxes.segments] == [(s.class_id, s.box) for s in things]
    assert all(s.mask is None and s.alpha is None and not s.texts for s in boxes.segments)
    assert boxes.absent_texts == () and boxes.image == full.image


def test_matte_set_has_only_the_foreground():
    record = scenes.render("sample_mattes", 5)
    assert [s.foreground for s in record.segments] == [True]
    assert record.segments[0].alpha is not None and record.absent_texts == ()


def test_splits_share_no_scene_and_do_not_depend_on_each_others_size():
    small, big = scenes.datasets(1, 40, 8), scenes.datasets(1, 400, 8)
    assert {s.name: {k: len(v) for k, v in s.seeds.items()} for s in small} == {
        "sample_scenes": {"train": 40, "val": 8},
        "sample_boxes": {"train": 10},
        "sample_mattes": {"train": 5, "val": 2},
    }
    seeds = [seed for s in [*small, *scenes.datasets(2, 40, 8)] for split in s.seeds.values() for seed in split]
    assert len(set(seeds)) == len(seeds)
    assert small[0].seeds["val"] == big[0].seeds["val"]
    assert [len(s.classes) for s in small] == [10, 5, 0]
    with pytest.raises(ValueError, match="at most"):
        scenes.datasets(0, 100_001, 8)


def test_pickled_render_function_gives_the_same_records():
    (mattes,) = [s for s in scenes.datasets(0, 16, 4, size=48) if s.name == "sample_mattes"]
    render = pickle.loads(pickle.dumps(scenes.render))
    assert [r.to_bytes() for r in mattes.records("train")] == [
        render(mattes.name, s, 48).to_bytes() for s in mattes.seeds["train"]
    ]
