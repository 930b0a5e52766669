"""The work on a split: nothing lost, nothing doubled, whoever does it and wherever it is cut."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import threading

import numpy as np
import pytest
from sets import Ellipses, H, W, record, two_boxes, write_set

from mqformer_jax.input.record import DatasetInfo, Record, Segment, encode_rle
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.synthesize.job import Job, is_complete, open_job, synthesize
from mqformer_jax.synthesize.masks import Masks, Quality
from mqformer_jax.synthesize.shard import make_shard


@pytest.fixture
def root(tmp_path):
    write_set(tmp_path, "toy", two_boxes(20))
    return tmp_path


def job_of(root, settings="ellipses", **changes) -> Job:
    return dataclasses.replace(Job(str(root), "toy", "train", "toy_syn_m", settings, batch=2), **changes)


def records_of(root, name="toy_syn_m") -> list[Record]:
    source = ShardSource(str(root), name, "train")
    return [Record.from_bytes(source[i]) for i in range(len(source))]


def test_boxes_get_masks_marked_as_synthetic_and_other_data_is_unchanged(root):
    annotator = Masks(Ellipses(), Quality(min_score=0.85))
    tally = synthesize(job_of(root), annotator)
    made, given = records_of(root), records_of(root, "toy")
    assert [dataclasses.replace(r, segments=()) for r in made] == [dataclasses.replace(r, segments=()) for r in given]
    for new, old in zip(made, given):
        cat, dog = new.segments
        assert dataclasses.replace(cat, mask=None, mask_by="", mask_score=1.0) == old.segments[0]
        assert (cat.mask_by, cat.mask_score) == ("ellipses 1", pytest.approx(0.9)) and dog == old.segments[1]
        x0, y0, x1, y1 = map(int, cat.box)
        mask = new.decode_mask(cat.mask)
        assert mask[y0:y1, x0:x1].mean() == pytest.approx(3.14159 / 4, abs=0.02) and not mask[:, x1:].any()
    assert (tally.boxes, tally.accepted) == ({"cat": 20, "dog": 20}, {"cat": 20}) and tally.reasons == {
        "low score of the teacher": 20
    }
    info = DatasetInfo.load(str(root / "toy_syn_m"))
    assert (info.name, info.splits, info.class_images["train"]) == ("toy_syn_m", {"train": 20}, (20, 20, 0))
    assert (info.source, info.made_from) == ("synthesize", "toy")
    assert (root / "toy_syn_m" / "train.origins.txt").read_text().splitlines() == [r.origin for r in given]
    report = json.loads((root / "toy_syn_m" / "train.report.json").read_text())
    assert report["segments"] == {"mask": 20, "box only": 20, "synthetic mask": 20}
    assert (
        sorted(os.listdir(root / "toy_syn_m"))[0] == "dataset.json"
        and not (root / "toy_syn_m" / "train.partial").exists()
    )


@pytest.mark.parametrize("dies_at", [0, 2, 6, 8, 14, 18])
def test_stopped_job_resumes_without_repeating_finished_images(root, dies_at):
    first, second, whole = Ellipses(dies_at=dies_at), Ellipses(), Ellipses()
    with pytest.raises(KeyboardInterrupt):
        synthesize(job_of(root), Masks(first, Quality()))
    assert not (root / "toy_syn_m" / "dataset.json").exists()
    assert synthesize(job_of(root), Masks(second, Quality())).images == 20
    assert first.seen + second.seen == 20
    synthesize(job_of(root, output="whole"), Masks(whole, Quality()))
    assert records_of(root) == records_of(root, "whole")


def test_truncated_annotation_log_is_repaired_on_resume(root):
    with pytest.raises(KeyboardInterrupt):
        synthesize(job_of(root), Masks(Ellipses(dies_at=4), Quality()))
    log = root / "toy_syn_m" / "train.partial" / "00000.annotations"
    whole = log.read_bytes()
    for damaged in (whole[:-5], whole + b"\x00" * 100, whole + whole[: len(whole) // 3]):
        log.write_bytes(damaged)
        teacher = Ellipses(dies_at=1)
        with pytest.raises(KeyboardInterrupt):
            synthesize(job_of(root), Masks(teacher, Quality()))
    teacher = Ellipses()
    synthesize(job_of(root), Masks(teacher, Quality()))
    assert len(records_of(root)) == 20 and all(s.mask for r in records_of(root) for s in r.segments)


def _until_killed(root: str, calls: int, reached) -> None:
    """Sets `reached` in the middle of the teacher's call of that number, which never returns."""

    class Stuck(Ellipses):
        left = calls

        def __call__(self, pictures, boxes):
            self.left -= 1
            if not self.left:
                reached.set()
                threading.Event().wait()
            return super().__call__(pictures, boxes)

    synthesize(job_of(root), Masks(Stuck(), Quality()))


@pytest.mark.process
def test_killed_job_resumes_and_gives_the_same_records(root):
    context = multiprocessing.get_context("spawn")
    synthesize(job_of(root, output="whole"), Masks(Ellipses(), Quality()))
    for calls in (1, 3, 2):
        reached = context.Event()
        process = context.Process(target=_until_killed, args=(str(root), calls, reached))
        process.start()
        assert reached.wait(300)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    synthesize(job_of(root), Masks(Ellipses(), Quality()))
    assert records_of(root) == records_of(root, "whole")


