"""ShardSource: what it reads is what was written, and whatever is missing or damaged is said in one line."""

from __future__ import annotations

import os
import pickle

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mqformer_jax.input.record import BadRecord, ClassInfo, DatasetInfo, shard_paths
from mqformer_jax.input.sources import ShardSource


@pytest.fixture
def root(tmp_path):
    """A set `toy` with 5 records in two shards."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for shard, path in enumerate(shard_paths(str(folder), "train", 2)):
        writer = ArrayRecordWriter(path, "group_size:1")
        for i in range(3 - shard):
            writer.write(f"record {3 * shard + i}".encode() + os.urandom(30_000))
        writer.close()
    DatasetInfo("toy", (ClassInfo(("cat",)),), {"train": 5}, source="semantic").save(str(folder))
    return str(tmp_path)


def _shards(root):
    return shard_paths(os.path.join(root, "toy"), "train", 2)


def _complaint(error, call):
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_records_are_read_in_order_across_shards(root):
    source = ShardSource(root, "toy", "train")
    assert len(source) == 5 and source.info.classes[0].name == "cat"
    assert [source[i][:8] for i in range(5)] == [f"record {i}".encode() for i in range(5)]


def test_out_of_range_index_raises_index_error(root):
    source = ShardSource(root, "toy", "train")
    for index in (5, -1):
        with pytest.raises(IndexError):
            source[index]


def test_source_survives_pickling(root):
    source = ShardSource(root, "toy", "train")
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[4] == source[4] and len(copy) == 5


def test_grain_reads_a_shard_source(root):
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(ShardSource(root, "toy", "train")).shuffle(seed=0)
    assert sorted(record[:8] for record in dataset) == [f"record {i}".encode() for i in range(5)]


def test_missing_data_set_error_names_the_prepare_command(root):
    assert f"`mqformer prepare public coco_2017_panoptic --output {root}`" in _complaint(
        FileNotFoundError, lambda: ShardSource(root, "coco_2017_panoptic", "train")
    )
    assert f"`mqformer prepare sample --output {root}`" in _complaint(
        FileNotFoundError, lambda: ShardSource(root, "sample_scenes", "train")
    )


def test_missing_split_error_names_the_command_of_the_other_splits(root):
    assert "mqformer prepare semantic --name toy --split val" in _complaint(
        FileNotFoundError, lambda: ShardSource(root, "toy", "val")
    )


def test_missing_split_of_a_custom_data_set_error_refers_to_its_script(root):
    folder = os.path.join(root, "toy")
    DatasetInfo("toy", (), {"train": 5}, source="script").save(folder)
    told = _complaint(FileNotFoundError, lambda: ShardSource(root, "toy", "val"))
    assert "run the script that prepares this data set" in told


def test_missing_shard_error_names_the_file(root):
    os.remove(_shards(root)[0])
    assert "00000-of-00002.array_record is missing" in _complaint(ValueError, lambda: ShardSource(root, "toy", "train"))


def test_missing_shard_of_a_synthesized_split_error_suggests_synthesize(root):
    folder = os.path.join(root, "toy")
    DatasetInfo("toy", (), {"train": 5}, source="synthesize", made_from="boxes").save(folder)
    os.remove(_shards(root)[0])
    told = _complaint(ValueError, lambda: ShardSource(root, "toy", "train"))
    assert told.endswith("is missing: prepare the split again with `mqformer synthesize`")


@pytest.mark.parametrize("keep", [0, 10_000, 70_000])
def test_truncated_shard_error_names_the_file(root, keep):
    with open(_shards(root)[1], "r+b") as f:
        f.truncate(keep)
    assert "00001-of-00002.array_record is damaged" in _complaint(ValueError, lambda: ShardSource(root, "toy", "train"))


def test_wrong_record_count_is_an_error(root):
    DatasetInfo("toy", (), {"train": 6}).save(os.path.join(root, "toy"))
    assert "hold 5 records, but dataset.json lists 6" in _complaint(
        ValueError, lambda: ShardSource(root, "toy", "train")
    )


def test_shards_of_two_preparations_are_an_error(root):
    os.link(_shards(root)[0], shard_paths(os.path.join(root, "toy"), "train", 1)[0])
    assert "more than one preparation" in _complaint(ValueError, lambda: ShardSource(root, "toy", "train"))


def test_broken_dataset_json_is_an_error(root):
    with open(os.path.join(root, "toy", "dataset.json"), "w") as f:
        f.write("{")
    assert "dataset.json cannot be read" in _complaint(ValueError, lambda: ShardSource(root, "toy", "train"))


def test_damaged_record_raises_bad_record_and_others_stay_readable(root):
    with open(_shards(root)[0], "r+b") as f:
        f.seek(45_000)  # in the second record
        f.write(os.urandom(64))
    source = ShardSource(root, "toy", "train")
    assert "record 1 is damaged" in _complaint(BadRecord, lambda: source[1])
    assert source[0].startswith(b"record 0") and source[2].startswith(b"record 2")
