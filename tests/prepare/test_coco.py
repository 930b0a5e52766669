"""Data sets that come as COCO json, in their official layouts: Objects365 v2, LVIS v1, RefCOCO, Roboflow's exports
(SeginW).
"""

from __future__ import annotations

import collections
import json
import os
import pickle
import struct

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.input.tasks import to_example
from mqformer_jax.prepare.formats import coco
from mqformer_jax.prepare.formats.coco_categories import vocabulary

H, W = 40, 60
SQUARE = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]]
TRIANGLE = [[40.0, 20.0, 55.0, 20.0, 55.0, 35.0]]


def _picture(path, shade=99):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((H, W, 3), shade, np.uint8))


def _json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return str(path)


def _made(plan):
    """Records by key, and all problems, those of the json and those of the images."""
    records, problems = {}, collections.Counter(plan.problems.counts)
    for job in plan.jobs:
        built = plan.make(job)
        problems.update(built.problems.counts)
        if built.record is not None:
            records[job.key] = Record.from_bytes(built.record)
    return records, problems


def _texts(*categories):
    return [c.texts for c in vocabulary([{"id": i, **c} for i, c in enumerate(categories)], "x.json")[0]]


# ---- Objects365 v2 ------------------------------------------------------------------------------------------------

O365_IMAGES = [
    {
        "height": H,
        "id": 420917,
        "license": 5,
        "width": W,
        "file_name": "images/v1/patch8/objects365_v1_00420917.jpg",
        "url": "",
    },
    {
        "height": H,
        "id": 908726,
        "license": 5,
        "width": W,
        "file_name": "images/v2/patch16/objects365_v2_00908726.jpg",
        "url": "",
    },
]
O365_BOX = {
    "id": 51,
    "iscrowd": 0,
    "isfake": 0,
    "area": 1584.6,
    "isreflected": 0,
    "bbox": [4.5, 8.25, 35.5, 14.5],
    "image_id": 420917,
}
O365_CATEGORIES = [{"id": 13, "name": "Cabinet/shelf"}, {"id": 53, "name": "Bakset"}, {"id": 93, "name": "Dog"}]


def _objects365(folder, annotations, images=O365_IMAGES):
    data = {"images": images, "annotations": annotations, "categories": O365_CATEGORIES, "licenses": [{"name": "x"}]}
    return coco.instances(_json(folder / "zhiyuan_objv2_train.json", data), str(folder / "train"))


@pytest.mark.parametrize("unpacked", ["images/v1/patch8", "v1/patch8", "patch8", "."])
def test_image_is_found_by_any_suffix_of_its_path(tmp_path, unpacked):
    _picture(tmp_path / "train" / unpacked / "objects365_v1_00420917.jpg")
    records, problems = _made(_objects365(tmp_path, [{**O365_BOX, "category_id": 93}]))
    assert list(records) == [O365_IMAGES[0]["file_name"]] and records[O365_IMAGES[0]["file_name"]].segments[0].box == (
        4.5,
        8.25,
        40,
        22.75,
    )
    assert problems["image: file is missing"] == 1  # of three that the set is known to lack
    assert problems["note: image without annotations; all classes count as absent"] == 1


def test_path_lookup_checks_folders_rather_than_every_image(tmp_path, monkeypatch):
    (tmp_path / "train" / "patch8").mkdir(parents=True)
    images = [{**O365_IMAGES[0], "id": i, "file_name": f"images/v1/patch{i % 3 + 7}/{i}.jpg"} for i in range(300)]
    asked = []
    monkeypatch.setattr(os.path, "isdir", lambda path, real=os.path.isdir: asked.append(path) or real(path))
    monkeypatch.setattr(os.path, "exists", lambda path, real=os.path.exists: asked.append(path) or real(path))
    assert len(_objects365(tmp_path, [], images).jobs) == 300 and len(asked) < 20


