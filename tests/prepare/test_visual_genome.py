"""Visual Genome in its official layout: what its objects and its region descriptions become, and what is dropped."""

from __future__ import annotations

import collections
import json

import cv2
import numpy as np
import pytest

from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.input.tasks import to_example
from mqformer_jax.prepare import cli
from mqformer_jax.prepare.datasets.visual_genome import visual_genome

H, W = 60, 80
TREE, NEAR_TREE, FAR = (5, 5, 40, 40), (6, 5, 40, 41), (50, 20, 25, 30)  # x, y, width, height


def _object(*names, at=TREE):
    x, y, w, h = at
    return {
        "synsets": ["x.n.01"],
        "h": h,
        "object_id": 1058549,
        "merged_object_ids": [],
        "names": list(names),
        "w": w,
        "y": y,
        "x": x,
    }


def _region(phrase, at=TREE):
    x, y, w, h = at
    return {"region_id": 1382, "width": w, "height": h, "image_id": 1, "phrase": phrase, "y": y, "x": x}


class Genome:
    """The folder visual_genome/: two images, of which the first is COCO's, and whatever is said of them."""

    def __init__(self, root):
        self.root = root
        for image_id, folder in ((1, "VG_100K_2"), (107, "VG_100K")):
            (root / folder).mkdir()
            cv2.imwrite(str(root / folder / f"{image_id}.jpg"), np.full((H, W, 3), 99, np.uint8))
        url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
        shared = {"width": W, "height": H, "flickr_id": None, "url": url}
        self.data = [{"image_id": 1, "coco_id": 581857, **shared}, {"image_id": 107, "coco_id": None, **shared}]

    def json(self, name, data):
        (self.root / name).write_text(json.dumps(data))
        return str(self.root / name)

    def plan(self, objects=None, regions=None, alias=None, min_images=1):
        """objects, regions: lists of them by image id."""
        files = [self.json("image_data.json", self.data), None, None, None]
        if objects is not None:
            files[1] = self.json(
                "objects.json", [{"image_id": i, "objects": o, "image_url": ""} for i, o in objects.items()]
            )
        if regions is not None:
            files[2] = self.json("region_descriptions.json", [{"id": i, "regions": r} for i, r in regions.items()])
        if alias is not None:
            files[3] = str(self.root / "object_alias.txt")
            (self.root / "object_alias.txt").write_text(alias)
        return visual_genome([str(self.root / "VG_100K"), str(self.root / "VG_100K_2")], *files, min_images)

    def made(self, *args, **options):
        """Plan, records by key and all problems."""
        plan = self.plan(*args, **options)
        built = [plan.make(job) for job in plan.jobs]
        problems = sum(
            (collections.Counter(b.problems.counts) for b in built), collections.Counter(plan.problems.counts)
        )
        records = [Record.from_bytes(b.record) for b in built if b.record is not None]
        return plan, {r.key: r for r in records}, problems


@pytest.fixture
def genome(tmp_path):
    return Genome(tmp_path)


def _said(record):
    """(phrases, box as x, y, width, height) of every region."""
    boxes = [
        (s.texts, (s.box[0], s.box[1], s.box[2] - s.box[0], s.box[3] - s.box[1]))
        for s in record.segments
        if s.class_id is None
    ]
    return dict(boxes)


def test_objects_become_class_boxes_and_regions_become_phrase_boxes(genome):
    objects = {1: [_object("Trees"), _object("man", at=FAR)], 107: [_object("man")]}
    plan, records, problems = genome.made(objects, {1: [_region("The  tree is green.")]})
    assert (
        [c.texts for c in plan.classes] == [("man",), ("trees",)]
        and not any(c.is_region for c in plan.classes)
        and not problems
    )
    tree, man, phrase = records["1.jpg"].segments
    assert (tree.class_id, tree.box, tree.texts) == (1, (5, 5, 45, 45), ())
    assert (man.class_id, man.box) == (0, (50, 20, 75, 50))
    assert (phrase.class_id, phrase.box, phrase.texts) == (None, (5, 5, 45, 45), ("the tree is green",))
    assert all(s.mask is None for record in records.values() for s in record.segments)
    assert records["107.jpg"].image == (genome.root / "VG_100K" / "107.jpg").read_bytes()


def test_no_class_or_phrase_is_marked_absent(genome):
    plan, records, _ = genome.made({1: [_object("tree")], 107: [_object("man")]}, {1: [_region("a tree")]})
    info = DatasetInfo("vg", plan.classes, {}, plan.exhaustive, unique_texts=plan.unique_texts)
    assert not plan.exhaustive and not plan.unique_texts
    for record, name in ((records["1.jpg"], "tree"), (records["107.jpg"], "man")):
        prompts = to_example(record, info, ["detection"], "x").prompts
        assert [(p.texts, p.exhaustive) for p in prompts] == [((name,), False)]
        assert not record.absent_classes and not record.absent_texts


def test_aliases_form_one_class_and_rare_names_are_dropped(genome):
    television = [_object("television"), _object("television", at=FAR), _object("tv", at=FAR), _object("Tv set")]
    objects = {1: [_object("tv"), _object("gnu", at=FAR), _object()], 107: television}
    plan, records, problems = genome.made(objects, alias="television,tv,tv set\nman,men\n", min_images=2)
    assert [c.texts for c in plan.classes] == [("tv",)]  # the spelling of most images first, rare ones not as texts
    assert [len(r.segments) for r in records.values()] == [1, 2]
    assert problems == {
        "segment: object name in fewer than 2 images": 1,
        "segment: object without a name": 1,
        "segment: object annotated twice": 2,
    }


