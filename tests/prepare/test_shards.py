"""A preparation that is killed, truncated or out of disk space resumes, and writes the same bytes."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from toy_family import CLASSES, COUNT, SHARDS, Toy, die, interrupt, make, plan, shards

from mqformer_jax.input.record import DatasetInfo, Record, origins_path
from mqformer_jax.input.sources import ShardSource

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FEW_IMAGES", COUNT // SHARDS)
    return Toy(tmp_path)


@pytest.fixture
def whole(toy):
    """What an uninterrupted preparation leaves, and its report."""
    report = toy.prepare()
    result = toy.result()
    assert toy.made().total() == COUNT
    for path in toy.folder.iterdir():
        path.unlink()
    return result, str(report)


def _wait(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


# ---- What is written ------------------------------------------------------------------------------------------------


def test_class_images_are_counted_and_origins_are_listed(toy):
    toy.prepare()
    kept = [i for i in range(COUNT) if i != 5]
    source = ShardSource(str(toy.root / "out"), "toy", "train")
    records = [Record.from_bytes(source[i]) for i in range(len(source))]
    assert [record.key for record in records] == [f"{i:02d}" for i in kept]
    assert source.info.class_images == {"train": (sum(i % 2 == 0 for i in kept), 0, 0)}
    lines = pathlib.Path(origins_path(str(toy.folder), "train")).read_text().splitlines()
    assert lines == [record.origin for record in records] == [f"coco/{i}" if i % 4 else "" for i in kept]


def test_split_without_origins_or_classes_writes_neither(toy):
    toy.prepare()
    plan = toy.plan()
    plan.jobs = [dataclasses.replace(job, origin="") for job in plan.jobs]
    toy.prepare(dataclasses.replace(plan, classes=()))
    assert (
        not os.path.exists(origins_path(str(toy.folder), "train"))
        and DatasetInfo.load(str(toy.folder)).class_images == {}
    )


def test_shard_with_all_images_dropped_is_not_written(toy, monkeypatch):
    monkeypatch.setattr(shards, "FEW_IMAGES", 1)  # a shard an image
    monkeypatch.setattr(shards, "SMALL_SHARDS", COUNT)
    assert toy.prepare().shards == COUNT - 1
    assert len(ShardSource(str(toy.root / "out"), "toy", "train")) == COUNT - 1


@pytest.mark.parametrize(
    ("images", "size", "fewest", "most"),
    [
        (60, 200_000, 2, 2),
        (367, 300_000, 8, 16),
        (5_000, 160_000, 16, 16),
        (118_287, 163_000, 140, 155),
        (100_000, 0, 48, 52),
    ],
)
def test_partition_bounds_the_size_and_number_of_shards(images, size, fewest, most):
    sizes = np.random.default_rng(0).integers(size // 2, size * 3 // 2 + 1, images).tolist()
    runs = shards.partition(range(images), sizes)
    assert [job for run in runs for job in run] == list(range(images))
    assert fewest <= len(runs) <= most
    assert max(sum(sizes[i] for i in run) for run in runs) < shards.SHARD_BYTES * 1.02
    assert max(map(len, runs)) < 1.2 * images / len(runs) + 1


# ---- What goes on --------------------------------------------------------------------------------------------------


def test_killed_preparation_resumes_and_gives_identical_bytes(toy, whole, capfd):
    """SIGKILL to the parent while one worker is in the middle of a shard; its workers end with it."""
    (toy.log / "wait").touch()
    code = f"""if 1:
        import sys, pathlib
        sys.path[:0] = {[str(HERE), str(HERE.parents[1])]}
        import toy_family
        toy_family.shards.FEW_IMAGES = {COUNT // SHARDS}
        toy_family.Toy(pathlib.Path({str(toy.root)!r})).prepare(workers=2)"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    _wait(lambda: len(list(toy.partial.glob("*.json"))) == SHARDS - 1 and list(toy.partial.glob("*.tmp")))
    run.kill()
    run.communicate(timeout=300)  # returns when the last process that holds the pipe is gone
    finished = {path.stem: path.stat().st_ino for path in toy.partial.glob("*.array_record")}
    assert len(finished) == SHARDS - 1 and not (toy.folder / "dataset.json").exists()
    toy.made()
    (toy.log / "wait").unlink()

    report = toy.prepare()
    assert f"toy train: resuming, {SHARDS - 1} of {SHARDS} shards are finished" in capfd.readouterr().err
    assert toy.made() == {f"{i:02d}": 1 for i in (8, 9, 10, 11)}
    assert (toy.result(), str(report)) == whole
    inodes = {path.name[6:11]: path.stat().st_ino for path in toy.folder.glob("*.array_record")}
    assert {number: inodes[number] for number in finished} == finished


def test_kill_while_moving_shards_does_not_redo_finished_ones(toy, whole, monkeypatch):
    replace = os.replace

    def dying(old, new):
        if new.endswith("-00003-of-00006.array_record"):
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        toy.prepare()
    monkeypatch.setattr(os, "replace", replace)
    toy.made()
    assert (str(toy.prepare()), toy.result(), toy.made()) == (whole[1], whole[0], {})


def _another_image(toy):
    (toy.pictures / "00.jpg").write_bytes(bytes(1000))
    return toy.plan()


def _other_labels(toy):
    plan = toy.plan()
    plan.jobs[0].labels = {"of": -1}
    return plan


def _one_less(toy):
    return toy.plan().only(lambda job: job.id != 23)


def _other_classes(toy):
    return dataclasses.replace(toy.plan(), classes=CLASSES[::-1])


@pytest.mark.parametrize(
    "change", [_another_image, _other_labels, _one_less, _other_classes, lambda toy: toy.plan(greeting="hello")]
)
def test_partial_shards_are_discarded_if_the_input_changed(toy, change, capfd):
    with toy.acting(interrupt), pytest.raises(KeyboardInterrupt):
        toy.prepare()
    assert toy.made().total() == 10
    plan = change(toy)
    toy.prepare(plan)
    assert "starting over" in capfd.readouterr().err
    assert toy.made().total() == len(plan.jobs)


def test_changed_mask_files_are_detected(tmp_path):
    def paths():
        mask = str(tmp_path / "mask.png")
        plan = shards.Plan(
            "toy", (), [shards.Job("a", 1, "a.jpg", labels) for labels in (mask, ((mask, []), 3), [mask])], make
        )
        return [[shards._stat(path) for path in shards._files(job)] for job in plan.jobs]

    before = paths()
    (tmp_path / "mask.png").write_bytes(b"1")
    assert [a != b for a, b in zip(before, paths())] == [True, True, False]


# ---- What goes wrong -----------------------------------------------------------------------------------------------


def test_dead_worker_is_a_one_line_error_and_keeps_finished_shards(toy, whole):
    with toy.acting(die), pytest.raises(OSError, match="^a worker process died. .* fewer --workers.*[^\n]$"):
        toy.prepare(workers=2)
    kept = len(list(toy.partial.glob("*.json")))
    toy.made()
    assert 1 <= kept < SHARDS
    assert (str(toy.prepare()), toy.result()) == (whole[1], whole[0])
    assert toy.made().total() == COUNT - kept * (COUNT // SHARDS)


def _sample(out, train, **options):
    """The sample by the command line, in processes of their own."""
    words = ["sample", "--output", out, "--train", train, "--val", 1, "--size", 48, "--workers", 2]
    return subprocess.Popen(
        [sys.executable, "-m", "mqformer_jax", "prepare", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_failed_write_is_a_one_line_error(tmp_path):
    """A file may be 64 KB, which no shard of 32 scenes is."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    run = _sample(tmp_path, 64, preexec_fn=limit)
    said = run.communicate(timeout=300)[1]
    assert run.returncode == 1 and said.count("\n") == 1
    assert said.startswith("mqformer prepare: ") and "train.partial/0000" in said and "File too large" in said
    assert not (tmp_path / "sample_scenes" / "dataset.json").exists()
    assert not list((tmp_path / "sample_scenes" / "train.partial").glob("*.json"))


def test_output_folder_blocked_by_a_file_is_a_one_line_error(toy):
    toy.folder.parent.mkdir()
    toy.folder.write_text("a file where a folder belongs")
    with pytest.raises(OSError, match=f"^[^\n]*{toy.folder}[^\n]*$"):
        toy.prepare()


def test_ctrl_c_stops_at_once_and_reports_that_shards_are_kept(tmp_path):
    """SIGINT to parent and workers, as a terminal sends it. 20,000 scenes would take minutes."""
    run = _sample(tmp_path, 20_000, start_new_session=True)
    partial = tmp_path / "sample_scenes" / "train.partial"
    _wait(lambda: len(list(partial.glob("*.tmp"))) == 2)
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=300)[1]  # a busy machine takes a while to end three processes
    assert run.returncode == 130 and "Traceback" not in said, said
    assert "mqformer prepare: stopped; finished shards are kept. Run the same command to resume.\n" in said
    assert os.listdir(tmp_path / "sample_scenes") == ["train.partial"]


def test_up_to_date_split_is_not_prepared_again(toy, whole, capsys):
    first = str(toy.prepare())
    before = {path: path.stat().st_mtime_ns for path in toy.folder.iterdir()}
    assert len(toy.made()) == COUNT
    assert str(toy.prepare()) == first == whole[1]
    assert not toy.made() and before == {path: path.stat().st_mtime_ns for path in toy.folder.iterdir()}
    assert "toy train: already prepared from these files, nothing to do" in capsys.readouterr().err
    (toy.folder / "train-00001-of-00006.array_record").unlink()
    assert str(toy.prepare()) == first and toy.result() == whole[0], "a shard was lost, so all is made again"


def test_split_locked_by_another_process_is_rejected(toy):
    toy.partial.mkdir(parents=True)
    handle = os.open(toy.partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(
        ValueError, match="^toy train is being prepared by another process, in .*train.partial: wait for it to end$"
    ):
        toy.prepare()
    assert not toy.made() and toy.partial.exists()
    os.close(handle)
    assert toy.prepare().kept == COUNT - 1


def test_lost_origins_file_is_recreated(toy, whole):
    toy.prepare()
    os.remove(origins_path(str(toy.folder), "train"))
    toy.prepare()
    assert toy.result() == whole[0]


def test_unexpected_annotation_error_drops_only_its_image(tmp_path):
    def record(job, image, problems):
        return {}[job.key]

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((2, 2, 3), np.uint8))
    built = plan.build(record, plan.Job("a", 1, str(tmp_path / "a.png"), None))
    assert built.record is None and built.problems.examples == {
        "image: its annotation is malformed": ["a: KeyError: 'a'"]
    }