def test_objects365_crowds_fakes_and_duplicate_boxes(tmp_path):
    _picture(tmp_path / "train" / "patch8" / "objects365_v1_00420917.jpg")
    dog = {**O365_BOX, "category_id": 93}
    again, basket = {**dog, "id": 52}, {**O365_BOX, "id": 53, "category_id": 53}
    pack = {**dog, "id": 54, "iscrowd": 1, "bbox": [0, 0, 9, 9]}
    painted = {**dog, "id": 55, "isfake": 1, "bbox": [20, 20, 9, 9]}
    plan = _objects365(tmp_path, [dog, again, basket, pack, painted], O365_IMAGES[:1])
    records, problems = _made(plan)
    found = [(plan.classes[s.class_id].name, s.crowd) for s in records[O365_IMAGES[0]["file_name"]].segments]
    assert found == [("Dog", False), ("Basket", False), ("Dog", True), ("Dog", False)]
    assert problems == {"segment: the same box twice": 1} and plan.exhaustive


def test_load_json_drops_unused_annotation_fields(tmp_path):
    path = _json(tmp_path / "a.json", {"annotations": [{**O365_BOX, "category_id": 93}]})
    assert coco.load_json(path, "annotations")["annotations"][0].keys() == {
        "id",
        "iscrowd",
        "bbox",
        "image_id",
        "category_id",
    }


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("Cabinet/shelf", ("Cabinet", "shelf")),
        ("Washing Machine/Drying Machine", ("Washing Machine", "Drying Machine")),
        ("Tape Measur/ Ruler", ("Tape Measure", "Ruler")),
        ("Cutting/chopping Board", ("Cutting Board", "Chopping Board")),
        ("Cigar/Cigarette ", ("Cigar", "Cigarette")),
        ("Campel", ("Camel",)),
        ("black and/or white cat", ("black and/or white cat",)),
        ("rider w/o helmet", ("rider w/o helmet",)),
        ("24/7 shop", ("24/7 shop",)),
        ("N/A", ("N/A",)),
        ("wiper_(for_windshield/screen)", ("wiper (for windshield/screen)",)),
    ],
)
def test_slash_in_a_class_name_separates_only_true_alternatives(name, texts):
    assert _texts({"name": name}) == [texts]


def test_shared_synonym_is_kept_only_for_the_class_with_that_exact_name():
    assert _texts({"name": "Bottle/can"}, {"name": "can"}, {"name": "tin/pot"}, {"name": "kettle/pot"}) == [
        ("Bottle",),
        ("can",),
        ("tin",),
        ("kettle",),
    ]
    assert _texts({"name": "Bottle/can"}, {"name": "Bottle"}) == [("Bottle/can", "can"), ("Bottle",)]


# ---- LVIS v1 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lvis(tmp_path):
    """Two images of LVIS v1, with the fields of its json, as a Plan."""
    images, annotations = [], []
    for number, split in ((391895, "train2017"), (139, "val2017")):
        name = f"{split}/{number:012d}.jpg"
        _picture(tmp_path / "coco" / name)
        extra = {
            "date_captured": "2013",
            "license": 3,
            "flickr_url": "",
            "height": H,
            "width": W,
            "coco_url": f"http://images.cocodataset.org/{name}",
        }
        images.append({"id": number, "neg_category_ids": [2, 4], "not_exhaustive_category_ids": [3], **extra})
    for image_id, category, polygons in (
        (391895, 1, SQUARE),
        (391895, 3, TRIANGLE),
        (391895, 3, SQUARE),
        (139, 2, TRIANGLE),
    ):
        box = cv2.boundingRect(np.array(polygons, np.float32).reshape(-1, 2))
        annotations.append(
            {
                "id": len(annotations),
                "image_id": image_id,
                "category_id": category,
                "segmentation": polygons,
                "bbox": box,
            }
        )
    names = [
        ("bow_(weapon)", ["bow_(weapon)"]),
        ("bow_(decorative_ribbons)", ["bow_(decorative_ribbons)"]),
        ("crab_(animal)", ["crab_(animal)"]),
    ]
    names.append(("taxi", ["taxi", "taxicab", "crab_(animal)"]))
    more = {"frequency": "r", "synset": "bow.n.04", "def": "a weapon", "image_count": 1, "instance_count": 1}
    categories = [{"id": i + 1, "name": name, "synonyms": synonyms, **more} for i, (name, synonyms) in enumerate(names)]
    data = {"images": images, "annotations": annotations, "categories": categories, "info": {}, "licenses": []}
    return coco.instances(_json(tmp_path / "lvis_v1_train.json", data), str(tmp_path / "coco"))


