from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import types

import cv2
import ml_collections
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mqformer_jax.input import mixture
from mqformer_jax.input.mixture import MAX_IN_A_ROW, Loader, make_loader
from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, Segment, encode_rle, origins_path, shard_paths

SIZE = 16


def tokenizer(texts):
    return np.array([[len(t), ord(t[0]) if t else 0] for t in texts], np.int32)


def make_record(number):
    """A record that the batch can be recognized by: the red of every pixel is its number."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[..., 2] = number
    mask = np.zeros((SIZE, SIZE), bool)
    mask[2:9, 3:12] = True
    return Record(
        str(number), cv2.imencode(".png", image)[1].tobytes(), SIZE, SIZE, (Segment(class_id=0, mask=encode_rle(mask)),)
    )


def source(name, size, first=0, bad=()):
    records = [b"\xc1 no record" if i in bad else make_record(first + i).to_bytes() for i in range(size)]
    info = DatasetInfo(name, (ClassInfo(("cat",)), ClassInfo(("dog",))), {"train": size})

    class Fake(list):
        pass

    fake = Fake(records)
    fake.info, fake.name, fake.split = info, name, "train"
    return fake


def config(mixture, batch_size=4, seed=0, root="", **data):
    fields = dict(
        root=root, mixture=[dict(tasks=("panoptic",), split="train") | entry for entry in mixture],
        size_exponent=0.5, canvas=(SIZE, SIZE), max_targets=2, max_prompts=3, lattice_stride=4, scale_range=(1.0, 1.0),
        flip=0.0, color_jitter=0.0, templates=("{}",), workers=0, threads=0, leak_guard=True, max_corrupt_fraction=0.5,
    )  # fmt: skip
    return ml_collections.ConfigDict(dict(batch_size=batch_size, seed=seed, data=fields | data, eval=dict(sets=())))


def two(**kwargs):
    mixture = [dict(name="a", tasks=("instance",)), dict(name="b", weight=8.0)]
    return Loader([source("a", 16), source("b", 7, first=100)], config(mixture, **kwargs), tokenizer)


def numbers(batch):
    return batch.image[:, 0, 0, 0].tolist()


def take(loader, n, **where):
    return list(itertools.islice(loader.batches(**where), n))


def assert_same(a, b):
    for name, value in vars(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def test_stream_resumes_identically_from_any_step():
    options = dict(scale_range=(0.5, 2.0), flip=0.5, color_jitter=0.2)
    whole = take(two(**options), 12)
    for step in (1, 5, 11):
        for after, batch in zip(whole[step:], take(two(**options), 12 - step, start_step=step)):
            assert_same(after, batch)


def test_threads_do_not_change_the_stream():
    for a, b in zip(take(two(flip=0.5), 6), take(two(flip=0.5, threads=3), 6)):
        assert_same(a, b)


def test_different_seeds_give_different_streams():
    assert [numbers(b) for b in take(two(), 4)] != [numbers(b) for b in take(two(seed=1), 4)]


def test_hosts_share_the_global_batch_without_overlap():
    whole = take(two(flip=0.5), 8)
    hosts = [take(two(flip=0.5), 8, host=h, num_hosts=2) for h in range(2)]
    for step, batch in enumerate(whole):
        assert_same(
            batch, types.SimpleNamespace(**{k: np.concatenate([vars(h[step])[k] for h in hosts]) for k in vars(batch)})
        )


def test_every_host_sees_every_data_set():
    mixture = [dict(name="a", weight=1.0), dict(name="b", weight=1.0)]
    loader = Loader([source("a", 9), source("b", 9)], config(mixture, batch_size=2), tokenizer)
    for host in range(2):
        seen = [int(b.source[0]) for b in take(loader, 20, host=host, num_hosts=2)]
        assert 4 <= sum(seen) <= 16, "the mixture's period is the global batch, one row a host"


def test_each_epoch_visits_every_image_once_in_a_new_order():
    loader = Loader([source("a", 16)], config([dict(name="a")]), tokenizer)
    order = [n for batch in take(loader, 8) for n in numbers(batch)]
    assert sorted(order[:16]) == sorted(order[16:]) == list(range(16)) and order[:16] != order[16:]


def test_image_augmentation_differs_between_epochs():
    loader = Loader([source("a", 2)], config([dict(name="a")], scale_range=(0.2, 1.0), batch_size=2), tokenizer)
    sizes = [(n, h) for batch in take(loader, 10) for n, (h, _) in zip(numbers(batch), batch.size.tolist())]
    for number in (0, 1):
        assert len({h for n, h in sizes if n == number}) > 4, "ten epochs draw ten scales between 3 and 16 pixels"


def test_data_sets_are_sampled_in_proportion_to_their_weights():
    sources = np.concatenate([b.source for b in take(two(), 30)])
    assert abs((sources == 0).mean() - 4 / 12) < 0.02, "16^0.5 against 8"


@pytest.fixture(scope="module")
def whole_stream(sample_root):
    return streams(sample_root, dict(workers=0, start_step=0, host=0, num_hosts=1, count=6))[0][0]


def streams(root, *wanted):
    """What `streams.py` prints of these streams."""
    script = pathlib.Path(__file__).parent / "streams.py"
    done = subprocess.run([sys.executable, str(script), root, json.dumps(wanted)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_stream_is_independent_of_host_and_worker_counts_and_resumable(sample_root, whole_stream, workers):
    """A run on one host, taken up at step 3 by the second host of two, or at step 4 by any host of four."""
    places = {
        0: [dict(start_step=4, host=host, num_hosts=4, count=2) for host in range(4)]
        + [dict(start_step=2, host=0, num_hosts=1, count=4)],
        2: [dict(start_step=0, host=0, num_hosts=1, count=4), dict(start_step=4, host=2, num_hosts=4, count=2)],
        4: [dict(start_step=3, host=1, num_hosts=2, count=3)],
    }[workers]
    for place, (found, _) in zip(places, streams(sample_root, *(dict(workers=workers) | place for place in places))):
        start, host, rows = place["start_step"], place["host"], 4 // place["num_hosts"]
        assert found == [
            step[host * rows : (host + 1) * rows] for step in whole_stream[start : start + place["count"]]
        ], place


def broken():
    """Eight records, of which the third is none and the fourth's image is cut."""
    cut = make_record(3)
    records = source("a", 8, bad=(2,))
    records[3] = Record(cut.key, cut.image[:-30], SIZE, SIZE, cut.segments).to_bytes()
    return records


