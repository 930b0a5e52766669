"""A csv or jsonl of one's own to records: rows joined into images and segments, and every mistake in a row named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli

H, W = 24, 36


@pytest.fixture
def folder(tmp_path):
    """`images` a.jpg, b.jpg and sub/c.jpg, 36 x 24; `masks` left.png (white left of 10) and right.png (1 from 20
    on).
    """
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "masks").mkdir()
    for name in ("a", "b", "sub/c"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)).save(
            tmp_path / "images" / f"{name}.jpg"
        )
    Image.fromarray((np.arange(W) < 10).astype(np.uint8)[None].repeat(H, 0) * 255).save(tmp_path / "masks" / "left.png")
    Image.fromarray((np.arange(W) >= 20).astype(np.uint8)[None].repeat(H, 0)).save(tmp_path / "masks" / "right.png")
    return tmp_path


def _csv(folder, *lines):
    (folder / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return folder / "t.csv"


def _jsonl(folder, *rows):
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return folder / "t.jsonl"


def _prepare(folder, table, *words):
    paths = {"table": table, "images": folder / "images", "output": folder / "out", "masks": folder / "masks"}
    return cli.main(
        ["table", "--name=toy", "--split=train", "--workers=1", *(f"--{k}={v}" for k, v in paths.items()), *words]
    )


def _read(folder):
    source = ShardSource(str(folder / "out"), "toy", "train")
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


def test_csv_and_jsonl_tables_give_the_same_records(folder):
    lines = (
        "image, mask, bbox, class, expression, no_target",
        'a.jpg,left.png,,black_cat,"the left cat;the  cat, asleep",',
        "a.jpg,left.png,,,left one,",
        'a.jpg,,"20,2,10.5,8",dog,,false',
        "a.jpg,,,,a bird;a fish,true",
        "sub/c.jpg,,1 2 3 4,black cat,tiny,0",
    )
    rows = (
        {"image": "a.jpg", "mask": "left.png", "class": "black_cat", "expression": ["the left cat", "the cat, asleep"]},
        {"image": "a.jpg", "mask": "left.png", "expression": "left one"},
        {"image": "a.jpg", "bbox": [20, 2, 10.5, 8], "class": "dog", "no_target": False},
        {"image": "a.jpg", "expression": ["a bird", "a fish"], "no_target": True},
        {"image": "sub/c.jpg", "bbox": [1, 2, 3, 4], "class": "black cat", "expression": "tiny"},
    )
    assert _prepare(folder, _csv(folder, *lines)) == 0
    info, records = _read(folder)
    assert _prepare(folder, _jsonl(folder, *rows)) == 0
    again, same = _read(folder)
    assert (vars(info), records) == (vars(again), same)

    assert [(c.texts, c.is_region) for c in info.classes] == [
        (("black cat",), False),
        (("dog",), False),
    ] and not info.exhaustive
    record = records["a.jpg"]
    cat, dog = record.segments
    assert record.image == (folder / "images" / "a.jpg").read_bytes()
    assert (cat.class_id, cat.texts, cat.box) == (0, ("the left cat", "the cat, asleep", "left one"), (0, 0, 10, H))
    np.testing.assert_array_equal(
        record.decode_mask(cat.mask), np.array(Image.open(folder / "masks" / "left.png")) > 127
    )
    assert (dog.class_id, dog.texts, dog.mask, dog.box) == (1, (), None, (20, 2, 30.5, 10))
    assert record.absent_texts == ("a bird", "a fish")
    assert record.partial_classes == (0, 1)  # nobody said that there is no other cat
    assert records["sub/c.jpg"].segments[0].box == (1, 2, 4, 6)


def test_exhaustive_table_treats_unlisted_classes_as_absent(folder):
    rows = (
        {"image": "a.jpg", "mask": "right.png", "class": "sky"},
        {"image": "a.jpg", "mask": "gone.png", "class": "dog"},
        {"image": "b.jpg"},
    )
    (folder / "classes.json").write_text('[["sky", "heaven"], "dog", "cat"]')
    options = ("--exhaustive", "--stuff", "sky", f"--classes={folder / 'classes.json'}")
    assert _prepare(folder, _jsonl(folder, *rows), *options) == 0
    info, records = _read(folder)
    assert info.exhaustive and [(c.name, c.is_region) for c in info.classes] == [
        ("sky", True),
        ("dog", False),
        ("cat", False),
    ]
    np.testing.assert_array_equal(
        records["a.jpg"].decode_mask(records["a.jpg"].segments[0].mask)[0], np.arange(W) >= 20
    )
    assert records["a.jpg"].partial_classes == (1,)  # the dog whose mask is missing is not taught absent
    assert records["b.jpg"].segments == () and records["b.jpg"].partial_classes == ()


def test_no_target_class_is_absent_unless_it_also_has_a_box(folder):
    rows = [{"image": "a.jpg", "bbox": "1,1,5,5", "class": "dog"}]
    rows += [{"image": "a.jpg", "class": c, "no_target": 1} for c in ("dog", "cat")]
    assert _prepare(folder, _jsonl(folder, *rows)) == 0
    record = _read(folder)[1]["a.jpg"]
    assert (record.absent_classes, record.partial_classes) == ((0,), (1,))


def test_expressions_shared_by_two_segments_are_dropped(folder, capsys):
    rows = (
        {"image": "a.jpg", "mask": "left.png", "expression": ["the cat", "the left cat"]},
        {"image": "a.jpg", "mask": "right.png", "expression": ["the cat"]},
        {"image": "a.jpg", "expression": ["the left cat", "a dog"], "no_target": True},
        {"image": "b.jpg", "mask": "right.png", "expression": ["the cat"]},
    )
    assert _prepare(folder, _jsonl(folder, *rows)) == 0
    records = _read(folder)[1]
    assert [s.texts for s in records["a.jpg"].segments] == [("the left cat",)] and records["a.jpg"].absent_texts == (
        "a dog",
    )
    assert records["b.jpg"].segments[0].texts == ("the cat",)
    table = capsys.readouterr().out
    assert "names two objects (a.jpg 'the cat')" in table and "both present and absent (a.jpg 'the left cat')" in table


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"bbox": [1, 2, 3, 4]}, "neither class nor expression"),
        ({"no_target": True}, "neither class nor expression"),
        ({}, "neither class nor expression"),
        ({"class": "dog"}, "no mask, bbox or no_target"),
        ({"mask": "left.png", "expression": "x", "no_target": True}, "no_target together with a mask or bbox"),
        ({"expression": "x", "no_target": "maybe"}, "no_target is neither true nor false"),
        ({"bbox": [1, 2, 3], "class": "dog"}, "bbox is not x, y, width, height"),
        ({"bbox": "1 2 3 nan", "class": "dog"}, "bbox is not x, y, width, height"),
        ({"bbox": [1, 2, 0, 4], "class": "dog"}, "box without area"),
        ({"bbox": [90, 2, 3, 4], "class": "dog"}, "box outside its image"),
        ({"mask": "gone.png", "class": "dog"}, "mask file is missing"),
        ({"mask": "left.png", "class": "dog"}, "its mask or bbox already has another class"),
    ],
)
def test_unusable_rows_are_counted_and_named(folder, capsys, row, reason):
    table = _jsonl(folder, {"image": "a.jpg", "mask": "left.png", "class": "cat"}, {"image": "a.jpg", **row})
    assert _prepare(folder, table) == 0
    assert len(_read(folder)[1]["a.jpg"].segments) == 1
    assert f"1 x row: {reason} ({table}:3)" in capsys.readouterr().out


def test_missing_images_and_boxes_given_as_corners_are_noted(folder, capsys):
    assert (
        _prepare(
            folder, _csv(folder, "image,bbox,class", "gone.jpg,1 1 5 5,cat", ",1 1 5 5,cat", "a.jpg,20 10 36 24,cat")
        )
        == 0
    )
    assert _read(folder)[1]["a.jpg"].segments[0].box == (20, 10, W, H)
    table = capsys.readouterr().out
    assert "image: file is missing (gone.jpg)" in table and f"row: no image ({folder / 't.csv'}:3)" in table
    assert f"note: box clipped to its image (a bbox is x, y, width, height) ({folder / 't.csv'}:4)" in table


def test_invalid_tables_are_one_line_errors(folder, capsys):
    def says(table, *words, options=()):
        assert _prepare(folder, table, *options) == 1
        error = capsys.readouterr().err
        assert (
            error.startswith("mqformer prepare: ") and error.count("\n") == 1 and all(word in error for word in words)
        ), error

    says(folder / "gone.csv", "gone.csv: no such file")
    says(folder / "t.xlsx", "unknown extension; give a .csv file with a header, or a .jsonl")
    says(
        _csv(folder, "image;mask;class", "a.jpg;left.png;cat"),
        "t.csv:1: unknown column 'image;mask;class'; remove it, or use one of image, mask",
    )
    (folder / "latin.csv").write_bytes("image,class\na.jpg,café\n".encode("latin-1"))
    says(folder / "latin.csv", "latin.csv: not UTF-8 text", "save it as CSV in UTF-8")
    says(_csv(folder, "mask,class", "left.png,cat"), "t.csv:1: column 'image' is missing")
    says(
        _csv(folder, "image,bbox,class", "a.jpg,1,2,3,4,cat"),
        "t.csv:2: more fields than the header has",
        "double quotes",
    )
    says(_jsonl(folder, {"image": "a.jpg"}, {"image": "a.jpg", "box": [1, 2, 3, 4]}), "t.jsonl:3: unknown column 'box'")
    (folder / "t.jsonl").write_text('{"image": "a.jpg"}\n{"image": \n')
    says(folder / "t.jsonl", "t.jsonl:2: not JSON")
    (folder / "t.jsonl").write_text('["a.jpg"]\n')
    says(folder / "t.jsonl", 't.jsonl:1: not a JSON object; write lines like {"image": "a.jpg"')
    cat = _csv(folder, "image,mask,class", "a.jpg,left.png,cat")
    says(cat, "--stuff 'sky' is not a class; classes are cat", options=("--stuff", "sky"))
    (folder / "classes.txt").write_text("dog\n")
    says(cat, "1 x row: class 'cat' is not in --classes", options=(f"--classes={folder / 'classes.txt'}",))
    says(
        cat,
        "t.csv:2: class 'cat' is not in",
        "classes.txt",
        options=(f"--classes={folder / 'classes.txt'}", "--exhaustive"),
    )
    says(_jsonl(folder, {"image": "../images/a.jpg"}), "t.jsonl:1: image '../images/a.jpg' is not within --images")
    says(_jsonl(folder, {"image": "a.jpg", "mask": "/left.png"}), "t.jsonl:1: mask '/left.png' is not within --masks")


def test_equivalent_paths_refer_to_the_same_image_and_mask(folder):
    rows = [
        {"image": image, "mask": mask, "class": "cat"}
        for image, mask in (("a.jpg", "./left.png"), ("./sub/../a.jpg", "left.png"))
    ]
    assert _prepare(folder, _jsonl(folder, *rows), "--exhaustive") == 0
    records = _read(folder)[1]
    assert list(records) == ["a.jpg"] and len(records["a.jpg"].segments) == 1