def test_interruption_while_moving_shards_leaves_no_partial_set(root, monkeypatch):
    replace, moved = os.replace, []

    def stops(source, target):
        if str(target).endswith(".array_record") and "partial" not in str(target):
            moved.append(target)
            if len(moved) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        synthesize(job_of(root), Masks(Ellipses(), Quality()))
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(FileNotFoundError, match="mqformer synthesize"):
        records_of(root)
    teacher = Ellipses()
    synthesize(job_of(root), Masks(teacher, Quality()))
    assert teacher.seen == 0 and len(records_of(root)) == 20


def test_workers_share_the_shards_and_the_last_one_completes_the_set(root):
    teachers = [Ellipses() for _ in range(2)]
    annotators = [Masks(t, Quality()) for t in teachers]
    assert synthesize(job_of(root), annotators[1], (1, 2)) is None
    assert not (root / "toy_syn_m" / "dataset.json").exists()
    assert synthesize(job_of(root), annotators[0], (0, 2)).images == 20
    assert sorted(t.seen for t in teachers) == [7, 13]  # shards of 6, 7, 7
    assert is_complete(job_of(root)) and len(records_of(root)) == 20


def test_concurrent_work_on_a_shard_or_with_other_settings_is_rejected(root):
    annotator = Masks(Ellipses(), Quality())
    job, other = job_of(root), job_of(root, settings="squares")
    with open_job(job):
        with pytest.raises(ValueError, match="another process is writing toy_syn_m train with other settings"):
            synthesize(other, annotator)
        teacher = Ellipses()
        inner = lambda pictures, boxes: make_shard(job.source, 0, job.path(0), Masks(Ellipses(), Quality()), 2)
        teacher.__class__ = type("Nested", (Ellipses,), {"__call__": lambda self, *a: inner(*a)})
        with pytest.raises(ValueError, match="another process is working on this shard"):
            make_shard(job.source, 0, job.path(0), Masks(teacher, Quality()), 2)


def test_changed_settings_restart_the_job(root):
    with pytest.raises(KeyboardInterrupt):
        synthesize(job_of(root), Masks(Ellipses(dies_at=8), Quality()))
    strict, teacher = Quality(min_score=0.95), Ellipses()
    tally = synthesize(job_of(root, settings="strict"), Masks(teacher, strict))
    assert teacher.seen == 20 and not tally.accepted
    assert is_complete(job_of(root, settings="strict")) and not is_complete(job_of(root))
    again = Ellipses()
    # takes the place of the strict one
    assert synthesize(job_of(root), Masks(again, Quality())).accepted.total() == 40 and again.seen == 20
    assert all(s.mask for r in records_of(root) for s in r.segments)


def test_unusable_boxes_and_images_are_counted_named_and_kept(root, tmp_path):
    outside, empty = Segment(0, box=(100.0, 0.0, 120.0, 10.0)), Segment(1, box=(5.0, 5.0, 5.0, 9.0))
    partly = Segment(0, box=(-10.0, -10.0, 30.0, 30.0))
    crowd, masked = Segment(0, box=(0.0, 0.0, 9.0, 9.0), crowd=True), Segment(2, mask=encode_rle(np.ones((H, W), bool)))
    rows = [
        record(0, outside, empty, partly, crowd, masked),
        record(1, Segment(0, box=(1.0, 1.0, 20.0, 20.0)), image=b"no image"),
        record(2),
    ]
    write_set(tmp_path, "odd", rows, shards=1)
    tally = synthesize(job_of(tmp_path, data="odd", output="odd_syn_m"), Masks(Ellipses(), Quality()))
    assert tally.reasons == {"the box is outside the image": 1, "the box is empty": 1, "the image cannot be decoded": 1}
    assert "1 x the image cannot be decoded (image 001)" in str(tally)
    made = records_of(tmp_path, "odd_syn_m")
    assert [r.segments[:2] for r in made] == [(outside, empty), rows[1].segments, ()] and made[0].segments[3:] == (
        crowd,
        masked,
    )
    taken = made[0].segments[2]
    assert taken.box == partly.box and taken.mask_by and made[0].decode_mask(taken.mask)[:30, :30].any()


def test_damaged_record_is_reported(root):
    path = next(pathlib.Path(root / "toy").glob("train-00001*"))
    data = bytearray(path.read_bytes())
    at = data.index(b"image 009")
    data[at + 200 : at + 260] = bytes(60)
    path.write_bytes(bytes(data))
    tally = synthesize(job_of(root), Masks(Ellipses(), Quality()))
    assert tally.images in (19, 20)
    report = json.loads((root / "toy_syn_m" / "train.report.json").read_text())
    if tally.images == 19:
        assert report["problems"]["counts"] == {"image: the record is damaged": 1}
    else:
        assert tally.reasons == {"the image cannot be decoded": 2}


def test_existing_unrelated_set_is_not_overwritten(root):
    write_set(root, "mine", two_boxes(3))
    with pytest.raises(ValueError, match="mine holds another data set; give another --output"):
        synthesize(job_of(root, output="mine"), Masks(Ellipses(), Quality()))
    with pytest.raises(ValueError, match="--output=toy: give the new data set another name"):
        synthesize(job_of(root, output="toy"), Masks(Ellipses(), Quality()))
