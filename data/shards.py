"""Writing a prepared split: jobs to records in worker processes, records to ArrayRecord shards, whole or not at all."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import cv2
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from images import Image, Unusable, read_image
from tqdm import tqdm

from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, shard_paths

SHARD_BYTES = 256 << 20
HELD_OUT = "image: held out for evaluation by another set"


@dataclasses.dataclass
class Problems:
    """What was dropped: how often for each reason, and the first few names."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, what: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, [])
        self.examples[reason] = (self.examples[reason] + [what])[:3]

    def update(self, other: Problems) -> None:
        for reason, names in other.examples.items():
            self.counts[reason] += other.counts[reason]
            self.examples[reason] = (self.examples.get(reason, []) + names)[:3]


@dataclasses.dataclass
class Job:
    """One image to be made a record. id: what other annotation files call it. labels: whatever its family needs.

    origin: see `Record`; `coco_origin` knows COCO's pictures by their file names.
    """

    key: str
    id: int | str
    image: str
    labels: Any
    origin: str = ""


def coco_origin(name: str) -> str:
    """ "coco/391895" for the file name of a picture of COCO, 2014's or 2017's; "" for any other."""
    found = re.fullmatch(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})\.jpg", os.path.basename(name))
    return f"coco/{int(found[1])}" if found else ""


@dataclasses.dataclass
class Built:
    """One job done: the record's bytes (None where the image was dropped), its segments by kind, what was wrong."""

    record: bytes | None
    segments: collections.Counter[str]
    problems: Problems


@dataclasses.dataclass
class Plan:
    """A split that is ready to be prepared. kind: the subcommand. make: job to Built, in another process.

    exhaustive, unique_texts: see `DatasetInfo`.
    """

    kind: str
    classes: tuple[ClassInfo, ...]
    jobs: list[Any]
    make: Callable[[Any], Built]
    exhaustive: bool = True
    problems: Problems = dataclasses.field(default_factory=Problems)
    unique_texts: bool = True

    def only(self, keep: Callable[[Job], bool]) -> Plan:
        """The plan for the images that belong to this split, where one file lists several."""
        problems = Problems()
        problems.update(self.problems)
        return dataclasses.replace(self, jobs=[job for job in self.jobs if keep(job)], problems=problems)

    def without(self, held_out: Set[int | str]) -> Plan:
        """The plan without images that another set evaluates on; each is counted as dropped."""
        plan = self.only(lambda job: job.id not in held_out)
        for job in self.jobs:
            if job.id in held_out:
                plan.problems.add(HELD_OUT, job.key)
        return plan


@dataclasses.dataclass
class Report:
    name: str
    split: str
    images: int
    kept: int
    size: int
    shards: int
    segments: collections.Counter[str]
    problems: Problems

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.segments.items())) or "none"
        lines = [
            f"{self.name} {self.split}: {self.kept} images kept, {self.images - self.kept} dropped, "
            f"{self.shards} shard{'s' * (self.shards > 1)}, {self.size / 1e6:.1f} MB",
            f"  segments: {kinds}",
        ]
        return "\n".join(lines + [f"  {reason}" for reason in self.reasons()])

    def reasons(self) -> list[str]:
        """What was dropped, most frequent first, with the first few names."""
        shown = []
        for reason, count in self.problems.counts.most_common():
            names = self.problems.examples[reason]
            shown.append(f"{count} x {reason} ({', '.join(names)}{', …' * (count > len(names))})")
        return shown


def build(make_record: Callable[[Job, Image, Problems], Record], job: Job) -> Built:
    """Reads a job's image and makes its record; whatever makes the whole image unusable is counted, not raised."""
    problems = Problems()
    try:
        record = dataclasses.replace(make_record(job, read_image(job.image), problems), origin=job.origin)
    except Unusable as e:
        problems.add(f"image: {e}" if not str(e).startswith("image") else f"image: {str(e)[6:]}", job.key)
        return Built(None, collections.Counter(), problems)
    return Built(record.to_bytes(), count_segments(record), problems)


def builder(make_record: Callable[..., Record], **context: Any) -> Callable[[Job], Built]:
    """`build` for one family of records; `context` is passed on as keywords. Goes to worker processes."""
    return functools.partial(build, functools.partial(make_record, **context))


def count_segments(record: Record) -> collections.Counter[str]:
    """Segments of a record by kind (mask, box only, crowd, matte, ...) and its expressions."""
    counts: collections.Counter[str] = collections.Counter()
    for s in record.segments:
        shape = "matte" if s.alpha else "mask" if s.mask else "box only"
        counts["crowd" if s.crowd else f"foreground {shape}" if s.foreground else shape] += 1
        counts["expression"] += len(s.texts)
    counts["expression of nothing"] += len(record.absent_texts)
    return +counts