def test_lvis_records_absent_and_partially_labeled_classes(lvis):
    records, problems = _made(lvis)
    record = records["train2017/000000391895.jpg"]
    assert not problems and not lvis.exhaustive
    assert (
        [s.class_id for s in record.segments] == [0, 2, 2]
        and record.absent_classes == (1, 3)
        and record.partial_classes == (2,)
    )
    oracle = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(TRIANGLE, H, W)))
    np.testing.assert_array_equal(record.decode_mask(record.segments[1].mask), oracle.astype(bool))
    # says itself that class 2 is absent, and labels it: what is labeled is there
    other = records["val2017/000000000139.jpg"]
    assert other.absent_classes == (3,) and [s.class_id for s in other.segments] == [1]


def test_lvis_prompts_cover_only_the_classes_verified_for_an_image(lvis):
    info = DatasetInfo("lvis", lvis.classes, {}, lvis.exhaustive)
    example = to_example(_made(lvis)[0]["train2017/000000391895.jpg"], info, ["instance"], "x")
    asked = {
        prompt.texts[0]: (prompt.exhaustive, sum(i in t.prompts for t in example.targets))
        for i, prompt in enumerate(example.prompts)
    }
    assert asked == {
        "bow (weapon)": (True, 1),
        "bow (decorative ribbons)": (True, 0),
        "crab (animal)": (False, 2),
        "taxi": (True, 0),
    }


def test_lvis_class_names_keep_qualifiers_and_images_have_coco_origins(lvis):
    assert [c.texts for c in lvis.classes][2:] == [("crab (animal)",), ("taxi", "taxicab")]
    assert [job.origin for job in lvis.jobs] == ["coco/391895", "coco/139"]


def test_lvis_images_are_found_in_a_single_flat_folder(lvis, tmp_path):
    images = str(tmp_path / "coco" / "train2017")
    records, problems = _made(coco.instances(str(tmp_path / "lvis_v1_train.json"), images))
    assert list(records) == ["train2017/000000391895.jpg"] and problems == {"image: file is missing": 1}


# ---- RefCOCO, RefCOCO+, RefCOCOg ----------------------------------------------------------------------------------


def _python2(value, protocol):
    """The pickle that Python 2 writes: byte strings, which Python 3 never writes, for whatever is ASCII."""
    if protocol == 2:
        return b"\x80\x02" + _binary(value) + b"."
    return _text(value) + b"."


def _text(value):
    if isinstance(value, dict):
        return b"(d" + b"".join(_text(k) + _text(v) + b"s" for k, v in value.items())
    if isinstance(value, list):
        return b"(l" + b"".join(_text(v) + b"a" for v in value)
    if isinstance(value, str):
        return (
            b"S" + repr(value).encode() + b"\n"
            if value.isascii()
            else b"V" + value.encode("raw-unicode-escape") + b"\n"
        )
    return b"F%r\n" % value if isinstance(value, float) else b"L%dL\n" % value if value >= 1 << 31 else b"I%d\n" % value


def _binary(value):
    if isinstance(value, dict):
        return b"}(" + b"".join(_binary(k) + _binary(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_binary, value)) + b"e"
    if isinstance(value, str):
        encoded = value.encode()
        return (
            b"U" + bytes([len(encoded)]) + encoded
            if value.isascii()
            else b"X" + struct.pack("<I", len(encoded)) + encoded
        )
    return b"G" + struct.pack(">d", value) if isinstance(value, float) else b"\x8a\x05" + value.to_bytes(5, "little")


def _ref(ref_id, ann_id, split, *sents, image_id=581857):
    sentences = [
        {"tokens": s.split(), "raw": s.upper(), "sent_id": 9 * ref_id + i, "sent": s} for i, s in enumerate(sents)
    ]
    name = f"COCO_train2014_{image_id:012d}_{ref_id}.jpg"
    ref = {
        "sent_ids": [s["sent_id"] for s in sentences],
        "file_name": name,
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image_id,
    }
    return {**ref, "split": split, "sentences": sentences, "category_id": 1}


