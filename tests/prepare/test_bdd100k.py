"""Panoptic PNGs in BDD100K's official folders become records. A per-pixel decoding is the reference."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli

H, W = 18, 40
THINGS = ["person", "rider", "bicycle", "bus", "car", "caravan", "motorcycle", "trailer", "train", "truck"]
ROAD, SKY, PERSON, CAR = 7, 30, 31, 35


@pytest.fixture
def bdd(tmp_path):
    """Writes one image and its bit mask, uint8 [h, w, 4], into the official folders."""
    images, masks = tmp_path / "images" / "10k" / "train", tmp_path / "labels" / "pan_seg" / "bitmasks" / "train"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)

    def write(name: str, bitmask: np.ndarray | None, size: tuple[int, int] = (H, W)) -> None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(images / f"{name}.jpg")
        if bitmask is not None:
            Image.fromarray(bitmask).save(masks / f"{name}.png")

    write.root, write.images, write.masks = tmp_path, images, masks
    return write


def _prepare(bdd, **options):
    options = {"images": bdd.images, "bitmasks": bdd.masks, "output": bdd.root / "out", "workers": 1, **options}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    if cli.main(["bdd100k", "--name", "bdd", "--split", "train", *words]):
        return None, {}
    source = ShardSource(str(bdd.root / "out"), "bdd", "train")
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


def _columns(*pixels):
    """Columns of equal width, each of one (category, attributes, number)."""
    columns = np.array(
        [(category, attributes, number >> 8, number & 255) for category, attributes, number in pixels], np.uint8
    )
    return np.repeat(columns, W // len(pixels), 0)[None].repeat(H, 0)


def test_bitmasks_match_a_per_pixel_reference_decoding(bdd):
    kinds = [(0, 0, 0), (ROAD, 0, ROAD), (SKY, 8, SKY), (SKY, 4, 99), (SKY, 1, SKY)]
    kinds += [(CAR, 4, 31), (CAR, 12, 32), (CAR, 2, 300), (PERSON, 1, 33), (CAR, 0, 556)]
    draw = np.kron(np.random.default_rng(2).integers(0, len(kinds), (6, 10)), np.ones((3, 4), int))
    bdd("b1c66a42-6f7d68ca", np.stack([_columns(kind) for kind in kinds])[draw, 0, 0])
    info, records = _prepare(bdd)
    names = [c.name for c in info.classes]
    assert len(names) == 40 and info.exhaustive and [c.name for c in info.classes if not c.is_region] == THINGS
    some = {2: "ego vehicle", 10: "building", 20: "pole", ROAD: "road", SKY: "sky", PERSON: "person", CAR: "car"}
    assert {i: names[i - 1] for i in some} == some
    record = records["b1c66a42-6f7d68ca"]
    truth, void = {}, np.zeros((H, W), bool)
    for (y, x), kind in np.ndenumerate(draw):
        category, attributes, number = kinds[kind]
        owner = (category - 1, attributes % 4 > 0, number if category > 30 else None)
        (void if category == 0 else truth.setdefault(owner, np.zeros((H, W), bool)))[y, x] = True
    found = {(s.class_id, s.crowd, record.decode_mask(s.mask).tobytes()) for s in record.segments}
    assert (
        found == {(c, crowd, mask.tobytes()) for (c, crowd, _), mask in truth.items()}
        and len(record.segments) == len(truth) == 8
    )
    np.testing.assert_array_equal(record.decode_mask(record.ignore), void)


def test_things_sharing_an_instance_number_become_crowds(bdd, capsys):
    bdd("a", _columns((CAR, 0, 31), (PERSON, 0, 31), (CAR, 0, 32), (SKY, 0, SKY)))
    (record,) = _prepare(bdd)[1].values()
    assert sorted((s.class_id, s.crowd) for s in record.segments) == [(29, False), (30, True), (34, False), (34, True)]
    assert (
        "2 x note: two things with the same number; both become crowds (a region 31, a region 31)"
        in capsys.readouterr().out
    )


def test_broken_images_and_masks_are_counted_and_named(bdd, capsys):
    good = _columns((ROAD, 0, ROAD), (41, 0, 99))
    bdd("good", good)
    bdd("alone", None)
    bdd("cut", good)
    (bdd.masks / "cut.png").write_bytes((bdd.masks / "cut.png").read_bytes()[:-9])
    bdd("large", good, (H, W + 1))
    bdd("gray", good[..., 0])
    bdd("color", good[..., :3].copy())
    bdd("void", _columns((0, 0, 0)))
    bdd("ghost", good)
    (bdd.images / "ghost.jpg").unlink()
    assert list(_prepare(bdd)[1]) == ["good"]
    table = capsys.readouterr().out
    for line in (
        "1 images kept, 6 dropped",
        f"image: no mask with its name in {bdd.masks} (alone)",
        f"mask in {bdd.masks}: no image with its name (ghost)",
        "image: mask file is truncated (cut)",
        "image: mask size differs from its image (large)",
        "2 x image: mask does not have 4 8-bit channels (color, gray)",
        "image: has nothing labeled (void)",
        "segment: category 41 does not exist (good region 99)",
    ):
        assert line in table