@contextlib.contextmanager
def worker_map(workers: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """A `map` that keeps order, over `workers` processes; in this process where that is 1."""
    if workers <= 1:
        yield map
        return
    # Spawned on every system alike: forking a process that has threads (OpenCV, hotcoco) may hang.
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker) as pool:
        yield functools.partial(pool.imap, chunksize=4)


def _start_worker() -> None:
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def write_split(out: str, name: str, split: str, plan: Plan, ordered_map: Callable = map, shard_bytes: int = SHARD_BYTES) -> Report:
    """Prepares one split into `<out>/<name>` and enters it in `dataset.json`.

    Shards grow under temporary names; an exception, a kill or a full disk on the way leaves the split as it was before.
    Raises ValueError where the set holds other classes already or no image is left.
    """
    folder = os.path.join(out, name)
    os.makedirs(folder, exist_ok=True)
    _entry(folder, name, split, plan)  # before the work, so that a clash costs nothing
    _remove(folder, rf"{re.escape(split)}-\d+\.tmp")
    report = Report(name, split, len(plan.jobs), 0, 0, 0, collections.Counter(), Problems())
    report.problems.update(plan.problems)
    report.images += sum(count for reason, count in plan.problems.counts.items() if reason.startswith("image:"))
    try:
        counts = _write_shards(folder, split, _records(plan, ordered_map, report), shard_bytes)
        if not report.kept:
            raise ValueError(f"nothing of {name} {split} can be used: {'; '.join(report.reasons()) or 'it lists no image'}")
        # From here to the last line the split is in no dataset.json, so no reader takes old and new shards for one.
        info = _entry(folder, name, split, plan)
        info.splits.pop(split, None)
        info.save(folder)
        _remove(folder, rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}\.array_record")
        for i, path in enumerate(shard_paths(folder, split, len(counts))):
            os.replace(_temporary(folder, split, i), path)
            report.size += os.path.getsize(path)
        info.splits[split] = report.kept
        info.save(folder)
    finally:
        _remove(folder, rf"{re.escape(split)}-\d+\.tmp")
    report.shards = len(counts)
    return report


def _entry(folder: str, name: str, split: str, plan: Plan) -> DatasetInfo:
    """The set's `dataset.json`, or a new one. Raises ValueError where it disagrees with the plan."""
    if not os.path.exists(os.path.join(folder, "dataset.json")):
        return DatasetInfo(name, plan.classes, {}, plan.exhaustive, plan.kind, plan.unique_texts)
    info = DatasetInfo.load(folder)
    if info.splits.keys() <= {split}:
        return DatasetInfo(name, plan.classes, info.splits, plan.exhaustive, plan.kind, plan.unique_texts)
    if (info.classes, info.exhaustive) != (plan.classes, plan.exhaustive):
        others = ", ".join(sorted(info.splits))
        raise ValueError(f"{folder}/dataset.json: its splits ({others}) have other classes than {split}; give another --name")
    return info


def _records(plan: Plan, ordered_map: Callable, report: Report) -> Iterator[bytes]:
    title = f"{report.name} {report.split}"
    for built in tqdm(ordered_map(plan.make, plan.jobs), desc=title, total=len(plan.jobs), leave=False, disable=None):
        report.problems.update(built.problems)
        report.segments.update(built.segments)
        if built.record is not None:
            report.kept += 1
            yield built.record


def _write_shards(folder: str, split: str, records: Iterator[bytes], shard_bytes: int) -> list[int]:
    """Writes temporary shards of about `shard_bytes`; the number of records in each."""
    counts: list[int] = []
    writer, filled = None, 0
    for record in records:
        if writer is None or filled >= shard_bytes:
            _close(writer, folder, split, counts)
            writer, filled = ArrayRecordWriter(_temporary(folder, split, len(counts)), "group_size:1"), 0
            counts.append(0)
        writer.write(record)
        filled += len(record)
        counts[-1] += 1
    _close(writer, folder, split, counts)
    return counts


def _close(writer: ArrayRecordWriter | None, folder: str, split: str, counts: list[int]) -> None:
    """Closes a shard and counts what can be read of it: the writer is silent about a full disk."""
    if writer is None:
        return
    writer.close()
    path = _temporary(folder, split, len(counts) - 1)
    reader = ArrayRecordReader(path)
    if reader.num_records() != counts[-1]:
        raise OSError(f"{path}: {reader.num_records()} of {counts[-1]} records were written; is the disk full?")
    reader.close()


def _temporary(folder: str, split: str, index: int) -> str:
    return os.path.join(folder, f"{split}-{index:05d}.tmp")


def _remove(folder: str, pattern: str) -> None:
    for name in os.listdir(folder):
        if re.fullmatch(pattern, name):
            os.remove(os.path.join(folder, name))
