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


def test_referring_val_and_test_images_are_excluded_from_training(root):
    kept, lines = read(root, [entry("coco"), entry("lvis"), entry("camvid"), entry("refcoco")])
    assert kept == [[0, 2, 4], [0, 2], [0, 1], [0]]
    assert lines[:2] == [
        "data.leak_guard: 2 of 5 images of coco/train are left out; they belong to refcoco/testA, refcoco/val",
        "data.leak_guard: 2 of 4 images of lvis/train are left out; they belong to refcoco/testA, refcoco/val",
    ]


def test_images_of_configured_evaluation_sets_are_excluded(root):
    kept, lines = read(root, [entry("lvis")], [entry("coco", "val")])
    assert kept == [[2]]
    assert "3 of 4 images of lvis/train are left out; they belong to coco/val, refcoco/testA, refcoco/val" in lines[0]


def test_split_used_for_both_training_and_evaluation_is_kept(root):
    assert read(root, [entry("refcoco", "val")], [entry("refcoco", "val")])[0] == [[1]], "the other one is in testA"


def test_val_split_without_referring_expressions_excludes_nothing(tmp_path):
    write_set(tmp_path, "coco", train=["coco/1", "coco/2"])
    write_set(tmp_path, "mine", val=["coco/2"])
    assert read(tmp_path, [entry("coco")])[0] == [[0, 1]]


def test_data_set_without_image_origins_is_reported(root):
    write_set(root, "old", None, train=["", ""])
    _, lines = read(root, [entry("coco"), entry("old"), entry("camvid")])
    assert "evaluation images in old/train cannot be recognized" in lines[-1] and "prepare them again" in lines[-1]


def test_split_used_for_both_training_and_evaluation_is_reported(root):
    _, lines = read(root, [entry("coco")], [entry("coco")])
    assert "data.leak_guard: coco/train is used for training and for evaluation; its images are kept" in lines


def test_other_data_sets_need_a_valid_dataset_json_but_not_valid_shards(root):
    (root / "refcoco" / "testA-00000-of-00001.array_record").write_bytes(b"cut")
    assert read(root, [entry("coco")])[0] == [[0, 2, 4]]
    (root / "camvid" / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="camvid/dataset.json cannot be read"):
        read(root, [entry("coco")])


def test_source_with_only_evaluation_images_is_rejected(root):
    write_set(root, "wrong", train=["coco/2"])
    with pytest.raises(
        ValueError, match="^data.mixture: all 1 images of wrong/train are evaluation images of .*Check the split"
    ):
        read(root, [entry("wrong")])


def test_missing_evaluation_set_is_an_error_at_the_start(root):
    with pytest.raises(FileNotFoundError, match="data set 'flickr' split 'val' is not in"):
        read(root, [entry("coco")], [entry("flickr", "val")])


def test_training_on_coco_without_refcoco_splits_is_reported(tmp_path):
    write_set(tmp_path, "coco", train=["coco/1"])
    kept, lines = read(tmp_path, [entry("coco")])
    assert kept == [[0]] and "has no val or test split of RefCOCO/+/g; " in lines[0]
    write_set(tmp_path, "camvid", train=[""])
    assert read(tmp_path, [entry("camvid")]) == ([[0]], [])


def test_origins_file_with_wrong_line_count_is_rejected(root):
    with open(origins_path(str(root / "coco"), "train"), "a") as f:
        f.write("coco/6\n")
    with pytest.raises(ValueError, match="coco/train.origins.txt has 6 lines for 5 records: prepare the split again"):
        read(root, [entry("coco")])
