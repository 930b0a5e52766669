"""COCO json that is malformed: one line, or dropped, counted and its class not taught absent."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from test_coco import SQUARE, TRIANGLE, H, W, _json, _made, _picture, _texts

from mqformer_jax.prepare.formats import coco

IMAGE = {"id": 0, "file_name": "a.png", "height": H, "width": W}
CAT, DOG = {"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}
GOOD = {"id": 1, "image_id": 0, "category_id": 7, "segmentation": SQUARE}
OTHER = {**IMAGE, "id": 1, "file_name": "b.png"}
TRUE = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(SQUARE, H, W)))
COUNTS = coco_mask.encode(np.asfortranarray(TRUE))["counts"].decode()


def _toy(folder, annotations, images=(IMAGE,), categories=(CAT, DOG)):
    for image in images:
        if isinstance(image.get("file_name"), str):
            _picture(folder / "images" / image["file_name"])
    data = {"images": images, "annotations": annotations, "categories": categories}
    return coco.instances(_json(folder / "ann.json", data), str(folder / "images"))


def _said(folder, refs, instances=(), images=(IMAGE, OTHER)):
    for image in images:
        _picture(folder / "images" / image["file_name"])
    files = [
        _json(folder / f"i{n}.json", {"images": images, "annotations": [a], "categories": [CAT]})
        for n, a in enumerate(instances)
    ]
    path = _json(folder / "refs.json", {"refs": refs, "images": images, "categories": [CAT]})
    return coco.referring(path, str(folder / "images"), files)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"annotations": [{**GOOD, "image_id": "0"}]},
            "no annotation has a known 'image_id'; the first has '0', but known ids are, e.g., 0; use the same ids",
        ),
        (
            {"annotations": [{**GOOD, "category_id": "7"}]},
            "no annotation has a known 'category_id'; the first has '7', but known ids are, e.g., 7, 8; use",
        ),
        ({"categories": []}, "no annotation has a known 'category_id'; the first has 7, but no id is known"),
        ({"categories": [CAT, {**DOG, "id": 7}]}, "category id 7 occurs 2 times"),
        (
            {"categories": [{**CAT, "name": None}]},
            "category {'id': 7, 'name': None} needs 'id' (an integer) and 'name' (a string)",
        ),
        (
            {"categories": [{**CAT, "synonyms": [None]}]},
            "field 'synonyms' of category 'cat' contains values that are not strings",
        ),
        (
            {"categories": [{**CAT, "synonyms": 5}]},
            "field 'synonyms' in 'categories' cannot be 5; expected a list or a string",
        ),
        ({"categories": [{**CAT, "isthing": "no"}]}, "in a category, 'isthing' is neither 0 nor 1"),
        (
            {"annotations": [{**GOOD, "category_id": [7]}]},
            "field 'category_id' in 'annotations' cannot be [7]; expected a number or a string",
        ),
        ({"images": [{**IMAGE, "file_name": 5}]}, "field 'file_name' in 'images' cannot be 5; expected a string"),
        (
            {"images": [{**IMAGE, "file_name": "x/a.png"}, {**OTHER, "file_name": "y/a.png"}]},
            "the images x/a.png and y/a.png would both be read from",
        ),
    ],
)
def test_invalid_or_inconsistent_coco_json_is_a_one_line_error(tmp_path, fields, said):
    (tmp_path / "images").mkdir()
    data = {"images": [IMAGE], "annotations": [GOOD], "categories": [CAT, DOG], **fields}
    with pytest.raises(ValueError) as error:
        coco.instances(_json(tmp_path / "ann.json", data), str(tmp_path / "images"))
    assert "ann.json: " in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"iscrowd": "maybe"}, "'iscrowd' is neither 0 nor 1"),
        ({"segmentation": {"size": [H, W], "counts": [100, 300]}}, "run-length code does not fit its image"),
        ({"segmentation": {"size": [H, W], "counts": COUNTS[:-4]}}, "run-length code does not fit its image"),
        ({"segmentation": [*SQUARE, [1, 1, 5, 5, 9]]}, "a part of its polygon is malformed"),
        ({"segmentation": [*SQUARE, [1, 1, 5, 5, 9, float("nan")]]}, "a part of its polygon is malformed"),
    ],
)
def test_malformed_annotation_is_dropped_and_its_class_marked_partial(tmp_path, fields, reason):
    records, problems = _made(_toy(tmp_path, [GOOD, {**GOOD, "id": 2, "category_id": 8, **fields}]))
    assert problems == {f"segment: {reason}": 1}
    assert [s.class_id for s in records["a.png"].segments] == [0] and records["a.png"].partial_classes == (1,)


@pytest.mark.parametrize(("value", "crowd"), [("0", False), ("false", False), (None, False), ("1", True), (True, True)])
def test_iscrowd_flag_accepts_strings_and_null(tmp_path, value, crowd):
    records, problems = _made(_toy(tmp_path, [{**GOOD, "iscrowd": value}]))
    assert records["a.png"].segments[0].crowd == crowd and not problems


@pytest.mark.parametrize(("box", "kept"), [([12, 5, 18, 20], True), ([13.5, 5, 16.5, 20], False)])
def test_box_is_kept_only_if_it_agrees_with_its_mask(tmp_path, box, kept):
    records, problems = _made(_toy(tmp_path, [{**GOOD, "bbox": box}]))
    assert records["a.png"].segments[0].box[0] == (box[0] if kept else 10) and bool(problems) != kept


def test_synonyms_given_as_one_string_are_one_synonym():
    assert _texts({"name": "cat", "synonyms": "kitty"}, {"name": "dog", "synonyms": None}) == [
        ("cat", "kitty"),
        ("dog",),
    ]


@pytest.mark.parametrize(
    ("fields", "texts", "absent", "reasons"),
    [
        ({"sentences": "the red cup"}, ("the red cup",), (), {}),
        ({"sentences": ["a cup", None, {"sent": 5}]}, ("a cup",), (), {"expression: no text": 2}),
        ({"sentences": ["a cup"], "no_target": "false"}, ("a cup",), (), {}),
        ({"sentences": ["a cup"], "no_target": "True"}, (), ("a cup",), {}),
    ],
)
def test_only_string_expressions_are_kept(tmp_path, fields, texts, absent, reasons):
    records, problems = _made(_said(tmp_path, [{"image_id": 0, "bbox": [10, 5, 20, 20], **fields}]))
    assert (
        tuple(t for s in records["a.png"].segments for t in s.texts) == texts
        and records["a.png"].absent_texts == absent
    )
    assert problems == reasons


def test_references_to_an_annotation_of_another_image_are_dropped(tmp_path):
    refs = [{"image_id": i, "ann_id": 1, "sentences": ["the cat"]} for i in (0, 1)]
    records, problems = _made(_said(tmp_path, refs, [GOOD]))
    assert list(records) == ["a.png"] and problems == {"expression: its annotation belongs to another image": 1}
    items = _json(tmp_path / "items.json", {"items": [{"image_id": i, "ann_ids": [1]} for i in (0, 1)]})
    records, problems = _made(coco.foreground(items, str(tmp_path / "images"), [str(tmp_path / "i0.json")]))
    assert list(records) == ["a.png"] and problems == {"image: its annotations belong to another image": 1}


def test_annotation_ids_must_be_unique_across_instance_files(tmp_path):
    refs = [{"image_id": 0, "ann_id": 1, "sentences": ["the cat"]}]
    assert len(_said(tmp_path, refs, [GOOD, GOOD]).jobs) == 1
    with pytest.raises(
        ValueError, match="i1.json: annotation id 1 occurs twice in --instances, for different annotations"
    ):
        _said(tmp_path, refs, [GOOD, {**GOOD, "segmentation": TRIANGLE}])


@pytest.mark.parametrize(
    ("infos", "partial"),
    [
        ([(1, 7)], ()),
        ([(1, 7), (9, 8)], (1,)),  # not in the PNG
        ([(1, 7), (1, 8)], (0, 1)),  # one id, two classes
        ([(1, 7), (2, 8)], (1, 2)),  # 3 is in the PNG alone
    ],
)
def test_class_that_lost_a_panoptic_segment_is_marked_partial(tmp_path, infos, partial):
    ids = np.zeros((H, W, 3), np.uint8)
    ids[:10, :, 2] = 1  # OpenCV writes red last
    if len(infos) == 2 and infos[1][0] == 2:
        ids[10:20, :, 2] = 3
    _picture(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    cv2.imwrite(str(tmp_path / "masks" / "a.png"), ids)
    annotation = {"image_id": 0, "file_name": "a.png", "segments_info": [{"id": i, "category_id": c} for i, c in infos]}
    categories = [{**c, "isthing": 1} for c in (CAT, DOG, {"id": 9, "name": "cow"})]
    data = {
        "images": [IMAGE],
        "annotations": [annotation, annotation, {**annotation, "image_id": 4}],
        "categories": categories,
    }
    plan = coco.panoptic(_json(tmp_path / "p.json", data), str(tmp_path / "images"), str(tmp_path / "masks"))
    record = _made(plan)[0]["a.png"]
    assert [s.class_id for s in record.segments] == [0] and record.partial_classes == partial
    assert plan.problems.counts == {
        "note: image annotated twice in the JSON; the first annotation is used": 1,
        "segment: its image is not in the JSON": 1,
    }