REFS = [
    _ref(0, 1719310, "train", "the lady with the blue shirt", "lady in the café", "blue shirt", "blue shirt"),
    _ref(16, 1719311, "train", "man", "blue shirt"),
    _ref(2, 1719312, "testA", "lady", "lady", "person", image_id=98304),
    _ref(3, 3 << 31, "testA", "person", image_id=98304),
    _ref(4, 1719312, "val", "her", image_id=98304),
]


@pytest.fixture
def refcoco(tmp_path):
    """The folder refcoco/ as it unpacks, its images beside it."""
    for number in (581857, 98304):
        _picture(tmp_path / "train2014" / f"COCO_train2014_{number:012d}.jpg")
    runs = {"size": [H, W], "counts": [100, 300, H * W - 400]}
    shapes = [(1719310, SQUARE, 581857), (1719311, TRIANGLE, 581857), (1719312, SQUARE, 98304), (3 << 31, runs, 98304)]
    annotations = [
        {
            "id": i,
            "segmentation": s,
            "area": 1.0,
            "iscrowd": int(s is runs),
            "image_id": image,
            "bbox": [0, 0, 0, 0],
            "category_id": 1,
        }
        for i, s, image in shapes
    ]
    for annotation in annotations:
        rle = annotation["segmentation"]
        rle = (
            coco_mask.frPyObjects(rle, H, W)
            if isinstance(rle, dict)
            else coco_mask.merge(coco_mask.frPyObjects(rle, H, W))
        )
        annotation["bbox"] = coco_mask.toBbox(rle).tolist()
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": H, "width": W} for i in (581857, 98304, 5)
    ]
    data = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
        "licenses": [],
    }
    _json(tmp_path / "refcoco" / "instances.json", data)
    return tmp_path


def _referring(root, refs, split, protocol=2):
    path = root / "refcoco" / "refs(unc).p"
    path.write_bytes(refs if isinstance(refs, bytes) else _python2(refs, protocol))
    return coco.referring(str(path), str(root / "train2014"), [str(root / "refcoco" / "instances.json")], split)


@pytest.mark.parametrize("protocol", [0, 2])
def test_refs_pickled_by_python_2_are_read(refcoco, protocol):
    assert pickle.loads(_python2(REFS, protocol), encoding="latin1") == REFS
    plan = _referring(refcoco, REFS, "train", protocol)
    records, problems = _made(plan)
    (record,) = records.values()
    lady, man = record.segments
    assert lady.texts == ("the lady with the blue shirt", "lady in the café") and man.texts == ("man",)
    for segment, polygons in ((lady, SQUARE), (man, TRIANGLE)):
        oracle = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, H, W)))
        np.testing.assert_array_equal(record.decode_mask(segment.mask), oracle.astype(bool))
    assert problems == {"expression: names two objects": 1} and record.key == "COCO_train2014_000000581857.jpg"
    assert record.origin == "coco/581857" and plan.jobs[0].id == 581857 and plan.unique_texts


def test_classes_of_referred_objects_are_not_exhaustive(refcoco):
    plan = _referring(refcoco, REFS, "train")
    (record,) = _made(plan)[0].values()
    example = to_example(
        record, DatasetInfo("refcoco", plan.classes, {}, plan.exhaustive), ["instance", "referring"], "x"
    )
    assert {p.texts[0]: p.exhaustive for p in example.prompts}["person"] is False


def test_refcoco_eval_splits_keep_duplicate_expressions(refcoco):
    (record,) = _made(_referring(refcoco, REFS, "testA"))[0].values()
    lady, crowd = record.segments
    assert lady.texts == ("lady", "lady", "person") and crowd.texts == ("person",)
    assert not crowd.crowd and record.decode_mask(crowd.mask).ravel(order="F").nonzero()[0].tolist() == list(
        range(100, 400)
    )


