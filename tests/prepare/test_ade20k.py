"""Semantic and instance PNGs in ADE20K's official folders become records. A per-pixel decoding is the reference."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli

H, W = 24, 40
WALL, BED, WINDOW, PERSON = 1, 8, 9, 13
# From the challenge's categoryMapping.txt: instance categories 1 to 100 have these classes, in order; Mask2Former's
# "isthing" agrees.
RUNS = "8-9 11 13 15-16 19-21 23-25 28 31-34 36-40 42-46 48 50-51 54 56-59 63 65-68 70-77 79 81-84 86-91 93-94 96 98-99"
RUNS += " 103-105 108-109 111-113 116-117 119-122 124-128 130-131 133-140 143-145 147-150"
MAPPING = dict(
    enumerate((v for run in RUNS.split() for v in range(int(run.split("-")[0]), int(run.split("-")[-1]) + 1)), 1)
)


@pytest.fixture
def ade(tmp_path):
    """Writes one image, its semantic map and its instance map into the official folders."""
    folders = {name: tmp_path / name / "training" for name in ("images", "annotations", "annotations_instance")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    lines = [
        f"{i}\t0.1\t9\t1\t{name}"
        for i, name in enumerate(["wall", *(f"class {i}, other {i}" for i in range(2, 151))], 1)
    ]
    lines[65], lines[110] = "66\t0.1\t9\t1\ttoilet, can, stool", "111\t0.1\t9\t1\tstool"
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]))

    def write(
        name: str, semantic: np.ndarray, category: np.ndarray, number: np.ndarray, size: tuple[int, int] = (H, W)
    ) -> None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(
            folders["images"] / f"{name}.jpg"
        )
        Image.fromarray(semantic.astype(np.uint8)).save(folders["annotations"] / f"{name}.png")
        rgb = np.stack([category, number, np.zeros_like(number)], -1).astype(np.uint8)
        Image.fromarray(rgb).save(folders["annotations_instance"] / f"{name}.png")

    write.root, write.folders = tmp_path, folders
    return write


def _prepare(ade, **options):
    images, semantic, instances = ade.folders.values()
    options = {
        "images": images,
        "semantic": semantic,
        "instances": instances,
        "classes": ade.root / "objectInfo150.txt",
        **options,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    if cli.main(
        ["ade20k", "--name", "ade", "--split", "train", "--output", str(ade.root / "out"), "--workers", "1", *words]
    ):
        return None, {}
    source = ShardSource(str(ade.root / "out"), "ade", "train")
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


def _rows(*values):
    return np.repeat(values, H // len(values))[:, None].repeat(W, 1)


def test_things_use_the_instance_map_stuff_and_crowds_the_semantic_map(ade):
    rng = np.random.default_rng(3)
    semantic, number = (
        np.kron(rng.choice(values, (6, 10)), np.ones((4, 4), int))
        for values in ([0, WALL, 3, BED, PERSON], [0, 0, 1, 2, 7, 255])
    )
    category = np.select([number == n for n in (1, 2, 7, 255)], [1, 4, 100, 1])  # two beds, a person, a flag
    ade("ADE_train_00000001", semantic, category, number)
    info, records = _prepare(ade)
    record = records["ADE_train_00000001"]
    truth, void = {}, np.zeros((H, W), bool)
    for (y, x), value in np.ndenumerate(semantic):
        if number[y, x]:
            owner = (MAPPING[category[y, x]] - 1, False, int(number[y, x]))
        elif value:
            owner = (int(value) - 1, value in MAPPING.values(), None)
        else:
            void[y, x] = True
            continue
        truth.setdefault(owner, np.zeros((H, W), bool))[y, x] = True
    found = {(s.class_id, s.crowd, record.decode_mask(s.mask).tobytes()) for s in record.segments}
    assert (
        found == {(c, crowd, mask.tobytes()) for (c, crowd, _), mask in truth.items()}
        and len(record.segments) == len(truth) == 8
    )
    np.testing.assert_array_equal(record.decode_mask(record.ignore), void)
    assert info.exhaustive and len(info.classes) == 150 and sum(not c.is_region for c in info.classes) == 100


def test_instance_categories_match_the_official_class_mapping():
    from mqformer_jax.prepare.datasets.ade20k import STUFF, THINGS

    assert dict(enumerate(THINGS, 1)) == MAPPING and len(MAPPING) == 100
    assert sorted(STUFF + THINGS) == list(range(1, 151))


def test_synonym_shared_by_two_classes_is_dropped(ade):
    ade("a", _rows(1, 2), _rows(0, 0), _rows(0, 0))
    info, _ = _prepare(ade)
    assert [info.classes[i].texts for i in (0, 1, 65, 110)] == [
        ("wall",),
        ("class 2", "other 2"),
        ("toilet", "can"),
        ("stool",),
    ]


def test_broken_images_and_masks_are_counted_and_named(ade, capsys):
    nothing = _rows(0, 0, 0, 0)
    semantic = _rows(WALL, BED, BED, 151)
    for name in ("good", "cut", "bare", "ghost", "gray", "narrow"):
        ade(name, semantic, _rows(0, 1, 4, 0), _rows(0, 5, 6, 0))
    ade("large", semantic, nothing, nothing, (H, W + 2))
    ade("torn", semantic, np.triu(_rows(1, 1, 1, 101)), np.triu(_rows(7, 7, 7, 8)))
    ade("void", nothing, nothing, nothing)
    images, maps, instances = ade.folders.values()
    (maps / "cut.png").write_bytes((maps / "cut.png").read_bytes()[:-9])
    (instances / "bare.png").unlink()
    (images / "ghost.jpg").unlink()
    Image.fromarray(semantic.astype(np.uint8)).save(instances / "gray.png")  # the semantic map in the wrong folder
    Image.fromarray(np.zeros((H, W - 1, 3), np.uint8)).save(instances / "narrow.png")
    _, records = _prepare(ade)
    assert sorted(records) == ["good", "torn"]
    assert [(s.class_id, s.crowd) for s in records["good"].segments] == [
        (BED - 1, False),
        (PERSON - 1, False),
        (WALL - 1, False),
    ]
    np.testing.assert_array_equal(records["good"].decode_mask(records["good"].ignore), _rows(0, 0, 0, 1) > 0)
    table = capsys.readouterr().out
    for line in (
        "2 images kept, 6 dropped",
        f"image: no mask with its name in {instances} (bare)",
        f"mask in {maps}: no image with its name (ghost)",
        "image: mask file is truncated (cut)",
        "image: mask does not have 3 8-bit channels (gray)",
        "2 x image: mask size differs from its image (large, narrow)",
        "image: has nothing labeled (void)",
        "2 x segment: mask value 151 has no class (good, torn)",
        "segment: instance category 101 does not exist (torn instance 8)",
    ):
        assert line in table


def test_instance_with_two_categories_becomes_a_crowd_from_the_semantic_map(ade, capsys):
    ade("a", _rows(WALL, BED, BED, WALL), _rows(0, 1, 4, 4), _rows(0, 9, 9, 9))
    (record,) = _prepare(ade)[1].values()
    assert "segment: instance with two categories (a instance 9)" in capsys.readouterr().out
    assert [(s.class_id, s.crowd, s.box) for s in record.segments] == [
        (0, False, (0, 0, W, 6)),
        (BED - 1, True, (0, 6, W, 18)),
    ]
    np.testing.assert_array_equal(record.decode_mask(record.ignore), _rows(0, 0, 0, 1) > 0)


def test_wrong_class_list_is_a_one_line_error(ade, capsys):
    ade("a", _rows(1, 2), _rows(0, 0), _rows(0, 0))
    (ade.root / "few.txt").write_text("wall\nbed\n")
    assert _prepare(ade, classes=ade.root / "few.txt")[0] is None
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "few.txt: has 2 classes, with mask values from 0 on; give ADE20K's objectInfo150.txt" in error
    )


def test_real_semantic_maps_keep_every_pixel(ade, real_data):
    """Real images and semantic maps, with an instance map that owns the upper half of everything that is a bed or a
    window.
    """
    source = real_data / "ade20k"
    images, maps, instances = ade.folders.values()
    semantic = {}
    for path in sorted((source / "annotations").glob("*.png")):
        shutil.copy(path, maps)
        shutil.copy(source / "images" / f"{path.stem}.jpg", images)
        values = semantic[path.stem] = np.array(Image.open(path))
        upper = np.arange(len(values))[:, None] < len(values) // 2
        category = np.select([(values == BED) & upper, (values == WINDOW) & upper], [1, 2])
        Image.fromarray(np.stack([category, category * 3, category * 0], -1).astype(np.uint8)).save(
            instances / path.name
        )
    info, records = _prepare(ade, classes=source / "objectInfo150.txt")
    things = {"bed", "person", "windowpane", "flag"}
    assert things <= {c.name for c in info.classes if not c.is_region} and {"wall", "sky"} <= {
        c.name for c in info.classes if c.is_region
    }
    assert records.keys() == semantic.keys()
    for key, record in records.items():
        painted = np.zeros((record.height, record.width), int)
        for segment in record.segments:
            painted += record.decode_mask(segment.mask) * (segment.class_id + 1)
            assert not segment.crowd or not info.classes[segment.class_id].is_region
        np.testing.assert_array_equal(painted, semantic[key])
        np.testing.assert_array_equal(record.decode_mask(record.ignore), semantic[key] == 0)
