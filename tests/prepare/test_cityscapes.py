"""instanceIds PNGs of Cityscapes become records. The official reading of each value is the reference."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli

H, W = 24, 60
# The 19 classes in the order of their train ids, and their label ids.
NAMES = "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider"
NAMES = [*NAMES.split(","), "car", "truck", "bus", "train", "motorcycle", "bicycle"]
IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


@pytest.fixture
def city(tmp_path):
    """Writes one image and its instance ids into the official folders; the folder that holds them."""

    def write(name: str, ids: np.ndarray, size: tuple[int, int] = (H, W)) -> None:
        place = name.split("_")[0]
        for folder in ("leftImg8bit", "gtFine"):
            (tmp_path / folder / "train" / place).mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "leftImg8bit" / "train" / place / f"{name}_leftImg8bit.png")
        labels = tmp_path / "gtFine" / "train" / place
        cv2.imwrite(str(labels / f"{name}_gtFine_instanceIds.png"), ids.astype(np.uint16))
        cv2.imwrite(str(labels / f"{name}_gtFine_labelIds.png"), (ids % 256).astype(np.uint8))  # never to be read

    write.root = tmp_path
    return write


def _prepare(root, **options):
    options = {
        "images": root / "leftImg8bit" / "train",
        "labels": root / "gtFine" / "train",
        "output": root / "out",
        **options,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    status = cli.main(["cityscapes", "--name", "cityscapes", "--split", "train", "--workers", "1", *words])
    if status:
        return None, {}
    source = ShardSource(str(root / "out"), "cityscapes", "train")
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


def _columns(*values):
    return np.repeat(np.array(values), W // len(values))[None].repeat(H, 0)


def test_instance_ids_are_decoded_like_the_official_scripts(city):
    ids = np.kron(
        np.random.default_rng(1).choice([0, 3, 7, 23, 24, 26, 29, 24000, 24001, 26000, 26017, 29001, 33005], (6, 15)),
        np.ones((4, 4)),
    )
    city("aachen_000000_000019", ids)
    info, records = _prepare(city.root)
    assert (
        [c.name for c in info.classes] == NAMES
        and [c.name for c in info.classes if not c.is_region] == NAMES[11:]
        and info.exhaustive
    )
    record = records["aachen/aachen_000000_000019"]
    path = city.root / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_instanceIds.png"
    truth, void = {}, np.zeros((H, W), bool)
    for (y, x), value in np.ndenumerate(np.array(Image.open(path))):
        label = int(value) if value < 1000 else int(value) // 1000
        if label not in IDS:
            void[y, x] = True
            continue
        mask = truth.setdefault((IDS.index(label), label >= 24 and value < 1000, int(value)), np.zeros((H, W), bool))
        mask[y, x] = True
    assert len(truth) == len(record.segments) and record.decode_image().shape == (H, W, 3)
    found = {(s.class_id, s.crowd, record.decode_mask(s.mask).tobytes()) for s in record.segments}
    assert found == {(c, crowd, mask.tobytes()) for (c, crowd, _), mask in truth.items()}
    np.testing.assert_array_equal(record.decode_mask(record.ignore), void)


def test_boxes_match_masks_and_no_ignore_mask_without_void_pixels(city):
    city("bonn_1_2", _columns(7, 26001, 7, 26002, 26))
    (record,) = _prepare(city.root)[1].values()
    assert record.ignore is None
    assert [(s.class_id, s.crowd, s.box) for s in record.segments] == [
        (0, False, (0, 0, 36, H)),
        (13, True, (48, 0, 60, H)),
        (13, False, (12, 0, 24, H)),
        (13, False, (36, 0, 48, H)),
    ]


def test_broken_images_and_masks_are_counted_and_named(city, capsys):
    for name in ("good_1_2", "cut_1_2", "large_1_2", "alone_1_2", "ghost_1_2", "strange_1_2", "void_1_2"):
        city(name, _columns(7, 26001, 26002), (H + 1, W) if name.startswith("large") else (H, W))
    labels = city.root / "gtFine" / "train"
    cut = labels / "cut" / "cut_1_2_gtFine_instanceIds.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    (labels / "alone" / "alone_1_2_gtFine_instanceIds.png").unlink()
    (city.root / "leftImg8bit" / "train" / "ghost" / "ghost_1_2_leftImg8bit.png").unlink()
    city("strange_1_2", _columns(7, 77, 34000))
    city("void_1_2", _columns(0, 4, 29001))
    _, records = _prepare(city.root)
    assert sorted(records) == ["good/good_1_2", "strange/strange_1_2"]
    np.testing.assert_array_equal(
        records["strange/strange_1_2"].decode_mask(records["strange/strange_1_2"].ignore), _columns(0, 1, 1) > 0
    )
    table = capsys.readouterr().out
    for line in (
        "2 images kept, 4 dropped",
        f"image: no mask with its name in {labels} (alone/alone_1_2)",
        f"mask in {labels}: no image with its name (ghost/ghost_1_2)",
        "image: mask file is truncated (cut/cut_1_2)",
        "image: mask size differs from its image (large/large_1_2)",
        "image: has nothing labeled (void/void_1_2)",
        "segment: mask value 77 has no class (strange/strange_1_2)",
        "segment: mask value 34000 has no class (strange/strange_1_2)",
    ):
        assert line in table


def test_wrong_labels_folder_is_a_one_line_error(city, capsys):
    city("good_1_2", _columns(7, 26001, 26002))
    for labels, said in (
        (city.root / "gone", "gone: no such folder"),
        (city.root / "leftImg8bit", "no mask *_gtFine_instanceIds.png"),
    ):
        assert _prepare(city.root, labels=labels)[0] is None
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error
