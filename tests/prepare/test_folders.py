"""Folders of masks as websites ship them: every layout, way of saving and list, against PIL's reading of the same
files.
"""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli
from mqformer_jax.prepare.formats.class_lists import read_colors

H, W = 24, 36
SOFT = np.add.outer(np.arange(H) * 5, np.arange(W) * 4).astype(np.uint8)  # 0 to 255, and across 127
SOLID = SOFT > 127


def _save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)


def _photo(path):
    _save(path, np.random.default_rng(len(path.name)).integers(0, 255, (H, W, 3), np.uint8))


def _prepare(root, kind, *words, **options):
    options = {"name": "toy", "split": "train", "output": root / "out", "workers": 1, **options}
    return cli.main([kind, *(f"--{k}={v}" for k, v in options.items()), *words])


def _read(root, name="toy"):
    source = ShardSource(str(root / "out"), name, "train")
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


def _mask(record):
    (segment,) = record.segments
    assert segment.foreground
    return record.decode_mask(segment.mask)


def _gray(path):
    return np.array(Image.open(path).convert("L"))


# ---- Foregrounds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "suffix"),
    [("DUTS-TR-Mask", ""), ("DUTS-TR-Image", ""), ("DUTS-TR-Mask", "_gt"), ("DUTS-TR-Image", "_gt")],
)
def test_masks_are_found_in_a_separate_folder_or_beside_the_images(tmp_path, capsys, masks, suffix):
    images, masks = tmp_path / "DUTS-TR-Image", tmp_path / masks
    for name in ("1", "2"):
        _photo(images / f"{name}.jpg")
        _save(masks / f"{name}{suffix}.png", np.roll(SOFT, int(name), 1))
    (images / "._1.jpg").write_bytes(b"what macOS packs beside 1.jpg")
    assert _prepare(tmp_path, "foreground", images=images, masks=masks, mask_suffix=suffix) == 0
    records = _read(tmp_path)[1]
    assert records.keys() == {"1", "2"} and "2 images kept, 0 dropped" in capsys.readouterr().out
    for name, record in records.items():
        assert record.image == (images / f"{name}.jpg").read_bytes()
        np.testing.assert_array_equal(_mask(record), _gray(masks / f"{name}{suffix}.png") > 127)


def test_list_file_selects_the_images_of_a_split(tmp_path, capsys):
    names = ("a", "b c", "d.1", "e", "f", "sub/g", "not_listed")
    for name in names:
        _photo(tmp_path / "images" / f"{name}.jpg")
        _save(tmp_path / "masks" / f"{name}.png", SOFT)
    lines = [
        "a",
        "b c.jpg",
        "d.1",
        "images/e.png",
        "",
        "/x/images/f.jpg /x/masks/f_L.png",
        "sub/g.jpg",
        "gone.jpg",
        "a.jpg",
    ]
    (tmp_path / "train.txt").write_text("\r\n".join(lines))
    folders = {"images": tmp_path / "images", "masks": tmp_path / "masks"}
    assert _prepare(tmp_path, "foreground", **folders, list=tmp_path / "train.txt") == 0
    assert list(_read(tmp_path)[1]) == sorted(names[:-1])
    table = capsys.readouterr().out
    assert "1 x image: in the list, not in the folder (gone.jpg)" in table and "6 images kept, 1 dropped" in table
    for text, words in (
        (b"other\n", "names an image in --images (first line: 'other')"),
        (b"", "train.txt: the file is empty"),
        (b"\xff\xd8", "in UTF-8"),
    ):
        (tmp_path / "train.txt").write_bytes(text)
        assert _prepare(tmp_path, "foreground", **folders, list=tmp_path / "train.txt") == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("aachen/x.jpg", True),
        ("bonn/x.jpg", False),  # another folder's
        ("x photo.jpg", False),  # a name with a space
        ("x 3", True),
        ("x -1", True),
        ("./x.jpg", True),
        ("x.jpg x.png", True),
        ("/SegNet/aachen/x.jpg /SegNet/aachenannot/x.png", True),
        ("/SegNet/bonn/x.jpg /SegNet/bonnannot/x.png", False),
    ],
)
def test_list_line_never_matches_a_file_of_another_name_or_folder(tmp_path, capsys, line, found):
    for name in ("x", "y"):
        _photo(tmp_path / "aachen" / f"{name}.jpg")
        _save(tmp_path / "masks" / f"{name}.png", SOFT)
    (tmp_path / "train.txt").write_text(f"y\n{line}\n")
    assert (
        _prepare(
            tmp_path, "foreground", images=tmp_path / "aachen", masks=tmp_path / "masks", list=tmp_path / "train.txt"
        )
        == 0
    )
    assert list(_read(tmp_path)[1]) == ["x", "y"][not found :]
    assert (f"1 x image: in the list, not in the folder ({line})" in capsys.readouterr().out) != found