def test_min_images_counts_images_rather_than_objects(genome):
    plan = genome.plan(
        {1: [_object("cup"), _object("cup", at=FAR), _object("dog")], 107: [_object("dog")]}, min_images=2
    )
    assert [c.name for c in plan.classes] == ["dog"]


def test_object_with_several_names_gets_the_first_known_class(genome):
    objects = {1: [_object("chap", "man")], 107: [_object("man")]}
    plan, records, problems = genome.made(objects, min_images=2)
    assert (
        [c.name for c in plan.classes] == ["man"]
        and [s.class_id for s in records["1.jpg"].segments] == [0]
        and not problems
    )


def test_duplicate_object_boxes_are_merged_and_distinct_ones_kept(genome):
    _, records, problems = genome.made(
        {1: [_object("tree"), _object("tree", at=NEAR_TREE), _object("tree", at=FAR), _object("bush")]}
    )
    assert [s.box for s in records["1.jpg"].segments] == [(5, 5, 45, 45), (50, 20, 75, 50), (5, 5, 45, 45)]
    assert problems == {"segment: object annotated twice": 1, "image: has nothing labeled": 1}


def test_phrase_of_two_objects_is_dropped_but_of_duplicate_boxes_kept(genome):
    regions = [
        _region("a tree"),
        _region("A tree.", at=NEAR_TREE),
        _region("a man"),
        _region("a man", at=FAR),
        _region("green tree"),
        _region(" "),
    ]
    _, records, problems = genome.made(regions={1: regions, 107: [_region("a man")]})
    assert _said(records["1.jpg"]) == {("a tree", "green tree"): TREE}  # the phrases of one box are one segment
    assert _said(records["107.jpg"]) == {("a man",): TREE}
    assert problems == {
        "expression: names two objects": 1,
        "expression: annotated twice for one box": 1,
        "expression: no sentence": 1,
    }


def test_boxes_are_clipped_and_invalid_ones_dropped(genome):
    objects = [
        _object("tree", at=(-3, 10, 30, 30)),
        _object("tree", at=(90, 10, 5, 5)),
        _object("tree", at=(1, 1, 0, 9)),
        _object("tree", at=(None, 1, 9, 9)),
    ]
    _, records, problems = genome.made(
        {1: objects, 107: [_object("tree")]}, {1: [_region("far away", at=(W, H, 9, 9))]}
    )
    assert [s.box for s in records["1.jpg"].segments] == [(0, 10, 27, 40)] and records["1.jpg"].partial_classes == (0,)
    reasons = (
        "segment: box outside its image",
        "segment: box without area",
        "segment: malformed mask or box",
        "expression: box outside its image",
    )
    assert all(problems[reason] == 1 for reason in reasons)


def test_coco_images_are_identified_and_can_be_excluded(genome):
    plan = genome.plan({1: [_object("tree")], 107: [_object("tree")]})
    assert [(job.id, job.origin) for job in plan.jobs] == [(581857, "coco/581857"), ("vg/107", "")]
    held_out = genome.json("val.json", {"images": [{"id": 581857}]})
    files = {"--image_data": "image_data.json", "--objects": "objects.json", "--output": "out"}
    words = [word for option, name in files.items() for word in (option, str(genome.root / name))]
    images = ["--images", str(genome.root / "VG_100K"), str(genome.root / "VG_100K_2")]
    assert (
        cli.main(["visual_genome", *images, *words, "--min_images", "1", "--exclude", held_out, "--workers", "1"]) == 0
    )
    source = ShardSource(str(genome.root / "out"), "visual_genome", "train")
    assert [Record.from_bytes(source[i]).key for i in range(len(source))] == ["107.jpg"]
    assert not source.info.exhaustive and not source.info.unique_texts


def test_version_1_image_data_is_read(genome):
    genome.data = [{"id" if k == "image_id" else k: v for k, v in entry.items()} for entry in genome.data]
    _, records, problems = genome.made({1: [_object("tree")], 5: [_object("tree")], 107: [_object("tree")]})
    assert len(records) == 2 and problems == {"image: in objects, not in image_data.json": 1}


def test_first_entry_of_an_image_listed_twice_is_used(genome):
    path = genome.json("objects.json", [{"image_id": 1, "objects": [_object(name)]} for name in ("tree", "man")])
    plan = visual_genome(
        [str(genome.root / "VG_100K")], genome.json("image_data.json", genome.data), path, None, None, 1
    )
    assert [c.name for c in plan.classes] == ["tree"] and plan.problems.counts == {
        "note: image listed twice in objects; the first entry is used": 1
    }


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("objects.json", {"images": []}, "objects.json: not a list of objects with 'image_id'"),
        ("objects.json", [{"image_id": 1, "regions": []}], "objects.json: field 'objects' is not a list"),
        (
            "objects.json",
            [{"image_id": 1, "objects": ["tree"]}],
            "objects.json: field 'objects' is not a list of objects",
        ),
        ("image_data.json", [[1]], "image_data.json: not a list of objects with 'image_id'"),
    ],
)
def test_invalid_inputs_are_one_line_errors(genome, name, content, said):
    genome.plan({1: [_object("tree")]})
    genome.json(name, content)
    paths = [str(genome.root / file) for file in ("image_data.json", "objects.json")]
    with pytest.raises(ValueError) as error:
        visual_genome([str(genome.root / "VG_100K")], *paths, None)
    assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="give --objects, --regions, or both"):
        visual_genome([str(genome.root / "VG_100K")], paths[0], None, None)
    with pytest.raises(FileNotFoundError, match="alias.txt: no such file"):
        visual_genome(
            [str(genome.root / "VG_100K")],
            genome.json("image_data.json", []),
            None,
            genome.json("r.json", []),
            "alias.txt",
        )
