"""`mqformer prepare`: every kind of annotation file, compared with masks made another way."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from preparation import CATEGORIES, SQUARE, H, W, image_entries, prepare, prepare_instances, read, write_json, write_png
from pycocotools import mask as coco_mask

from mqformer_jax.prepare import cli


def test_val_fraction_holds_out_images_by_name(folder, capsys):
    names = ["a.jpg", "b.png", "c.webp", "d.jpg"]
    annotations = [{"id": i, "image_id": i, "category_id": 7, "segmentation": SQUARE} for i in range(4)]
    assert prepare_instances(folder, annotations, image_entries(*names), val_fraction=0.25) == 0
    (info, train), (_, val) = read(folder), read(folder, "val")
    assert len(train) == 3 and len(val) == 1 and sorted([*train, *val]) == names
    assert info.splits == {"train": 3, "val": 1}
    # the order of the file does not matter
    shuffled = [{**annotation, "image_id": 3 - annotation["image_id"]} for annotation in annotations]
    assert prepare_instances(folder, shuffled, image_entries(*names[::-1]), val_fraction=0.25, name="again") == 0
    assert read(folder, "val", "again")[1].keys() == val.keys()
    for split, fraction, words in (("val", 0.5, "another --split, e.g. train"), ("train", 0.1, "at least two images")):
        images = image_entries(*(names if split == "val" else names[:1]))
        assert prepare_instances(folder, annotations, images, split=split, val_fraction=fraction, name="other") == 1
        assert words in capsys.readouterr().err


def _oracle(polygons, height=H, width=W):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


# ---- Every kind ---------------------------------------------------------------------------------------------------


def test_panoptic_things_stuff_crowd_and_unlabeled_pixels(folder):
    ids = np.zeros((H, W), np.int32)
    ids[:10], ids[10:20], ids[20:30, :30], ids[20:30, 30:] = 70_000, 300, 5, 6
    write_png(folder / "masks" / "a.png", np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8))
    infos = [
        {"id": i, "category_id": c, "iscrowd": k} for i, c, k in ((70_000, 9, 0), (300, 9, 0), (5, 7, 0), (6, 7, 1))
    ]
    data = {
        "images": image_entries("a.jpg"),
        "annotations": [{"image_id": 0, "file_name": "a.png", "segments_info": infos}],
    }
    path = write_json(folder / "pan.json", {**data, "categories": CATEGORIES})
    assert prepare(folder, "panoptic", json=path, masks=folder / "masks") == 0
    info, records = read(folder)
    assert [(c.texts, c.is_region) for c in info.classes] == [(("cat",), False), (("sky",), True)]
    record = records["a.jpg"]
    sky, cat, crowd = record.segments
    assert (sky.class_id, cat.class_id, cat.crowd, crowd.crowd) == (1, 0, False, True)
    # one region for a stuff class
    np.testing.assert_array_equal(record.decode_mask(sky.mask), np.isin(ids, (70_000, 300)))
    np.testing.assert_array_equal(record.decode_mask(cat.mask), ids == 5)
    np.testing.assert_array_equal(record.decode_mask(record.ignore), ids == 0)
    assert cat.box == (0, 20, 30, 30)


def test_instances_from_polygons_both_rle_forms_and_boxes(folder):
    solid = _oracle(SQUARE)
    flat = solid.ravel(order="F")
    runs = np.diff(np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1], [True]]))).tolist()
    counts = coco_mask.encode(np.asfortranarray(solid, np.uint8))["counts"].decode()
    shape = {"image_id": 0, "category_id": 7}
    annotations = [
        {**shape, "id": 1, "segmentation": SQUARE + [[40, 30, 50, 30, 50, 38]], "bbox": [10, 5, 40, 33]},
        {**shape, "id": 2, "segmentation": {"size": [H, W], "counts": runs}, "iscrowd": 1},
        {**shape, "id": 3, "segmentation": {"size": [H, W], "counts": counts}},
        {**shape, "id": 4, "bbox": [-5, 10, 20, 10.5]},
    ]
    assert prepare_instances(folder, annotations) == 0
    record = read(folder)[1]["a.jpg"]
    polygons, crowd, compressed, box = record.segments
    np.testing.assert_array_equal(record.decode_mask(polygons.mask), _oracle(SQUARE + [[40, 30, 50, 30, 50, 38]]))
    np.testing.assert_array_equal(record.decode_mask(crowd.mask), solid)
    np.testing.assert_array_equal(record.decode_mask(compressed.mask), solid)
    assert [s.crowd for s in record.segments] == [False, True, False, False]
    assert box.mask is None and box.box == (0, 10, 15, 20.5) and polygons.box == (10, 5, 50, 38)


def test_lvis_federated_labels(folder):
    images = image_entries("a.jpg", "b.png", neg_category_ids=[2], not_exhaustive_category_ids=[1])
    images[1] = {
        **images[1],
        "file_name": None,
        "coco_url": "http://images.cocodataset.org/val2017/b.png",
        "neg_category_ids": [],
    }
    categories = [{"id": 1, "name": "bow_tie", "synonyms": ["bow_tie", "bowtie"]}, {"id": 2, "name": "bowtie"}]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "segmentation": SQUARE} for i in range(2)]
    path = write_json(folder / "lvis.json", {"images": images, "annotations": annotations, "categories": categories})
    assert prepare(folder, "instances", json=path) == 0
    info, records = read(folder)
    # a synonym that is another class
    assert not info.exhaustive and [c.texts for c in info.classes] == [
        ("bow tie",),
        ("bowtie",),
    ]
    assert records["a.jpg"].absent_classes == (1,) and records["a.jpg"].partial_classes == (0,)
    assert len(records["val2017/b.png"].segments) == 1


def test_referring_groups_expressions_by_object(folder, capsys):
    square = {"image_id": 0, "bbox": [10, 5, 20, 20], "category_id": 7}
    refs = [
        {**square, "sentences": ["left cat", "both"]},
        {**square, "sentences": [{"sent": "the  cat"}], "segmentation": SQUARE, "ann_id": 3},
        {"image_id": 0, "bbox": [40, 5, 10, 10], "sentences": ["right cat", "both"]},
        {"image_id": 0, "bbox": None, "sentences": ["a dog"], "no_target": True},
        {"image_id": 1, "ann_id": 77, "sentences": ["from the instances"], "split": "testA"},
    ]
    path = write_json(folder / "refs.json", {"refs": refs})
    shape = {"id": 77, "image_id": 1, "category_id": 7, "segmentation": SQUARE}
    instances = write_json(
        folder / "inst.json",
        {"images": image_entries("a.jpg", "b.png"), "annotations": [shape], "categories": CATEGORIES[:1]},
    )
    assert prepare(folder, "referring", json=path, instances=instances) == 0
    info, records = read(folder)
    one, other = records["a.jpg"].segments
    assert (
        one.texts == ("left cat", "the cat")
        and one.class_id == 0
        and other.texts == ("right cat",)
        and other.class_id is None
    )
    np.testing.assert_array_equal(records["a.jpg"].decode_mask(one.mask), _oracle(SQUARE))
    assert records["a.jpg"].absent_texts == ("a dog",) and records["b.png"].segments[0].mask and not info.exhaustive
    assert "names two objects (a.jpg 'both')" in capsys.readouterr().out
    assert prepare(folder, "referring", json=path, instances=instances, split="testA", refs_split="testA") == 0
    assert list(read(folder, "testA")[1]) == ["b.png"]


def test_refs_pickle_is_read_without_running_its_code(folder, capsys):
    refs = [{"image_id": 0, "ann_id": 77, "sentences": [{"sent": "the cat"}], "split": "train"}]
    shape = {"id": 77, "image_id": 0, "category_id": 7, "segmentation": SQUARE}
    instances = write_json(
        folder / "inst.json",
        {"images": image_entries("a.jpg", "b.png"), "annotations": [shape], "categories": CATEGORIES[:1]},
    )
    path = folder / "refs(unc).p"
    path.write_bytes(pickle.dumps(refs, protocol=2))
    assert prepare(folder, "referring", json=path, instances=instances) == 0
    assert read(folder)[1]["a.jpg"].segments[0].texts == ("the cat",)
    trace = folder / "it_ran"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    capsys.readouterr()
    assert prepare(folder, "referring", json=path, instances=instances) == 1
    assert not trace.exists() and "not a pickle of plain values" in "".join(capsys.readouterr())


@pytest.mark.parametrize("palette", [False, True])
def test_semantic_index_png_with_ignored_class(folder, palette):
    index = np.repeat(np.arange(4, dtype=np.uint8), 10)[:, None].repeat(W, 1)
    write_png(folder / "masks" / "a.png", index, palette)
    classes = write_json(folder / "classes.json", {"classes": ["sky, heaven", "void", "side_walk"], "ignore_index": 1})
    assert prepare(folder, "semantic", masks=folder / "masks", classes=classes) == 0
    info, records = read(folder)
    assert [(c.texts, c.is_region) for c in info.classes] == [(("sky", "heaven"), True), (("side walk",), True)]
    record = records["a"]
    for segment, value in zip(record.segments, (0, 2), strict=True):
        np.testing.assert_array_equal(record.decode_mask(segment.mask), index == value)
    np.testing.assert_array_equal(record.decode_mask(record.ignore), np.isin(index, (1, 3)))


def test_ade20k_class_table_starts_at_index_one(folder):
    write_png(folder / "masks" / "a.png", np.repeat(np.uint8([0, 1, 2, 2]), 10)[:, None].repeat(W, 1))
    (folder / "objects.txt").write_text("Idx\tRatio\tName\n1\t0.2\twall\n2\t0.1\tbuilding, edifice\n")
    assert prepare(folder, "semantic", masks=folder / "masks", classes=folder / "objects.txt") == 0
    info, records = read(folder)
    assert info.classes[1].texts == ("building", "edifice")
    assert records["a"].segments[1].class_id == 1 and records["a"].segments[1].box == (0, 20, W, H)
    assert records["a"].decode_mask(records["a"].ignore).sum() == 10 * W


def test_foreground_is_the_union_of_its_annotations(folder):
    other = [[40, 20, 55, 20, 55, 35]]
    annotations = [{"id": i, "image_id": 0, "category_id": 7, "segmentation": s} for i, s in enumerate((SQUARE, other))]
    instances = write_json(
        folder / "inst.json",
        {"images": image_entries("a.jpg"), "annotations": annotations, "categories": CATEGORIES[:1]},
    )
    path = write_json(
        folder / "fg.json", {"items": [{"image_id": 0, "ann_ids": [0, 1]}, {"image_id": 5, "ann_ids": [9]}]}
    )
    assert prepare(folder, "foreground", json=path, instances=instances) == 0
    record = read(folder)[1]["a.jpg"]
    np.testing.assert_array_equal(record.decode_mask(record.segments[0].mask), _oracle(SQUARE) | _oracle(other))
    assert record.segments[0].foreground and record.segments[0].class_id is None


@pytest.mark.parametrize("white", [1, 255])
def test_foreground_mask_folder(folder, white):
    solid = _oracle(SQUARE)
    write_png(folder / "masks" / "c.png", (solid * white).astype(np.uint8))
    assert prepare(folder, "foreground", masks=folder / "masks") == 0
    record = read(folder)[1]["c"]
    np.testing.assert_array_equal(record.decode_mask(record.segments[0].mask), solid)


def test_mattes_keep_every_gray_level(folder):
    alpha = np.linspace(0, 255, H * W).astype(np.uint8).reshape(H, W)
    write_png(folder / "alphas" / "a.png", alpha[..., None].repeat(3, -1))
    assert prepare(folder, "mattes", alphas=folder / "alphas") == 0
    record = read(folder)[1]["a"]
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(record.segments[0].alpha))), alpha)
    np.testing.assert_array_equal(record.decode_mask(record.segments[0].mask), alpha > 127)


def test_sample_command_writes_all_its_sets(folder):
    assert cli.main(["sample", "--train=8", "--val=4", "--size=48", f"--output={folder / 'out'}", "--workers=1"]) == 0
    info, records = read(folder, name="sample_scenes")
    assert info.splits == {"train": 8, "val": 4} and all(
        r.decode_image().shape == (48, 48, 3) for r in records.values()
    )
    assert {"sample_scenes", "sample_boxes", "sample_mattes"} <= set(os.listdir(folder / "out"))
    _, held_out = read(folder, name="sample_scenes", split="val")
    images = [path.read_bytes() for path in sorted((folder / "out" / "sample_images").glob("*.png"))]
    assert images == [held_out[key].image for key in sorted(held_out)]


# ---- Images -------------------------------------------------------------------------------------------------------


def test_jpeg_and_png_bytes_are_kept_and_other_formats_become_png(folder):
    assert prepare_instances(folder, [], image_entries("a.jpg", "b.png", "c.webp")) == 0
    records = read(folder)[1]
    for name in ("a.jpg", "b.png"):
        assert records[name].image == (folder / "images" / name).read_bytes()
    assert records["c.webp"].image.startswith(b"\x89PNG")
    np.testing.assert_array_equal(
        records["c.webp"].decode_image(), np.array(Image.open(folder / "images" / "c.webp").convert("RGB"))
    )


def test_exif_rotated_image_needs_annotations_of_the_rotated_size(folder, capsys):
    turned = Image.open(folder / "images" / "a.jpg")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "images" / "turned.jpg", exif=exif)
    images = image_entries("turned.jpg", "turned.jpg", "a.jpg")
    images[1] |= {"height": W, "width": H}
    assert prepare_instances(folder, [], images) == 0
    records = read(folder)[1]
    assert (records["turned.jpg"].height, records["turned.jpg"].width) == (W, H)
    assert "1 x image: size differs from the JSON (rotated by EXIF)" in capsys.readouterr().out