def test_unusable_records_are_replaced_logged_once_and_counted(caplog):
    loader = Loader([broken()], config([dict(name="a")]), tokenizer)
    with caplog.at_level("WARNING", logger="absl"):
        seen = [n for batch in take(loader, 6) for n in numbers(batch)]
    assert set(seen) == {0, 1, 4, 5, 6, 7} and seen.count(4) == 9, "the next usable record takes the place of 2 and 3"
    assert loader.bad == {"a/train": 2}
    assert sorted(r.getMessage()[:29] for r in caplog.records) == [
        "a/train: record 2 is left out",
        "a/train: record 3 is left out",
    ]


def test_too_many_unusable_records_raise_an_error(monkeypatch):
    loader = Loader([broken()], config([dict(name="a")], max_corrupt_fraction=0.2), tokenizer)
    message = "a/train: 2 of 8 records are unusable, more than data.max_corrupt_fraction = 0.2; prepare"
    with pytest.raises(ValueError, match=message):
        take(loader, 6)
    one_bad = Loader([source("a", 8, bad=(2,))], config([dict(name="a")], max_corrupt_fraction=0.0), tokenizer)
    assert len(take(one_bad, 6)) == 6, "one corrupt file ends no run of days"
    monkeypatch.setattr(mixture, "MIN_RECORDS", 8)
    half = Loader(
        [source("a", 250, bad=range(0, 250, 2))], config([dict(name="a")], max_corrupt_fraction=0.1), tokenizer
    )
    with pytest.raises(ValueError, match=r"a/train: \d+ of (8|1\d) records"):
        take(half, 60)  # long before a tenth of the whole set was found to be bad


def test_duplicate_data_set_entries_count_bad_records_separately():
    both = [broken(), source("a", 8)]
    loader = Loader(both, config([dict(name="a"), dict(name="a", tasks=("instance",))]), tokenizer)
    take(loader, 8)
    assert loader.bad == {"a/train (1)": 2, "a/train (2)": 0}


def test_images_with_expressions_are_not_cropped():
    record = make_record(7)
    said = dataclasses.replace(record, segments=(dataclasses.replace(record.segments[0], texts=("the thing on top",)),))
    for tasks, whole in ((("referring",), True), (("instance", "referring"), True), (("instance",), False)):
        fake = source("a", 1)
        fake[0] = said.to_bytes()
        loader = Loader([fake], config([dict(name="a", tasks=tasks)], scale_range=(2.0, 2.0), batch_size=1), tokenizer)
        (box,) = next(loader.batches()).boxes[0, :1]
        assert (box[2:] == np.array([9, 7]) / SIZE).all() == whole, tasks


def test_prompt_templates_are_applied_to_class_names():
    loader = Loader([source("a", 4)], config([dict(name="a")], templates=("a photo of a {}.",)), tokenizer)
    _, notes = next(loader.stream())
    assert set(notes[0].texts) == {"a photo of a cat.", "a photo of a dog."} and notes[0].key.startswith("a/")


