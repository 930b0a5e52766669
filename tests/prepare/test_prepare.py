"""data/prepare.py: every kind of annotation file to records, against masks made another way, and everything bad
counted.
"""

from __future__ import annotations

import collections
import functools
import io
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli, shards
from mqformer_jax.prepare.plan import Plan
from mqformer_jax.prepare.shard_writer import Built, Problems

H, W = 40, 60
CATEGORIES = [{"id": 7, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky-other-merged", "isthing": 0}]
SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]


@pytest.fixture
def folder(tmp_path):
    """Images a.jpg, b.png, c.webp and d.jpg, each 60 x 40, in `images`."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png", "c.webp", "d.jpg"):
        Image.fromarray(rng.integers(0, 255, (H, W, 3), np.uint8)).save(tmp_path / "images" / name)
    return tmp_path


def _png(path, array, palette=False):
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image = image.convert("P") if image.mode != "L" else image
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.save(path)


def _json(path, data):
    path.write_text(json.dumps(data))
    return str(path)


def _images(*names, **fields):
    return [{"id": i, "file_name": name, "height": H, "width": W, **fields} for i, name in enumerate(names)]


def _prepare(folder, kind, **options):
    """Runs the command line; its exit status."""
    options = {
        "name": "toy",
        "split": "train",
        "images": folder / "images",
        "output": folder / "out",
        "workers": 1,
        **options,
    }
    words = [w for k, v in options.items() for w in (f"--{k}", *map(str, v if isinstance(v, list) else [v]))]
    return cli.main([kind, *words])


def _read(folder, split="train", name="toy"):
    source = ShardSource(str(folder / "out"), name, split)
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


def _instances(folder, annotations, images=None, **options):
    data = {"images": images or _images("a.jpg"), "annotations": annotations, "categories": CATEGORIES[:1]}
    return _prepare(folder, "instances", json=_json(folder / "ann.json", data), **options)


def test_a_share_of_the_images_is_held_out_by_name(folder, capsys):
    names = ["a.jpg", "b.png", "c.webp", "d.jpg"]
    annotations = [{"id": i, "image_id": i, "category_id": 7, "segmentation": SQUARE} for i in range(4)]
    assert _instances(folder, annotations, _images(*names), val_fraction=0.25) == 0
    (info, train), (_, val) = _read(folder), _read(folder, "val")
    assert len(train) == 3 and len(val) == 1 and sorted([*train, *val]) == names
    assert info.splits == {"train": 3, "val": 1}
    # the order of the file does not matter
    shuffled = [{**annotation, "image_id": 3 - annotation["image_id"]} for annotation in annotations]
    assert _instances(folder, shuffled, _images(*names[::-1]), val_fraction=0.25, name="again") == 0
    assert _read(folder, "val", "again")[1].keys() == val.keys()
    for split, fraction, words in (("val", 0.5, "--split=train"), ("train", 0.1, "at least two images")):
        images = _images(*(names if split == "val" else names[:1]))
        assert _instances(folder, annotations, images, split=split, val_fraction=fraction, name="other") == 1
        assert words in capsys.readouterr().err


def _oracle(polygons, height=H, width=W):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


# ---- Every kind ---------------------------------------------------------------------------------------------------


def test_panoptic_things_stuff_crowd_and_unlabeled_pixels(folder):
    ids = np.zeros((H, W), np.int32)
    ids[:10], ids[10:20], ids[20:30, :30], ids[20:30, 30:] = 70_000, 300, 5, 6
    _png(folder / "masks" / "a.png", np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8))
    infos = [
        {"id": i, "category_id": c, "iscrowd": k} for i, c, k in ((70_000, 9, 0), (300, 9, 0), (5, 7, 0), (6, 7, 1))
    ]
    data = {"images": _images("a.jpg"), "annotations": [{"image_id": 0, "file_name": "a.png", "segments_info": infos}]}
    path = _json(folder / "pan.json", {**data, "categories": CATEGORIES})
    assert _prepare(folder, "panoptic", json=path, masks=folder / "masks") == 0
    info, records = _read(folder)
    assert [(c.texts, c.is_region) for c in info.classes] == [(("cat",), False), (("sky",), True)]
    record = records["a.jpg"]
    sky, cat, crowd = record.segments
    assert (sky.class_id, cat.class_id, cat.crowd, crowd.crowd) == (1, 0, False, True)
    # one region for a stuff class
    np.testing.assert_array_equal(record.decode_mask(sky.mask), np.isin(ids, (70_000, 300)))
    np.testing.assert_array_equal(record.decode_mask(cat.mask), ids == 5)
    np.testing.assert_array_equal(record.decode_mask(record.ignore), ids == 0)
    assert cat.box == (0, 20, 30, 30)


def test_instances_polygons_both_run_length_codes_and_boxes(folder):
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
    assert _instances(folder, annotations) == 0
    record = _read(folder)[1]["a.jpg"]
    polygons, crowd, compressed, box = record.segments
    np.testing.assert_array_equal(record.decode_mask(polygons.mask), _oracle(SQUARE + [[40, 30, 50, 30, 50, 38]]))
    np.testing.assert_array_equal(record.decode_mask(crowd.mask), solid)
    np.testing.assert_array_equal(record.decode_mask(compressed.mask), solid)
    assert [s.crowd for s in record.segments] == [False, True, False, False]
    assert box.mask is None and box.box == (0, 10, 15, 20.5) and polygons.box == (10, 5, 50, 38)


def test_lvis_federated_labels(folder):
    images = _images("a.jpg", "b.png", neg_category_ids=[2], not_exhaustive_category_ids=[1])
    images[1] = {
        **images[1],
        "file_name": None,
        "coco_url": "http://images.cocodataset.org/val2017/b.png",
        "neg_category_ids": [],
    }
    categories = [{"id": 1, "name": "bow_tie", "synonyms": ["bow_tie", "bowtie"]}, {"id": 2, "name": "bowtie"}]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "segmentation": SQUARE} for i in range(2)]
    path = _json(folder / "lvis.json", {"images": images, "annotations": annotations, "categories": categories})
    assert _prepare(folder, "instances", json=path) == 0
    info, records = _read(folder)
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
    path = _json(folder / "refs.json", {"refs": refs})
    shape = {"id": 77, "image_id": 1, "category_id": 7, "segmentation": SQUARE}
    instances = _json(
        folder / "inst.json",
        {"images": _images("a.jpg", "b.png"), "annotations": [shape], "categories": CATEGORIES[:1]},
    )
    assert _prepare(folder, "referring", json=path, instances=instances) == 0
    info, records = _read(folder)
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
    assert _prepare(folder, "referring", json=path, instances=instances, split="testA", refs_split="testA") == 0
    assert list(_read(folder, "testA")[1]) == ["b.png"]


def test_refs_may_be_a_pickle_but_no_code_in_it_runs(folder, capsys):
    refs = [{"image_id": 0, "ann_id": 77, "sentences": [{"sent": "the cat"}], "split": "train"}]
    shape = {"id": 77, "image_id": 0, "category_id": 7, "segmentation": SQUARE}
    instances = _json(
        folder / "inst.json",
        {"images": _images("a.jpg", "b.png"), "annotations": [shape], "categories": CATEGORIES[:1]},
    )
    path = folder / "refs(unc).p"
    path.write_bytes(pickle.dumps(refs, protocol=2))
    assert _prepare(folder, "referring", json=path, instances=instances) == 0
    assert _read(folder)[1]["a.jpg"].segments[0].texts == ("the cat",)
    trace = folder / "it_ran"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.")
    capsys.readouterr()
    assert _prepare(folder, "referring", json=path, instances=instances) == 1
    assert not trace.exists() and "not a pickle of plain values" in "".join(capsys.readouterr())


@pytest.mark.parametrize("palette", [False, True])
def test_semantic_index_png_with_ignored_class(folder, palette):
    index = np.repeat(np.arange(4, dtype=np.uint8), 10)[:, None].repeat(W, 1)
    _png(folder / "masks" / "a.png", index, palette)
    classes = _json(folder / "classes.json", {"classes": ["sky, heaven", "void", "side_walk"], "ignore_index": 1})
    assert _prepare(folder, "semantic", masks=folder / "masks", classes=classes) == 0
    info, records = _read(folder)
    assert [(c.texts, c.is_region) for c in info.classes] == [(("sky", "heaven"), True), (("side walk",), True)]
    record = records["a"]
    for segment, value in zip(record.segments, (0, 2), strict=True):
        np.testing.assert_array_equal(record.decode_mask(segment.mask), index == value)
    np.testing.assert_array_equal(record.decode_mask(record.ignore), np.isin(index, (1, 3)))


def test_class_table_of_ade20k_starts_at_one(folder):
    _png(folder / "masks" / "a.png", np.repeat(np.uint8([0, 1, 2, 2]), 10)[:, None].repeat(W, 1))
    (folder / "objects.txt").write_text("Idx\tRatio\tName\n1\t0.2\twall\n2\t0.1\tbuilding, edifice\n")
    assert _prepare(folder, "semantic", masks=folder / "masks", classes=folder / "objects.txt") == 0
    info, records = _read(folder)
    assert info.classes[1].texts == ("building", "edifice")
    assert records["a"].segments[1].class_id == 1 and records["a"].segments[1].box == (0, 20, W, H)
    assert records["a"].decode_mask(records["a"].ignore).sum() == 10 * W


def test_foreground_is_the_union_of_its_annotations(folder):
    other = [[40, 20, 55, 20, 55, 35]]
    annotations = [{"id": i, "image_id": 0, "category_id": 7, "segmentation": s} for i, s in enumerate((SQUARE, other))]
    instances = _json(
        folder / "inst.json", {"images": _images("a.jpg"), "annotations": annotations, "categories": CATEGORIES[:1]}
    )
    path = _json(folder / "fg.json", {"items": [{"image_id": 0, "ann_ids": [0, 1]}, {"image_id": 5, "ann_ids": [9]}]})
    assert _prepare(folder, "foreground", json=path, instances=instances) == 0
    record = _read(folder)[1]["a.jpg"]
    np.testing.assert_array_equal(record.decode_mask(record.segments[0].mask), _oracle(SQUARE) | _oracle(other))
    assert record.segments[0].foreground and record.segments[0].class_id is None


@pytest.mark.parametrize("white", [1, 255])
def test_foreground_mask_folder(folder, white):
    solid = _oracle(SQUARE)
    _png(folder / "masks" / "c.png", (solid * white).astype(np.uint8))
    assert _prepare(folder, "foreground", masks=folder / "masks") == 0
    record = _read(folder)[1]["c"]
    np.testing.assert_array_equal(record.decode_mask(record.segments[0].mask), solid)


def test_mattes_keep_every_gray_level(folder):
    alpha = np.linspace(0, 255, H * W).astype(np.uint8).reshape(H, W)
    _png(folder / "alphas" / "a.png", alpha[..., None].repeat(3, -1))
    assert _prepare(folder, "mattes", alphas=folder / "alphas") == 0
    record = _read(folder)[1]["a"]
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(record.segments[0].alpha))), alpha)
    np.testing.assert_array_equal(record.decode_mask(record.segments[0].mask), alpha > 127)


def test_sample_makes_all_its_sets(folder):
    assert cli.main(["sample", "--train=8", "--val=4", "--size=48", f"--output={folder / 'out'}", "--workers=1"]) == 0
    info, records = _read(folder, name="sample_scenes")
    assert info.splits == {"train": 8, "val": 4} and all(
        r.decode_image().shape == (48, 48, 3) for r in records.values()
    )
    assert {"sample_scenes", "sample_boxes", "sample_mattes"} <= set(os.listdir(folder / "out"))
    _, held_out = _read(folder, name="sample_scenes", split="val")
    images = [path.read_bytes() for path in sorted((folder / "out" / "sample_images").glob("*.png"))]
    assert images == [held_out[key].image for key in sorted(held_out)]


# ---- Images -------------------------------------------------------------------------------------------------------


def test_jpeg_and_png_bytes_are_kept_and_others_become_png(folder):
    assert _instances(folder, [], _images("a.jpg", "b.png", "c.webp")) == 0
    records = _read(folder)[1]
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
    images = _images("turned.jpg", "turned.jpg", "a.jpg")
    images[1] |= {"height": W, "width": H}
    assert _instances(folder, [], images) == 0
    records = _read(folder)[1]
    assert (records["turned.jpg"].height, records["turned.jpg"].width) == (W, H)
    assert "1 x image: size differs from the JSON (rotated by EXIF)" in capsys.readouterr().out


# ---- Bad input ----------------------------------------------------------------------------------------------------


def test_unusable_images_are_dropped_and_counted(folder, capsys):
    whole = (folder / "images" / "d.jpg").read_bytes()
    (folder / "images" / "d.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    png = (folder / "images" / "b.png").read_bytes()
    (folder / "images" / "b.png").write_bytes(png[:-200])
    (folder / "images" / "text.jpg").write_bytes(b"not an image at all")
    assert (
        _instances(folder, [], _images("a.jpg", "b.png", "d.jpg", "gone.jpg", "text.jpg") + _images("again.jpg")) == 0
    )
    assert list(_read(folder)[1]) == ["a.jpg"]
    table = capsys.readouterr().out
    assert "toy train: 1 images kept, 5 dropped" in table
    for line in (
        "2 x image: file is truncated (b.png, d.jpg)",
        "1 x image: file is missing (gone.jpg)",
        "1 x image: cannot be decoded (text.jpg)",
        "1 x image: listed twice in the JSON (again.jpg)",
    ):
        assert line in table


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"segmentation": [[]]}, "empty polygon"),
        ({"segmentation": [[1, 1, 5, 5]]}, "empty polygon"),
        ({"segmentation": [[1, 1, 1, 1, 1, 1]]}, "mask is empty"),
        ({"segmentation": [[90, 1, 95, 1, 95, 9]]}, "mask is empty"),
        ({"segmentation": {"size": [W, H], "counts": [5, 10]}}, "mask size differs from its image"),
        ({"segmentation": {"size": [H, W], "counts": [0, 9 * H * W]}}, "malformed mask or box"),
        ({"segmentation": 5}, "malformed mask or box"),
        ({"bbox": [W + 1, 5, 10, 10]}, "box outside its image"),
        ({"bbox": [5, 5, 0, 10]}, "box without area"),
        ({"bbox": ["x", 5, 1, 10]}, "malformed mask or box"),
        ({"bbox": [5, 5, float("nan"), 10]}, "malformed mask or box"),
        ({}, "neither mask nor box"),
        ({"bbox": [5, 5, 10, 10], "category_id": 8}, "unknown category"),
    ],
)
def test_unusable_annotations_are_dropped_and_counted(folder, capsys, fields, reason):
    good = {"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 1, 5, 5]}
    assert _instances(folder, [good, {"id": 2, "image_id": 0, "category_id": 7, **fields}]) == 0
    record = _read(folder)[1]["a.jpg"]
    assert len(record.segments) == 1
    assert f"1 x segment: {reason} (a.jpg annotation 2)" in capsys.readouterr().out
    assert record.partial_classes == (() if "category_id" in fields else (0,))  # so that nobody learns it is absent


def test_wrong_boxes_are_noted(folder, capsys):
    corners = {"id": 1, "image_id": 0, "category_id": 7, "bbox": [30, 20, 50, 39]}  # x0, y0, x1, y1 by mistake
    assert _instances(folder, [corners, {**corners, "id": 2, "segmentation": SQUARE}]) == 0
    clipped, masked = _read(folder)[1]["a.jpg"].segments
    assert clipped.box == (30, 20, W, H) and masked.box == (10, 5, 30, 25)
    table = capsys.readouterr().out
    assert "note: box clipped to its image" in table and "note: box disagrees with its mask" in table


def test_panoptic_png_and_json_that_disagree_are_counted(folder, capsys):
    ids = np.zeros((H, W, 3), np.uint8)
    ids[:10, :, 0], ids[10:20, :, 0], ids[20:30, :, 0] = 1, 2, 3
    _png(folder / "masks" / "a.png", ids)
    _png(folder / "masks" / "b.png", ids[:-1])
    infos = [{"id": i, "category_id": c} for i, c in ((1, 7), (2, 1000), (9, 7))]
    annotations = [
        {"image_id": i, "file_name": name, "segments_info": infos}
        for i, name in enumerate(("a.png", "b.png", "gone.png"))
    ]
    data = {
        "images": _images("a.jpg", "b.png", "d.jpg", "c.webp"),
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    assert _prepare(folder, "panoptic", json=_json(folder / "pan.json", data), masks=folder / "masks") == 0
    record = _read(folder)[1]["a.jpg"]
    assert len(record.segments) == 1 and record.decode_mask(record.ignore)[10:].all()
    table = capsys.readouterr().out
    for line in (
        "segment: in the JSON, not in the PNG (a.jpg segment 9)",
        "segment: in the PNG, not in the JSON (a.jpg segment 3)",
        "segment: unknown category (a.jpg segment 2)",
        "image: mask size differs from its image (b.png)",
        "image: mask file is missing (d.jpg)",
        "image: no annotation (c.webp)",
        "1 images kept, 3 dropped",
    ):
        assert line in table


def test_masks_and_images_that_stand_alone_are_counted(folder, capsys):
    for name in ("a", "ghost"):
        _png(folder / "masks" / f"{name}.png", np.zeros((H, W), np.uint8))
    _png(folder / "masks" / "b.png", np.random.default_rng(0).integers(0, 9, (H, W, 3), np.uint8))
    classes = _json(folder / "classes.json", ["sky"])
    assert _prepare(folder, "semantic", masks=folder / "masks", classes=classes) == 0
    table = capsys.readouterr().out
    assert "2 x image: no mask with its name (c, d)" in table and "mask: no image with its name (ghost)" in table
    assert "image: mask is a color image, not an index PNG; give a class list with colors (b)" in table


def _one_line(capsys, status, *words):
    error = capsys.readouterr().err
    assert status == 1 and error.startswith("mqformer prepare: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


def test_mistakes_end_in_one_line(folder, capsys):
    good = {"images": _images("a.jpg"), "annotations": [], "categories": CATEGORIES}
    path = _json(folder / "ok.json", good)
    _one_line(capsys, _prepare(folder, "instances", json=path, images=folder / "gone"), "gone: no such folder")
    _one_line(capsys, _prepare(folder, "instances", json="gone.json"), "gone.json: no such file")
    (folder / "broken.json").write_text("{")
    _one_line(capsys, _prepare(folder, "instances", json=folder / "broken.json"), "broken.json: not JSON")
    _one_line(capsys, _prepare(folder, "referring", json=path), "ok.json: field 'refs' is missing")
    twice = _json(folder / "twice.json", {**good, "categories": [*CATEGORIES, {"id": 3, "name": "cat"}]})
    _one_line(capsys, _prepare(folder, "instances", json=twice), "'cat' occurs 2 times")
    plain = _json(folder / "plain.json", {**good, "categories": [{"id": 1, "name": "cat"}]})
    _one_line(capsys, _prepare(folder, "panoptic", json=plain, masks=folder), "'isthing' is missing")
    assert not (folder / "out" / "toy").exists()


def test_splits_of_one_set_share_their_classes(folder, capsys):
    assert _instances(folder, []) == 0
    assert _instances(folder, [], _images("b.png", "d.jpg"), split="val") == 0
    assert _read(folder)[0].splits == {"train": 1, "val": 2}
    other = {"images": _images("a.jpg"), "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    _one_line(
        capsys,
        _prepare(folder, "instances", json=_json(folder / "o.json", other), split="test"),
        "differ in their classes",
    )


def test_nothing_usable_is_an_error_and_leaves_no_set(folder, capsys):
    said = "toy train has no usable images: 1 x image: file is missing (gone.jpg)"
    _one_line(capsys, _instances(folder, [], _images("gone.jpg")), said)
    with pytest.raises(FileNotFoundError):
        _read(folder)


def test_excluded_images_stay_out(folder, capsys):
    val = _json(folder / "val.json", {"images": _images("a.jpg")})
    assert _instances(folder, [], _images("a.jpg", "b.png"), exclude=[val]) == 0
    assert list(_read(folder)[1]) == ["b.png"]
    assert "1 images kept, 1 dropped" in capsys.readouterr().out


def test_stuff_names_are_cleaned_unless_two_classes_become_one():
    from mqformer_jax.prepare.formats.coco import vocabulary

    names = [("door", 1), ("door-stuff", 0), ("wall-other-merged", 0), ("wall-brick", 0), ("t-shirt", 1)]
    classes, class_of = vocabulary(
        [{"id": 10 - i, "name": n, "isthing": t} for i, (n, t) in enumerate(names)], "x.json"
    )
    assert [c.name for c in reversed(classes)] == ["door", "door stuff", "wall", "wall brick", "t-shirt"]
    assert class_of[10] == 4


# ---- Whole or not at all ------------------------------------------------------------------------------------------


def _number(stop, i):
    if i == stop:
        raise KeyboardInterrupt
    return Built(bytes([i]) * 2000, collections.Counter(), Problems())


def _plan(numbers, stop=None):
    return Plan("instances", (), list(numbers), functools.partial(_number, stop))


def _numbers(root):
    source = ShardSource(str(root), "toy", "train")
    return [source[i][0] for i in range(len(source))]


@pytest.fixture
def threes(monkeypatch):
    """Shards of three records."""
    monkeypatch.setattr(shards, "SHARD_IMAGES", 3)


def test_records_keep_their_order_over_several_shards(tmp_path, threes):
    report = shards.write_split(str(tmp_path), "toy", "train", _plan(range(20)))
    assert report.shards == 7 and _numbers(tmp_path) == list(range(20))
    assert sorted(os.listdir(tmp_path / "toy"))[0] == "dataset.json" and len(os.listdir(tmp_path / "toy")) == 9


def test_interrupted_preparation_leaves_no_set(tmp_path, threes):
    with pytest.raises(KeyboardInterrupt):
        shards.write_split(str(tmp_path), "toy", "train", _plan(range(20), stop=15))
    assert os.listdir(tmp_path / "toy") == ["train.partial"]
    with pytest.raises(FileNotFoundError):
        _numbers(tmp_path)


def test_interrupted_repetition_leaves_the_old_split(tmp_path, threes):
    shards.write_split(str(tmp_path), "toy", "train", _plan(range(5)))
    with pytest.raises(KeyboardInterrupt):
        shards.write_split(str(tmp_path), "toy", "train", _plan(range(20), stop=15))
    assert _numbers(tmp_path) == list(range(5))


class Killed(BaseException):
    """Nothing catches it."""


def test_a_kill_at_any_step_leaves_the_old_split_or_none_or_the_new_one(tmp_path, threes, monkeypatch):
    """Every call that changes a folder fails from the n-th on, as if the process were gone; 3 old shards give way to 4
    new ones.
    """
    old, new = list(range(9)), list(range(100, 112))
    steps = {name: getattr(os, name) for name in ("mkdir", "replace", "remove", "unlink", "rmdir")}
    left = None

    def step(name, *args, **kwargs):
        nonlocal left
        if left is not None:
            if not left:
                raise Killed
            left -= 1
        return steps[name](*args, **kwargs)

    monkeypatch.setattr(os, "fsync", lambda _: None)
    for name in steps:
        monkeypatch.setattr(os, name, functools.partial(step, name))
    seen = set()
    for survived in range(100):
        root = tmp_path / str(survived)
        shards.write_split(str(root), "toy", "train", _plan(old))
        left = survived
        try:
            shards.write_split(str(root), "toy", "train", _plan(new))
        except Killed:
            pass
        finished, left = left, None
        try:
            found = _numbers(root)
        except FileNotFoundError:
            found = None  # not prepared: the honest answer in between
        assert found in (old, None, new)
        seen.add(str(found))
        shards.write_split(str(root), "toy", "train", _plan(new))
        assert _numbers(root) == new and len(os.listdir(root / "toy")) == 6
        if finished:
            break
    assert seen == {str(old), str(None), str(new)} and 20 < survived < 99