def test_symlinked_folders_are_read(tmp_path):
    for kind in ("images", "masks"):
        for city in ("aachen", "bonn"):
            _save(tmp_path / "disk" / kind / city / f"x{city}.png", SOFT)
        (tmp_path / kind).mkdir()
        os.rename(tmp_path / "disk" / kind / "aachen", tmp_path / kind / "aachen")
        os.symlink(tmp_path / "disk" / kind / "bonn", tmp_path / kind / "bonn")
        os.symlink(tmp_path / kind, tmp_path / kind / "around")
    assert _prepare(tmp_path, "foreground", images=tmp_path / "images", masks=tmp_path / "masks") == 0
    assert list(_read(tmp_path)[1]) == ["aachen/xaachen", "bonn/xbonn"]


@pytest.mark.parametrize("words", [["--exclude", "val.json"], ["--instances", "train.json"]])
def test_json_only_options_are_rejected_with_foreground_masks(tmp_path, capsys, words):
    assert _prepare(tmp_path, "foreground", *words, images=tmp_path, masks=tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("mqformer prepare: --exclude and --instances require --json; ") and error.count("\n") == 1


@pytest.mark.parametrize("option", ["name", "split"])
@pytest.mark.parametrize("text", ["..", "a/b", "", "a\n", "-x", ".a", "a b"])
def test_invalid_set_and_split_names_are_rejected(tmp_path, capsys, option, text):
    with pytest.raises(SystemExit):
        _prepare(tmp_path, "foreground", images=tmp_path, masks=tmp_path, **{option: text})
    assert f"argument --{option}: {text!r} is not a valid name" in capsys.readouterr().err


def _ways_to_save(folder):
    """File names of one mask saved in every way, and what is white in it."""
    white, clear = SOLID.astype(np.uint8) * 255, np.full((H, W), 255, np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)
    palette = Image.fromarray(SOLID.astype(np.uint8))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    ways = {
        "one_bit.png": Image.fromarray(white).convert("1"),
        "zero_and_one.png": Image.fromarray(SOLID.astype(np.uint8)),
        "gray.png": Image.fromarray(SOFT),
        "rgb.png": Image.fromarray(np.dstack([SOFT] * 3)),
        "opaque.png": Image.fromarray(np.dstack([SOFT] * 3 + [clear])),
        "cut_out.png": Image.fromarray(np.dstack([noise, SOFT])),
        "black_with_alpha.png": Image.fromarray(np.dstack([clear * 0, SOFT])),
        "palette.png": palette,
        "sixteen_bit.png": Image.fromarray(SOFT.astype(np.uint16) * 257),
        "gray.bmp": Image.fromarray(SOFT),
        "gray.tif": Image.fromarray(SOFT),
        "cut_out.webp": Image.fromarray(np.dstack([noise, SOFT])),
        "palette.gif": palette,
    }
    for name, image in ways.items():
        image.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    Image.fromarray(white).save(folder / "gray.jpg", quality=95)
    return [*ways, "gray.jpg"]


def test_foreground_masks_are_read_in_every_file_format_and_image_mode(tmp_path):
    for folder in ("saved", "images", "masks"):
        (tmp_path / folder).mkdir()
    saved = _ways_to_save(tmp_path / "saved")
    for name in saved:
        _photo(tmp_path / "images" / f"{name.replace('.', '_')}.jpg")
        os.rename(tmp_path / "saved" / name, tmp_path / "masks" / (name.replace(".", "_") + os.path.splitext(name)[1]))
    assert _prepare(tmp_path, "foreground", images=tmp_path / "images", masks=tmp_path / "masks") == 0
    records = _read(tmp_path)[1]
    assert len(records) == len(saved)
    for key, record in records.items():
        np.testing.assert_array_equal(_mask(record), SOLID, err_msg=key)


def test_ambiguous_or_unusable_masks_are_counted(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), np.uint8)
    masks = {"photo": noise, "dim": SOFT // 4, "turned": SOFT.T, "small": SOFT[1:], "black": SOFT * 0, "good": SOFT}
    for name, mask in masks.items():
        _photo(tmp_path / "images" / f"{name}.jpg")
        _save(tmp_path / "masks" / f"{name}.png", np.ascontiguousarray(mask))
    _photo(tmp_path / "images" / "alone.jpg")
    (tmp_path / "images" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    _save(tmp_path / "masks" / "phone.png", SOFT)
    assert _prepare(tmp_path, "foreground", images=tmp_path / "images", masks=tmp_path / "masks") == 0
    assert list(_read(tmp_path)[1]) == ["good"]
    table = capsys.readouterr().out
    for line in (
        "image: mask is a color image, not black and white (photo)",
        "image: mask has a largest value between 2 and 127; save white as 255, or as 1 (dim)",
        "image: mask size differs from its image (rotated by EXIF) (turned)",
        "image: mask size differs from its image (small)",
        "image: has an empty foreground (black)",
        "image: no mask with its name (alone)",
        "image: cannot be decoded (phone)",
    ):
        assert f"1 x {line}" in table


# ---- Mattes -------------------------------------------------------------------------------------------------------


def test_mattes_are_read_from_cutout_alpha_channels_with_trimaps(tmp_path, capsys):
    trimap = np.where(SOFT < 60, 0, np.where(SOFT > 200, 255, 128)).astype(np.uint8)
    for name in ("a", "b", "c", "d"):
        _photo(tmp_path / "images" / f"{name}.jpg")
        _save(tmp_path / "cut" / f"{name}.png", np.dstack([np.full((H, W, 3), 200, np.uint8), SOFT]))
    _save(tmp_path / "trimaps" / "a.png", np.dstack([trimap] * 3))
    _save(tmp_path / "trimaps" / "b.png", trimap[:-1])
    _save(tmp_path / "trimaps" / "d.png", trimap // 127)
    assert (
        _prepare(tmp_path, "mattes", images=tmp_path / "images", alphas=tmp_path / "cut", trimaps=tmp_path / "trimaps")
        == 0
    )
    records = _read(tmp_path)[1]
    for record in records.values():
        np.testing.assert_array_equal(_gray(io.BytesIO(record.segments[0].alpha)), SOFT)
        np.testing.assert_array_equal(_mask(record), SOLID)
    np.testing.assert_array_equal(_gray(io.BytesIO(records["a"].segments[0].trimap)), trimap)
    assert Image.open(io.BytesIO(records["a"].segments[0].trimap)).mode == "L"
    assert [key for key, record in records.items() if record.segments[0].trimap] == ["a"] and len(records) == 4
    table = capsys.readouterr().out
    assert (
        "1 x trimap: no file with the name of its image (c)" in table
        and "1 x trimap: size differs from its image (b)" in table
    )
    assert (
        "1 x trimap: has no value above 2; unknown is 128, inside is 255 (d)" in table
        and "4 images kept, 0 dropped" in table
    )
    (tmp_path / "none").mkdir()
    assert (
        _prepare(tmp_path, "mattes", images=tmp_path / "images", alphas=tmp_path / "cut", trimaps=tmp_path / "none")
        == 1
    )
    assert "no trimap has the name of an image" in capsys.readouterr().err


def test_real_mattes_and_trimaps_match_the_source_files(real_data, tmp_path):
    matting = real_data / "matting"
    paths = {"images": matting / "images", "alphas": matting / "alpha", "trimaps": matting / "trimap"}
    assert _prepare(tmp_path, "mattes", **paths) == 0
    records = _read(tmp_path)[1]
    assert records.keys() == {path.stem for path in (matting / "images").iterdir()}
    for key, record in records.items():
        alpha, trimap = _gray(matting / "alpha" / f"{key}.png"), _gray(matting / "trimap" / f"{key}.png")
        np.testing.assert_array_equal(_gray(io.BytesIO(record.segments[0].alpha)), alpha)
        np.testing.assert_array_equal(_gray(io.BytesIO(record.segments[0].trimap)), trimap)
        np.testing.assert_array_equal(_mask(record), alpha > 127)


# ---- Semantic -----------------------------------------------------------------------------------------------------

SKY, ROAD, VOID = (128, 128, 128), (128, 64, 128), (0, 0, 0)
WHERE = np.repeat(np.arange(4), H // 4)[:, None].repeat(W, 1)  # sky, road, void, and a color that no class has


def _semantic(root, *words, **options):
    _photo(root / "701_StillsRaw_full" / "0001TP.png")
    _save(root / "LabeledApproved_full" / "0001TP_L.png", np.array([SKY, ROAD, VOID, (1, 2, 3)], np.uint8)[WHERE])
    folders = {"images": root / "701_StillsRaw_full", "masks": root / "LabeledApproved_full"}
    return _prepare(root, "semantic", "--mask_suffix=_L", *words, **folders, **options)


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_color_masks_are_decoded_with_the_class_list_colors(tmp_path, capsys, kind):
    if kind == "txt":  # CamVid's own
        (tmp_path / "label_colors.txt").write_text("0 0 0\t\tVoid\r\n128 64 128\tRoad\r\n128 128 128\tSky_Blue\r\n")
    else:
        classes = [
            {"name": "void", "color": VOID},
            {"name": "Road", "colour": ROAD},
            {"name": ["Sky Blue"], "color": SKY},
            "other",
        ]
        (tmp_path / "label_colors.json").write_text(json.dumps({"classes": classes, "ignore_index": 0}))
    assert _semantic(tmp_path, classes=tmp_path / f"label_colors.{kind}") == 0
    info, records = _read(tmp_path)
    assert [c.name for c in info.classes][:2] == ["Road", "Sky Blue"]
    record = records["0001TP"]
    assert sorted(s.class_id for s in record.segments) == [0, 1]
    for segment in record.segments:
        np.testing.assert_array_equal(record.decode_mask(segment.mask), WHERE == 1 - segment.class_id)
    np.testing.assert_array_equal(record.decode_mask(record.ignore), WHERE > 1)
    assert "1 x segment: mask color has no class (0001TP (1, 2, 3))" in capsys.readouterr().out


def test_color_mask_without_class_colors_is_an_error_with_a_remedy(tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    assert _semantic(tmp_path, classes=tmp_path / "classes.txt") == 1
    assert "not an index PNG; give a class list with colors (0001TP)" in capsys.readouterr().err
    (tmp_path / "classes.json").write_text('{"classes": [{"name": "sky", "color": [0, 0]}]}')
    assert _semantic(tmp_path, classes=tmp_path / "classes.json") == 1
    error = capsys.readouterr().err
    assert 'a class is malformed; write it in one of these forms: "sky", ["sky", "heaven"] or {"name": ' in error


@pytest.mark.parametrize("saved", ["1", "P", "L", "RGBA"])
def test_index_masks_are_decoded_by_value_ignoring_class_list_colors(tmp_path, saved):
    index = (WHERE > 1).astype(np.uint8)
    if saved == "RGBA":
        _save(tmp_path / "masks" / "a.png", np.dstack([index] * 3 + [np.full((H, W), 255, np.uint8)]))
    elif saved == "P":
        image = Image.fromarray(index)
        image.putpalette([9, 9, 9, *SKY])
        (tmp_path / "masks").mkdir()
        image.save(tmp_path / "masks" / "a.png")
    else:
        _save(tmp_path / "masks" / "a.png", index.astype(bool) if saved == "1" else index)
    _photo(tmp_path / "images" / "a.jpg")
    classes = ["sky", "road"] if saved == "RGBA" else [{"name": "sky", "color": SKY}, {"name": "road", "color": ROAD}]
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    paths = {"images": tmp_path / "images", "masks": tmp_path / "masks", "classes": tmp_path / "classes.json"}
    assert _prepare(tmp_path, "semantic", **paths) == 0
    record = _read(tmp_path)[1]["a"]
    for segment in record.segments:
        np.testing.assert_array_equal(record.decode_mask(segment.mask), index == segment.class_id)
    assert len(record.segments) == 2 and record.ignore is None


def _index(root, mask, classes, text, *words, **save):
    _photo(root / "images" / "a.jpg")
    _save(root / "masks" / mask, np.arange(H * W, dtype=np.uint16).reshape(H, W).astype(np.uint8), **save)
    (root / classes).write_text(text)
    return _prepare(root, "semantic", *words, images=root / "images", masks=root / "masks", classes=root / classes)


@pytest.mark.parametrize(
    "line",
    [
        "# label:color_rgb:parts:actions",
        "background:0,0,0::",
        "1: cat",
        "1,cat",
        "1 cat",
        "1\tcat",
        "7",
        "1,0.1576,11664,1172,1,wall",
    ],
)
def test_class_list_in_an_unsupported_format_is_rejected(tmp_path, capsys, line):
    assert _index(tmp_path, "a.png", "classes.txt", f"{line}\n{line.replace('1', '2')}\n") == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"classes.txt: line {line!r} is not a class name; use one of these formats: JSON, lines with one name"
        in error
    )


@pytest.mark.parametrize(("count", "words"), [(256, []), (255, ["--index_offset=1"])])
def test_mask_value_255_is_a_class_only_if_the_class_list_includes_it(tmp_path, count, words):
    assert _index(tmp_path, "a.png", "classes.txt", "".join(f"class {i}\n" for i in range(count)), *words) == 0
    info, records = _read(tmp_path)
    last = records["a"].segments[-1]
    assert len(info.classes) == count and info.classes[last.class_id].name == f"class {count - 1}"
    np.testing.assert_array_equal(records["a"].decode_mask(last.mask), _gray(tmp_path / "masks" / "a.png") == 255)
    assert _index(tmp_path, "a.png", "classes.txt", "".join(f"class {i}\n" for i in range(255)), "--name=fewer") == 0
    np.testing.assert_array_equal(
        (record := _read(tmp_path, "fewer")[1]["a"]).decode_mask(record.ignore),
        _gray(tmp_path / "masks" / "a.png") == 255,
    )


def test_synonym_shared_by_two_classes_is_dropped(tmp_path):
    words = "\n".join(
        ["earth, ground", "land, ground, soil", "counter", "kitchen, counter", *(f"class {i}" for i in range(250))]
    )
    assert _index(tmp_path, "a.png", "classes.txt", words) == 0
    assert [c.texts for c in _read(tmp_path)[0].classes][:4] == [
        ("earth",),
        ("land", "soil"),
        ("counter",),
        ("kitchen",),
    ]


def test_jpeg_index_mask_is_rejected_and_counted(tmp_path, capsys):
    assert _index(tmp_path, "a.jpg", "classes.txt", "sky\nroad\n") == 1
    assert "1 x image: mask is a JPEG, whose values are not exact; save masks as PNG (a)" in capsys.readouterr().err


def test_duplicate_class_colors_error_names_both_classes(tmp_path):
    path = tmp_path / "colors.json"
    path.write_text(json.dumps([{"name": "road", "color": [1, 2, 3]}, {"name": ["sky", "air"], "color": [1, 2, 3]}]))
    with pytest.raises(ValueError, match=r"colors.json: classes 'road' and 'sky, air' .* \(1, 2, 3\)"):
        read_colors(str(path))
