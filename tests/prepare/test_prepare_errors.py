"""`mqformer prepare` drops and counts bad images and annotations, and reports mistakes in one line."""

from __future__ import annotations

import numpy as np
import pytest
from preparation import CATEGORIES, SQUARE, H, W, image_entries, prepare, prepare_instances, read, write_json, write_png

from mqformer_jax.prepare import cli


def test_unusable_images_are_dropped_and_counted(folder, capsys):
    whole = (folder / "images" / "d.jpg").read_bytes()
    (folder / "images" / "d.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    png = (folder / "images" / "b.png").read_bytes()
    (folder / "images" / "b.png").write_bytes(png[:-200])
    (folder / "images" / "text.jpg").write_bytes(b"not an image at all")
    assert (
        prepare_instances(
            folder, [], image_entries("a.jpg", "b.png", "d.jpg", "gone.jpg", "text.jpg") + image_entries("again.jpg")
        )
        == 0
    )
    assert list(read(folder)[1]) == ["a.jpg"]
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
    assert prepare_instances(folder, [good, {"id": 2, "image_id": 0, "category_id": 7, **fields}]) == 0
    record = read(folder)[1]["a.jpg"]
    assert len(record.segments) == 1
    assert f"1 x segment: {reason} (a.jpg annotation 2)" in capsys.readouterr().out
    assert record.partial_classes == (() if "category_id" in fields else (0,))  # so that nobody learns it is absent


def test_clipped_boxes_and_boxes_disagreeing_with_masks_are_noted(folder, capsys):
    corners = {"id": 1, "image_id": 0, "category_id": 7, "bbox": [30, 20, 50, 39]}  # x0, y0, x1, y1 by mistake
    assert prepare_instances(folder, [corners, {**corners, "id": 2, "segmentation": SQUARE}]) == 0
    clipped, masked = read(folder)[1]["a.jpg"].segments
    assert clipped.box == (30, 20, W, H) and masked.box == (10, 5, 30, 25)
    table = capsys.readouterr().out
    assert "note: box clipped to its image" in table and "note: box disagrees with its mask" in table


def test_panoptic_png_and_json_mismatches_are_counted(folder, capsys):
    ids = np.zeros((H, W, 3), np.uint8)
    ids[:10, :, 0], ids[10:20, :, 0], ids[20:30, :, 0] = 1, 2, 3
    write_png(folder / "masks" / "a.png", ids)
    write_png(folder / "masks" / "b.png", ids[:-1])
    infos = [{"id": i, "category_id": c} for i, c in ((1, 7), (2, 1000), (9, 7))]
    annotations = [
        {"image_id": i, "file_name": name, "segments_info": infos}
        for i, name in enumerate(("a.png", "b.png", "gone.png"))
    ]
    data = {
        "images": image_entries("a.jpg", "b.png", "d.jpg", "c.webp"),
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    assert prepare(folder, "panoptic", json=write_json(folder / "pan.json", data), masks=folder / "masks") == 0
    record = read(folder)[1]["a.jpg"]
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


def test_unpaired_masks_and_images_are_counted(folder, capsys):
    for name in ("a", "ghost"):
        write_png(folder / "masks" / f"{name}.png", np.zeros((H, W), np.uint8))
    write_png(folder / "masks" / "b.png", np.random.default_rng(0).integers(0, 9, (H, W, 3), np.uint8))
    classes = write_json(folder / "classes.json", ["sky"])
    assert prepare(folder, "semantic", masks=folder / "masks", classes=classes) == 0
    table = capsys.readouterr().out
    assert "2 x image: no mask with its name (c, d)" in table and "mask: no image with its name (ghost)" in table
    assert "image: mask is a color image, not an index PNG; give a class list with colors (b)" in table


def _one_line(capsys, status, *words):
    error = capsys.readouterr().err
    assert status == 1 and error.startswith("mqformer prepare: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


def test_invalid_inputs_are_one_line_errors(folder, capsys):
    good = {"images": image_entries("a.jpg"), "annotations": [], "categories": CATEGORIES}
    path = write_json(folder / "ok.json", good)
    _one_line(capsys, prepare(folder, "instances", json=path, images=folder / "gone"), "gone: no such folder")
    _one_line(capsys, prepare(folder, "instances", json="gone.json"), "gone.json: no such file")
    (folder / "broken.json").write_text("{")
    _one_line(capsys, prepare(folder, "instances", json=folder / "broken.json"), "broken.json: not JSON")
    _one_line(capsys, prepare(folder, "referring", json=path), "ok.json: field 'refs' is missing")
    twice = write_json(folder / "twice.json", {**good, "categories": [*CATEGORIES, {"id": 3, "name": "cat"}]})
    _one_line(capsys, prepare(folder, "instances", json=twice), "'cat' occurs 2 times")
    plain = write_json(folder / "plain.json", {**good, "categories": [{"id": 1, "name": "cat"}]})
    _one_line(capsys, prepare(folder, "panoptic", json=plain, masks=folder), "'isthing' is missing")
    assert not (folder / "out" / "toy").exists()


def test_splits_of_one_set_must_have_the_same_classes(folder, capsys):
    assert prepare_instances(folder, []) == 0
    assert prepare_instances(folder, [], image_entries("b.png", "d.jpg"), split="val") == 0
    assert read(folder)[0].splits == {"train": 1, "val": 2}
    other = {"images": image_entries("a.jpg"), "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    _one_line(
        capsys,
        prepare(folder, "instances", json=write_json(folder / "o.json", other), split="test"),
        "differ in their classes",
    )


def test_split_without_usable_images_is_an_error_and_writes_no_set(folder, capsys):
    said = "toy train has no usable images: 1 x image: file is missing (gone.jpg)"
    _one_line(capsys, prepare_instances(folder, [], image_entries("gone.jpg")), said)
    with pytest.raises(FileNotFoundError):
        read(folder)


def test_excluded_images_are_dropped(folder, capsys):
    val = write_json(folder / "val.json", {"images": image_entries("a.jpg")})
    assert prepare_instances(folder, [], image_entries("a.jpg", "b.png"), exclude=[val]) == 0
    assert list(read(folder)[1]) == ["b.png"]
    assert "1 images kept, 1 dropped" in capsys.readouterr().out


def test_stuff_name_suffixes_are_removed_unless_names_would_collide():
    from mqformer_jax.prepare.formats.coco_categories import vocabulary

    names = [("door", 1), ("door-stuff", 0), ("wall-other-merged", 0), ("wall-brick", 0), ("t-shirt", 1)]
    classes, class_of = vocabulary(
        [{"id": 10 - i, "name": n, "isthing": t} for i, (n, t) in enumerate(names)], "x.json"
    )
    assert [c.name for c in reversed(classes)] == ["door", "door stuff", "wall", "wall brick", "t-shirt"]
    assert class_of[10] == 4


def test_tilde_after_an_equals_sign_expands_to_the_home_folder(folder, capsys, monkeypatch):
    """Shells expand "--root ~/data" only."""
    monkeypatch.setenv("HOME", str(folder))
    assert cli.main(["public", "refcoco", "--root=~/nowhere"]) == 1
    assert f"{folder}/nowhere" in capsys.readouterr().err
