"""mqformer prepare small on real images: the records equal what other decoders read from the same files."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli


@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory):
    """The real folder with its sets prepared: (folder, records root)."""
    source = str(real_data)
    out = str(tmp_path_factory.mktemp("records"))
    assert cli.main(["small", "--source", source, "--output", out, "--workers", "1"]) == 0
    return source, out


def _records(root, name, split):
    source = ShardSource(root, name, split)
    return source.info, [Record.from_bytes(source[i]) for i in range(len(source))]


def _load(*parts):
    with open(os.path.join(*parts)) as f:
        return json.load(f)


def test_real_panoptic_masks_match_the_source_pngs(real):
    source, root = real
    data = _load(source, "coco", "panoptic", "val.json")
    file_of = {i["id"]: i["file_name"] for i in data["images"]}
    annotations = {file_of[a["image_id"]]: a for a in data["annotations"]}
    _, records = _records(root, "coco_2017_panoptic", "val")
    assert len(records) == len(annotations)
    for record in records[:10]:
        annotation = annotations[record.key]
        rgb = np.array(
            Image.open(os.path.join(source, "coco", "panoptic", "val", annotation["file_name"])).convert("RGB")
        ).astype(int)
        ids = rgb @ [1, 256, 65536]
        areas = sorted(s["area"] for s in annotation["segments_info"])
        assert sorted(int(record.decode_mask(s.mask).sum()) for s in record.segments) == areas
        ignore = record.decode_mask(record.ignore) if record.ignore else np.zeros(ids.shape, bool)
        np.testing.assert_array_equal(ignore, ids == 0)


@pytest.mark.parametrize(
    ("name", "split", "file"), [("coco_2017", "val", "instances_val.json"), ("lvis_v0.5", "train", "lvis.json")]
)
def test_real_instance_masks_match_pycocotools(real, name, split, file):
    source, root = real
    data = _load(source, "coco", file)
    file_of = {i["id"]: i["file_name"] for i in data["images"]}
    info, records = _records(root, name, split)
    category = {c["id"]: c["name"].replace("_", " ") for c in data["categories"]}
    for record in records[:12]:
        truth = [a for a in data["annotations"] if file_of[a["image_id"]] == record.key]
        assert [info.classes[s.class_id].name for s in record.segments] == [category[a["category_id"]] for a in truth]
        for segment, annotation in zip(record.segments, truth, strict=True):
            rle = coco_mask.frPyObjects(annotation["segmentation"], record.height, record.width)
            mask = coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle).astype(bool)
            np.testing.assert_array_equal(record.decode_mask(segment.mask), mask)
            assert segment.crowd == bool(annotation.get("iscrowd", 0))


def test_real_semantic_masks_match_the_source_pngs(real):
    source, root = real
    info, records = _records(root, "camvid", "val")
    assert len(info.classes) == 11
    for record in records[:5]:
        index = np.array(Image.open(os.path.join(source, "camvid", "valannot", record.key + ".png")))
        for segment in record.segments:
            np.testing.assert_array_equal(record.decode_mask(segment.mask), index == segment.class_id)
        assert {s.class_id for s in record.segments} == set(np.unique(index).tolist()) - {11}


def test_real_mattes_and_trimaps_match_the_source_files(real):
    source, root = real
    for record in _records(root, "mattes", "val")[1]:
        alpha = np.array(Image.open(os.path.join(source, "matting", "alpha", record.key + ".png")).convert("L"))
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(record.segments[0].alpha))), alpha)
        trimap = np.array(Image.open(os.path.join(source, "matting", "trimap", record.key + ".png")).convert("L"))
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(record.segments[0].trimap))), trimap)


def test_nearly_all_real_expressions_are_kept(real):
    source, root = real
    said = sum(len(r["sentences"]) for r in _load(source, "coco", "referring.json")["refs"] if not r.get("uncertain"))
    records = [r for split in ("train", "val") for r in _records(root, "refcoco", split)[1]]
    kept = sum(len(s.texts) for r in records for s in r.segments) + sum(len(r.absent_texts) for r in records)
    assert 0.95 * said <= kept <= said


def test_coco_train_and_val_images_are_disjoint_across_sets(real):
    _, root = real
    sets = ("coco_2017_panoptic", "coco_2017", "lvis_v0.5", "refcoco", "foreground")
    keys = {"train": set(), "val": set()}
    for name in sets:
        for split in _records(root, name, "train")[0].splits:
            keys[split] |= {r.key for r in _records(root, name, split)[1]}
    assert keys["val"] and not keys["train"] & keys["val"]


def test_first_image_of_every_real_set_decodes(real):
    _, root = real
    for name in sorted(os.listdir(root)):
        record = _records(root, name, "train")[1][0]
        assert record.decode_image().shape == (record.height, record.width, 3)