def test_color_jitter_is_applied_and_augmentation_differs_per_data_set():
    plain, colored = (next(two(color_jitter=j).batches()).image for j in (0.0, 0.5))
    assert (plain != colored).any()
    twins = Loader(
        [source("a", 4), source("a", 4)],
        config([dict(name="a"), dict(name="a")], flip=0.5, scale_range=(0.3, 1.0)),
        tokenizer,
    )
    seen = {0: [], 1: []}
    for batch in take(twins, 12):
        for row, number in enumerate(batch.source.tolist()):
            seen[number].append(batch.size[row].tolist())
    assert seen[0][:8] != seen[1][:8]


@pytest.mark.process
def test_worker_processes_report_unusable_records(sample_root, tmp_path):
    root = tmp_path / "records"
    shutil.copytree(sample_root, root)
    path = root / "sample_boxes"
    write_set(path.parent, 6, name="sample_boxes", bad=(1,))
    (_, bad) = streams(str(root), dict(workers=2, start_step=0, host=0, num_hosts=1, count=10))[0]
    assert bad == {"sample_scenes/train": 0, "sample_boxes/train": 1}


def test_classes_with_identical_tokens_are_warned_about(caplog):
    with caplog.at_level("WARNING", logger="absl"):
        Loader([source("a", 8)], config([dict(name="a")]), lambda texts: np.ones((len(texts), 2), np.int32))
    assert [r.getMessage() for r in caplog.records] == [
        "a: the classes 'cat' and 'dog' tokenize identically; rename one of them or, with the tokenizer 'words', raise "
        "config.model.text.vocab_size."
    ]


def test_too_many_consecutive_unusable_records_raise_an_error():
    loader = Loader([source("a", 70, bad=range(70))], config([dict(name="a")]), tokenizer)
    with pytest.raises(ValueError, match=f"a/train: {MAX_IN_A_ROW} records in a row are unusable; prepare"):
        next(loader.batches())


def test_checkpoint_state_of_a_different_mixture_is_rejected():
    state = json.loads(json.dumps(two().state(7)))
    assert state["step"] == 7
    two().check_state(state)
    with pytest.raises(ValueError, match="^batch_size: the checkpoint was saved with 4, but the config has 8"):
        two(batch_size=8).check_state(state)
    other = Loader([source("a", 16)], config([dict(name="a")]), tokenizer)
    with pytest.raises(ValueError, match="^mixture: "):
        other.check_state(state)


def test_invalid_weight_and_batch_size_are_rejected():
    with pytest.raises(ValueError, match="data.mixture: a has weight -1"):
        Loader([source("a", 4)], config([dict(name="a", weight=-1)]), tokenizer)
    with pytest.raises(ValueError, match="batch_size: 4 is not divisible by 3 hosts"):
        two().batches(num_hosts=3)


def write_set(root, size, name="toy", bad=()):
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (path,) = shard_paths(str(folder), "train", 1)
    writer = ArrayRecordWriter(path, "group_size:1")
    for i in range(size):
        writer.write(b"no record" if i in bad else make_record(i).to_bytes())
    writer.close()
    DatasetInfo(name, (ClassInfo(("cat",)), ClassInfo(("dog",))), {"train": size}).save(str(folder))


def test_make_loader_reads_prepared_shards(tmp_path):
    write_set(tmp_path, 6)
    loader = make_loader(config([dict(name="toy")], root=str(tmp_path), batch_size=6), tokenizer)
    (batch,) = take(loader, 1)
    assert sorted(numbers(batch)) == list(range(6)) and batch.num_targets.tolist() == [1] * 6
    assert batch.prompt_valid.sum(1).tolist() == [2] * 6 and batch.has_mask[:, 0].all()


def test_leak_guard_excludes_evaluation_images_unless_disabled(tmp_path):
    write_set(tmp_path, 6)
    write_set(tmp_path, 3, name="evaluated")
    for name, origins in (("toy", range(6)), ("evaluated", (1, 2, 40))):
        with open(origins_path(str(tmp_path / name), "train"), "w") as f:
            f.writelines(f"coco/{i}\n" for i in origins)
    wanted = config([dict(name="toy")], root=str(tmp_path), batch_size=4)
    wanted.eval.sets = (dict(name="evaluated", split="train", tasks=()),)
    loader = make_loader(wanted, tokenizer)
    assert {n for batch in take(loader, 6) for n in numbers(batch)} == {0, 3, 4, 5}
    assert "2 of 6 images of toy/train are left out; they belong to evaluated/train" in loader.report[1]
    wanted.data.leak_guard = False
    assert {n for batch in take(make_loader(wanted, tokenizer), 6) for n in numbers(batch)} == set(range(6))
