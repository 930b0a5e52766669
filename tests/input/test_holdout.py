"""What is evaluated on is not trained on."""

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mqformer_jax.input.holdout import exclude_eval_images
from mqformer_jax.input.record import DatasetInfo, origins_path, shard_paths
from mqformer_jax.input.sources import ShardSource


def write_set(root, name, expressions=0, **splits):
    """A data set whose records say nothing but their number; `splits` give the origins of each. expressions: in each
    split.
    """
    folder = root / name
    folder.mkdir()
    for split, origins in splits.items():
        (path,) = shard_paths(str(folder), split, 1)
        writer = ArrayRecordWriter(path, "group_size:1")
        for i in range(len(origins)):
            writer.write(f"{name} {split} {i}".encode())
        writer.close()
        if any(origins):
            with open(origins_path(str(folder), split), "w") as f:
                f.writelines(f"{origin}\n" for origin in origins)
    counts = {split: len(origins) for split, origins in splits.items()}
    DatasetInfo(name, (), counts, expressions={} if expressions is None else dict.fromkeys(splits, expressions)).save(
        str(folder)
    )


def entry(name, split="train"):
    return {"name": name, "split": split, "tasks": ()}


@pytest.fixture
def root(tmp_path):
    write_set(tmp_path, "coco", train=["coco/1", "coco/2", "coco/3", "coco/4", "coco/5"], val=["coco/9"])
    write_set(tmp_path, "lvis", train=["coco/9", "coco/4", "", "coco/7"])
    write_set(tmp_path, "camvid", train=["", ""])
    write_set(tmp_path, "refcoco", 9, train=["coco/5"], val=["coco/2", "coco/4"], testA=["coco/2", "coco/7"])
    return tmp_path


def read(root, mixture, eval_sets=()):
    sources, lines = exclude_eval_images(
        [ShardSource(str(root), e["name"], e["split"]) for e in mixture], str(root), eval_sets
    )
    return [[int(source[i].split()[-1]) for i in range(len(source))] for source in sources], lines


def test_images_of_the_val_and_test_splits_of_expressions_leave_every_training_source(root):
    kept, lines = read(root, [entry("coco"), entry("lvis"), entry("camvid"), entry("refcoco")])
    assert kept == [[0, 2, 4], [0, 2], [0, 1], [0]]
    assert lines[:2] == [
        "data.leak_guard: 2 of 5 images of coco/train are left out; they belong to refcoco/testA, refcoco/val",
        "data.leak_guard: 2 of 4 images of lvis/train are left out; they belong to refcoco/testA, refcoco/val",
    ]


def test_whatever_the_config_evaluates_on_leaves_too(root):
    kept, lines = read(root, [entry("lvis")], [entry("coco", "val")])
    assert kept == [[2]]
    assert "3 of 4 images of lvis/train are left out; they belong to coco/val, refcoco/testA, refcoco/val" in lines[0]


def test_a_split_that_is_trained_on_by_intent_stays(root):
    assert read(root, [entry("refcoco", "val")], [entry("refcoco", "val")])[0] == [[1]], "the other one is in testA"


def test_a_val_split_without_expressions_is_no_reason_to_leave_anything_out(tmp_path):
    write_set(tmp_path, "coco", train=["coco/1", "coco/2"])
    write_set(tmp_path, "mine", val=["coco/2"])
    assert read(tmp_path, [entry("coco")])[0] == [[0, 1]]


def test_what_cannot_be_known_is_said(root):
    write_set(root, "old", None, train=["", ""])
    _, lines = read(root, [entry("coco"), entry("old"), entry("camvid")])
    assert "evaluation images in old/train cannot be recognized" in lines[-1] and "prepare them again" in lines[-1]


def test_what_is_trained_on_and_evaluated_on_is_said(root):
    _, lines = read(root, [entry("coco")], [entry("coco")])
    assert "data.leak_guard: coco/train is used for training and for evaluation; its images are kept" in lines


def test_a_broken_neighbor_is_one_line_and_its_shards_are_not_touched(root):
    (root / "refcoco" / "testA-00000-of-00001.array_record").write_bytes(b"cut")
    assert read(root, [entry("coco")])[0] == [[0, 2, 4]]
    (root / "camvid" / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="camvid/dataset.json cannot be read"):
        read(root, [entry("coco")])


def test_nothing_left_is_one_line(root):
    write_set(root, "wrong", train=["coco/2"])
    with pytest.raises(
        ValueError, match="^data.mixture: all 1 images of wrong/train are evaluation images of .*Check the split"
    ):
        read(root, [entry("wrong")])


def test_a_set_that_is_evaluated_at_the_end_must_be_there_at_the_start(root):
    with pytest.raises(FileNotFoundError, match="data set 'flickr' split 'val' is not in"):
        read(root, [entry("coco")], [entry("flickr", "val")])


def test_training_on_coco_without_the_expressions_is_said(tmp_path):
    write_set(tmp_path, "coco", train=["coco/1"])
    kept, lines = read(tmp_path, [entry("coco")])
    assert kept == [[0]] and "has no val or test split of RefCOCO/+/g; " in lines[0]
    write_set(tmp_path, "camvid", train=[""])
    assert read(tmp_path, [entry("camvid")]) == ([[0]], [])


def test_a_list_of_origins_that_does_not_fit_its_records_is_one_line(root):
    with open(origins_path(str(root / "coco"), "train"), "a") as f:
        f.write("coco/6\n")
    with pytest.raises(ValueError, match="coco/train.origins.txt has 6 lines for 5 records: prepare the split again"):
        read(root, [entry("coco")])
