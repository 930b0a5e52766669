"""mqformer prepare public: the real data, put into official layouts, equal what other decoders read from the same
files.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from official import STREET, arrange, decoded, panoptic_ids
from PIL import Image

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli
from mqformer_jax.prepare.datasets.catalog import SETS

REPOSITORY = Path(__file__).parents[2]

FED = [name for name in SETS if not name.startswith("seginw_")] + ["seginw_Puppies"]


@pytest.fixture(scope="module")
def public(real_data, tmp_path_factory):
    """(root of the official layouts, root of the records) of all sets that the real data can feed, prepared by one
    command.
    """
    root, out = tmp_path_factory.mktemp("datasets"), tmp_path_factory.mktemp("records")
    arrange(real_data, root)
    assert cli.main(["public", *FED, "--root", str(root), "--output", str(out), "--workers", "1"]) == 0
    return root, out


def _records(out, name, split):
    source = ShardSource(str(out), name, split)
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


def _load(*parts):
    return json.loads(Path(*parts).read_text())


def _spaced(name):
    return name.replace("_", " ")


def _pixels(path):
    return np.array(Image.open(path))


def test_every_set_has_its_splits_and_every_image_decodes(public):
    for name in FED:
        info, _ = _records(public[1], name, "train" if "train" in SETS[name].splits else "test")
        assert set(info.splits) == set(SETS[name].splits), name
        for split in info.splits:
            for record in _records(public[1], name, split)[1].values():
                assert record.decode_image().shape == (record.height, record.width, 3) and record.segments, (
                    name,
                    record.key,
                )


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_panoptic_masks_match_the_source_pngs(public, split):
    root, out = public
    data = _load(root, f"coco/annotations/panoptic_{split}2017.json")
    info, records = _records(out, "coco_2017_panoptic", split)
    name_of = {
        c["id"]: re.sub("(-merged|-other|-stuff)+$", "", c["name"]).replace("-", " ") for c in data["categories"]
    }
    assert [c.is_region for c in info.classes] == [
        not c["isthing"] for c in sorted(data["categories"], key=lambda c: c["id"])
    ]
    files = {a["image_id"]: a for a in data["annotations"]}
    assert {i["file_name"] for i in data["images"]} == records.keys()
    for entry in data["images"]:
        record, annotation = records[entry["file_name"]], files[entry["id"]]
        ids = panoptic_ids(root / f"coco/panoptic_{split}2017" / annotation["file_name"])
        truth = {(name_of[s["category_id"]], (ids == s["id"]).tobytes()) for s in annotation["segments_info"]}
        assert {(info.classes[s.class_id].name, record.decode_mask(s.mask).tobytes()) for s in record.segments} == truth
        assert record.origin == f"coco/{entry['id']}"


@pytest.mark.parametrize(
    ("name", "split", "file"),
    [
        ("coco_2017", "train", "coco/annotations/instances_train2017.json"),
        ("coco_2017", "val", "coco/annotations/instances_val2017.json"),
        ("lvis_v1", "train", "lvis/lvis_v1_train.json"),
        ("lvis_v1", "val", "lvis/lvis_v1_val.json"),
        ("seginw_Puppies", "train", "seginw/Puppies/train/_annotations_min1cat.coco.json"),
        ("seginw_Puppies", "val", "seginw/Puppies/valid/_annotations_min1cat.coco.json"),
    ],
)
def test_instance_masks_match_pycocotools(public, name, split, file):
    root, out = public
    data = _load(root, file)
    info, records = _records(out, name, split)
    category = {c["id"]: _spaced(c["name"]) for c in data["categories"]}
    assert info.exhaustive == (name != "lvis_v1") and len(records) == len(data["images"])
    for entry in data["images"]:
        record = records[entry.get("file_name") or "/".join(entry["coco_url"].split("/")[-2:])]
        truth = [a for a in data["annotations"] if a["image_id"] == entry["id"]]
        assert [(info.classes[s.class_id].name, s.crowd) for s in record.segments] == [
            (category[a["category_id"]], bool(a.get("iscrowd", 0))) for a in truth
        ]
        for segment, annotation in zip(record.segments, truth, strict=True):
            mask = decoded(annotation["segmentation"], record.height, record.width)
            np.testing.assert_array_equal(record.decode_mask(segment.mask), mask)
        absent = {info.classes[i].name for i in record.absent_classes}
        assert absent == {category[i] for i in entry.get("neg_category_ids", ()) if i in category}


@pytest.mark.parametrize(
    ("name", "folder", "partition"),
    [
        ("refcoco", "refcoco", "unc"),
        ("refcoco_google", "refcoco", "google"),
        ("refcocoplus", "refcoco+", "unc"),
        ("refcocog", "refcocog", "umd"),
        ("refcocog_google", "refcocog", "google"),
    ],
)
def test_expressions_match_the_pickled_refs(public, name, folder, partition):
    root, out = public
    refs = pickle.loads((root / folder / f"refs({partition}).p").read_bytes())
    shapes = {a["id"]: a for a in _load(root, folder, "instances.json")["annotations"]}
    for split in SETS[name].splits:
        info, records = _records(out, name, split)
        found = {
            (r.origin, t, r.decode_mask(s.mask).tobytes())
            for r in records.values()
            for s in r.segments
            for t in s.texts
        }
        truth = set()
        for ref in (ref for ref in refs if ref["split"] == split):
            record = records[f"COCO_train2014_{ref['image_id']:012d}.jpg"]
            mask = decoded(shapes[ref["ann_id"]]["segmentation"], record.height, record.width).tobytes()
            truth |= {(f"coco/{ref['image_id']}", " ".join(s["sent"].split()), mask) for s in ref["sentences"]}
        assert found == truth and truth and not info.exhaustive


def test_ade20k_matches_the_source_pngs_and_class_table(public):
    root, out = public
    lines = (root / "ADEChallengeData2016/objectInfo150.txt").read_text().splitlines()[1:]
    for split, folder in (("train", "training"), ("val", "validation")):
        info, records = _records(out, "ade20k_sem_seg", split)
        assert [c.name for c in info.classes] == [line.split("\t")[-1].split(",")[0].strip() for line in lines]
        assert len(records) == len(os.listdir(root / "ADEChallengeData2016/images" / folder))
        for key, record in records.items():
            _assert_regions(
                record,
                _pixels(root / "ADEChallengeData2016/annotations" / folder / f"{key}.png"),
                first=1,
                unlabeled=0,
            )


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_camvid_masks_match_the_source_pngs(public, split):
    root, out = public
    info, records = _records(out, "camvid", split)
    assert [c.name for c in info.classes][:4] == ["sky", "building", "pole", "road"] and len(info.classes) == 11
    for key, record in records.items():
        _assert_regions(record, _pixels(root / f"CamVid/{split}annot" / f"{key}.png"), first=0, unlabeled=11)


def test_ade20k_panoptic_matches_semantic_and_instance_maps(public):
    root, out = public
    for split, folder in (("train", "training"), ("val", "validation")):
        for key, record in _records(out, "ade20k_panoptic", split)[1].items():
            _assert_regions(
                record,
                _pixels(root / "ADEChallengeData2016/annotations" / folder / f"{key}.png"),
                first=1,
                unlabeled=0,
            )
            instances = _pixels(root / "ADEChallengeData2016/annotations_instance" / folder / f"{key}.png")[..., 1]
            assert {s.class_id + 1 for s in record.segments} >= set(np.unique(instances).tolist()) - {0}


@pytest.mark.parametrize(("name", "count"), [("pascal_context_459", 150), ("pascal_context_59", 59)])
def test_pascal_context_matches_the_mat_label_maps(public, name, count):
    root, out = public
    for split in ("train", "val"):
        info, records = _records(out, name, split)
        assert (
            sorted(records) == (root / f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt").read_text().split()
            and len(info.classes) == count
        )
        for key, record in records.items():
            index = scipy.io.loadmat(root / f"VOCdevkit/VOC2010/trainval/{key}.mat")["LabelMap"]
            _assert_regions(record, np.where(index > count, 0, index), first=1, unlabeled=0)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("name", "tail"), [("cityscapes_fine_panoptic", "_000019"), ("bdd100k_panoptic", "")])
def test_cityscapes_and_bdd100k_match_their_source_panoptic_pngs(public, real_data, name, tail, split):
    info, records = _records(public[1], name, split)
    data = _load(real_data, f"coco/panoptic/{split}.json")
    coco_name = {c["id"]: c["name"] for c in data["categories"]}
    ours = {"sky-other-merged": "sky", "tree-merged": "vegetation"}
    for key, record in records.items():
        number = int(re.search(rf"(\d+){tail}$", key)[1])
        annotation = next(a for a in data["annotations"] if a["image_id"] == number)
        ids = panoptic_ids(real_data / f"coco/panoptic/{split}" / annotation["file_name"])
        known = [
            (coco_name[s["category_id"]], s)
            for s in annotation["segments_info"]
            if coco_name[s["category_id"]] in STREET
        ]
        truth = {(ours.get(n, n), bool(s["iscrowd"]), (ids == s["id"]).tobytes()) for n, s in known}
        assert {
            (info.classes[s.class_id].name, s.crowd, record.decode_mask(s.mask).tobytes()) for s in record.segments
        } == truth


def _assert_regions(record, index, first, unlabeled):
    assert {s.class_id + first for s in record.segments} == set(np.unique(index).tolist()) - {unlabeled}
    for segment in record.segments:
        np.testing.assert_array_equal(record.decode_mask(segment.mask), index == segment.class_id + first)


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("hrsod", {"train": "HRSOD_release/HRSOD_train_mask", "test": "HRSOD_release/HRSOD_test_mask"}),
        ("msra10k", {"train": "MSRA10K_Imgs_GT/Imgs"}),
        ("thinobject5k", dict.fromkeys(("train", "val", "test"), "ThinObject5K/masks")),
        ("coift", {"train": "COIFT/masks"}),
        (
            "dis5k",
            {
                "train": "DIS5K/DIS-TR/gt",
                "val": "DIS5K/DIS-VD/gt",
                **{f"test{i}": f"DIS5K/DIS-TE{i}/gt" for i in (1, 2, 3, 4)},
            },
        ),
        ("duts", {"train": "DUTS-TR/DUTS-TR-Mask", "test": "DUTS-TE/DUTS-TE-Mask"}),
        ("uhrsd", {"train": "UHRSD_TR_2K/mask", "test": "UHRSD_TE_2K/mask"}),
    ],
)
def test_foregrounds_match_the_source_masks(public, name, masks):
    root, out = public
    for split, folder in masks.items():
        info, records = _records(out, name, split)
        lists = root / "ThinObject5K/list" / f"{split}.txt"
        wanted = (
            lists.read_text().split() if name == "thinobject5k" else [p.name for p in (root / folder).glob("*.png")]
        )
        assert {f"{key}.png" for key in records} == set(wanted) and not info.exhaustive
        for key, record in records.items():
            (segment,) = record.segments
            np.testing.assert_array_equal(record.decode_mask(segment.mask), _pixels(root / folder / f"{key}.png") > 0)
            assert segment.foreground and segment.class_id is None


@pytest.mark.parametrize(
    ("name", "split", "alphas", "trimaps"),
    [
        ("alphamatting", "train", "alphamatting/gt_training_lowres", "alphamatting/trimap_training_lowres/Trimap1"),
        ("aim500", "test", "AIM-500/mask", "AIM-500/trimap"),
        ("am2k", "train", "AM-2k/train/mask", None),
        ("am2k", "val", "AM-2k/validation/mask", "AM-2k/validation/trimap"),
        ("p3m10k", "train", "P3M-10k/train/mask", None),
        ("p3m10k", "val", "P3M-10k/validation/P3M-500-P/mask", "P3M-10k/validation/P3M-500-P/trimap"),
        ("p3m10k", "val_np", "P3M-10k/validation/P3M-500-NP/mask", "P3M-10k/validation/P3M-500-NP/trimap"),
    ],
)
def test_mattes_and_trimaps_match_the_source_files(public, name, split, alphas, trimaps):
    root, out = public
    _, records = _records(out, name, split)
    assert len(records) == 2 and {f"{key}.png" for key in records} == set(os.listdir(root / alphas))
    for key, record in records.items():
        (segment,) = record.segments
        np.testing.assert_array_equal(
            _png(segment.alpha), np.array(Image.open(root / alphas / f"{key}.png").convert("L"))
        )
        assert (segment.trimap is None) == (trimaps is None)
        if trimaps:
            trimap = np.array(Image.open(root / trimaps / f"{key}.png").convert("L"))
            np.testing.assert_array_equal(_png(segment.trimap) == 0, trimap == 0)
            np.testing.assert_array_equal(_png(segment.trimap) == 255, trimap == 255)


def _png(data):
    return np.array(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("split", ["train", "val"])
def test_objects365_boxes_match_the_json(public, split):
    root, out = public
    data = _load(root, f"objects365v2/annotations/zhiyuan_objv2_{split}.json")
    info, records = _records(out, "objects365_v2", split)
    file_of = {e["id"]: os.path.basename(e["file_name"]) for e in data["images"]}
    truth = {(file_of[a["image_id"]], a["category_id"] - 1, tuple(a["bbox"][:2])) for a in data["annotations"]}
    found = {(os.path.basename(k), s.class_id, s.box[:2]) for k, r in records.items() for s in r.segments}
    assert found == truth and all(s.mask is None for r in records.values() for s in r.segments)


def test_visual_genome_boxes_and_phrases_match_the_json(public):
    root, out = public
    info, records = _records(out, "visual_genome", "train")
    assert [c.texts for c in info.classes] == [("person",)] and not info.exhaustive and not info.unique_texts
    entries = {e["image_id"]: e for e in _load(root, "visual_genome/image_data.json")}
    for entry in _load(root, "visual_genome/region_descriptions.json"):
        record = records[f"{entry['id']}.jpg"]
        assert record.origin == f"coco/{entries[entry['id']]['coco_id']}"
        truth = {(_spaced(r["phrase"]).lower().rstrip("."), (r["x"], r["y"])) for r in entry["regions"]}
        assert {(t, s.box[:2]) for s in record.segments for t in s.texts} == truth
        people = [s.box[:2] for s in record.segments if s.class_id == 0]
        assert people and {*people} <= {corner for _, corner in truth}


# ---- The table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_catalog_entries_match_the_parameters_of_their_functions(name):
    for split, source in SETS[name].splits.items():
        inspect.signature(source.family).bind(**source.paths, **source.options)
        assert re.fullmatch("[a-zA-Z0-9_]+", split) and not any("{" in path for path in source.files())


@pytest.mark.parametrize(
    ("name", "split", "path"),
    [
        ("dis5k", "test1", "DIS5K/DIS-TE1/im"),
        ("dis5k", "test2", "DIS5K/DIS-TE2/im"),
        ("refcoco_google", "train", "refcoco/refs(google).p"),
        ("lvis_v1", "train", "lvis/lvis_v1_train.json"),
        ("lvis_v1", "val", "lvis/lvis_v1_val.json"),
        ("p3m10k", "val", "P3M-10k/validation/P3M-500-P/blurred_image"),
        ("p3m10k", "val_np", "P3M-10k/validation/P3M-500-NP/original_image"),
    ],
)
def test_each_split_lists_its_own_source_files(name, split, path):
    assert path in SETS[name].splits[split].files()


def test_camvid_classes_follow_the_segnet_order():
    order = "sky building pole road pavement tree sign_symbol fence car pedestrian bicyclist unlabelled"
    assert _load(REPOSITORY, "mqformer_jax", "prepare", "classes", "camvid.json") == {
        "classes": [_spaced(name) for name in order.split()],
        "ignore_index": 11,
    }


@pytest.mark.parametrize("name", SETS)
def test_missing_file_error_names_its_path_website_and_remedy(name, tmp_path, capsys):
    assert cli.main(["public", name, "--root", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    first = next(iter(SETS[name].splits.values())).files()[0]
    assert str(tmp_path / first) in line and SETS[name].url in line and SETS[name].get in line
    assert not (tmp_path / "out").exists()


def test_file_missing_for_one_split_is_reported_before_preparing_any(tmp_path, capsys):
    for folder in ("DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask", "DUTS-TE/DUTS-TE-Image"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / folder / "a.png")
    command = ["public", "duts", "--root", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert cli.main(command) == 1
    assert "DUTS-TE-Mask: no such file or folder" in (error := capsys.readouterr().err) and "--split train" in error
    assert cli.main([*command, "--split", "train"]) == 0
    assert _records(tmp_path / "out", "duts", "train")[0].splits == {"train": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coco_2017_panoptik"], "no data set 'coco_2017_panoptik'; did you mean coco_2017_panoptic?"),
        (["imagenet"], "no data set 'imagenet'; --list shows all names"),
        ([], "give the name of a data set"),
        (["duts", "--split", "val"], "duts has no split 'val'; give --split with one of train, test"),
    ],
)
def test_unknown_data_set_or_split_is_a_one_line_error(words, message, tmp_path, capsys):
    assert (
        cli.main(["public", *words, "--root", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "1"]) == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_list_shows_every_source_path_and_marks_available_splits(tmp_path, monkeypatch, capsys):
    for path in ("CamVid/train", "CamVid/trainannot"):
        (tmp_path / path).mkdir(parents=True)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert cli.main(["public", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, entry in SETS.items():
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
        for line, (split, source) in zip(lines[start + 2 :], entry.splits.items()):
            assert split in line and all(path in line for path in source.files())
            assert line.startswith("  +") == ((name, split) == ("camvid", "train"))


def test_every_set_is_listed_in_the_data_readme_with_its_website():
    lines = (REPOSITORY / "data" / "README.md").read_text().splitlines()
    for name, entry in SETS.items():
        card = "seginw_*" if name.startswith("seginw_") else name
        assert any(line.startswith(f"| [`{card}`]({entry.url})") for line in lines), name
        assert name == card or any(
            re.search(rf"(?<![\w-]){name.removeprefix('seginw_')}(?![\w-])", line) for line in lines
        ), name