def test_refs_train_split_cannot_be_mixed_with_other_splits(refcoco):
    with pytest.raises(
        ValueError, match=r"refs\(unc\).p: contains the splits testA, train, val; choose one with --refs_split"
    ):
        _referring(refcoco, REFS, None)
    with pytest.raises(ValueError, match="no ref has the split 'test'; the file has the splits testA, train, val"):
        _referring(refcoco, REFS, "test")
    assert len(_referring(refcoco, REFS[2:], None).jobs) == 1  # testA and val


@pytest.mark.parametrize(
    "refs",
    [
        pickle.dumps([{"image_id": np.int64(581857), "split": "train"}], protocol=2),
        pickle.dumps([{"image_id": 581857, "split": collections.OrderedDict(a=1)}], protocol=0),
        b"cos\nsystem\n(S'touch it_ran'\ntR.",
        _python2(REFS, 2)[:-20],
        _python2(REFS, 0)[:-20],
        _python2(["train"], 2),
        b"",
    ],
    ids=["numpy", "class", "code", "cut", "cut_text", "strings", "empty"],
)
def test_invalid_or_unsafe_refs_pickles_are_one_line_errors(refcoco, refs, monkeypatch):
    monkeypatch.chdir(refcoco)
    with pytest.raises(ValueError) as error:
        _referring(refcoco, refs, "train")
    assert "refs(unc).p: " in str(error.value) and "\n" not in str(error.value) and not os.path.exists("it_ran")


def test_refs_without_an_instances_file_are_rejected(refcoco):
    (refcoco / "refcoco" / "refs(umd).p").write_bytes(_python2(REFS[:2], 2))
    with pytest.raises(ValueError, match=r"refs\(umd\).p: the file lists no images; give --instances"):
        coco.referring(str(refcoco / "refcoco" / "refs(umd).p"), str(refcoco / "train2014"))


# ---- Roboflow's exports, SeginW -----------------------------------------------------------------------------------


def _export(folder, categories, used):
    _picture(folder / "valid" / "a_jpg.rf.1.jpg")
    images = [{"id": 0, "license": 1, "file_name": "a_jpg.rf.1.jpg", "height": H, "width": W, "date_captured": "2022"}]
    annotations = [
        {"id": i, "image_id": 0, "category_id": c, "bbox": [10, 5, 20, 20], "segmentation": SQUARE}
        for i, c in enumerate(used)
    ]
    data = {"info": {}, "licenses": [], "categories": categories, "images": images, "annotations": annotations}
    plan = coco.instances(_json(folder / "valid" / "_annotations_min1cat.coco.json", data), str(folder / "valid"))
    return plan, _made(plan)[0]["a_jpg.rf.1.jpg"]


def _categories(*pairs):
    return [{"id": i, "name": name, "supercategory": above} for i, (name, above) in enumerate(pairs)]


def test_roboflow_super_category_without_annotations_is_dropped(tmp_path):
    plan, record = _export(tmp_path, _categories(("tumor", "none"), ("tumor", "tumor"), ("skull", "tumor")), [1])
    assert [c.name for c in plan.classes] == ["tumor", "skull"] and record.segments[0].class_id == 0
    assert list(plan.problems.counts) == [
        "note: dropped the super-category of all other categories, which has no annotations"
    ]


@pytest.mark.parametrize(
    ("pairs", "used"),
    [
        ([("animal", "none"), ("dog", "animal")], [0, 1]),  # labeled itself
        ([("Hand-Segmentation", "Hand-Segmentation"), ("hand", "Hand-Segmentation")], [1]),  # SeginW's file as it is
        ([("person", "person"), ("bicycle", "vehicle")], [1]),  # COCO's
        ([("poles", "utility-pole")], []),
        ([("a", "none"), ("b", "none")], []),
        ([("animal", "none"), ("dog", "animal"), ("cat", "none")], []),
        ([("animal", "animal"), ("dog", "animal"), ("cat", "none")], []),
    ],
)
def test_categories_other_than_an_unused_super_category_are_kept(tmp_path, pairs, used):
    plan, _ = _export(tmp_path, _categories(*pairs), used)
    assert [c.name for c in plan.classes] == [name for name, _ in pairs] and not any(
        "category" in reason for reason in plan.problems.counts
    )
