"""Writing a prepared split: jobs to records to ArrayRecord shards, a shard a worker; whole or not at all, and gone on with.

Shards are made in `<name>/<split>.partial`, which keeps the finished ones for as long as the plan stays the same, and are
moved out of it when all are there. `<split>.report.json` says what became of the plan.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

import cv2
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from plan import Built, Job, Plan, Problems, Report
from tqdm import tqdm

from mqformer_jax.input import record
from mqformer_jax.input.record import FORMAT, DatasetInfo, origins_path, shard_paths

# A shard holds about so much of image files and so many images at most. A set that is smaller is cut further, down to
# FEW_IMAGES a shard and into no more than SMALL_SHARDS, so that all cores have work.
SHARD_BYTES = 128 << 20
SHARD_IMAGES = 2048
FEW_IMAGES = 32
SMALL_SHARDS = 16
COMMANDS = ("prepare.py", "public.py", "catalog.py")  # what they say to the others is in the plan


# ---- Worker processes ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that start when there is work for them and end with this one, however it ends; None where 1 is wanted."""
    if workers <= 1:
        yield None
        return
    # Spawned on every system alike: forking a process that has threads (OpenCV, hotcoco) may hang.
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (theirs,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # first: its thread keeps the lock for this while it buries workers
        ours.close()  # a shard may take minutes that nobody waits for any more
        raise
    pool.shutdown()
    ours.close()


def _start_worker(parent: Connection) -> None:
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """Ends this process when the other end of the pipe is closed, by the parent or by its death."""
    parent.poll(None)
    os._exit(1)


# ---- One shard ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Contents:
    """What shards hold. That of a finished shard lies beside it as JSON, which is written last.

    shards: of a split, how many hold records; there is no file of one that does not. bytes: size of the files. class_images: how many
    images show each class. origins: of the records, in their order. fingerprint: that of a whole split's plan.
    """

    shards: int = 0
    records: int = 0
    bytes: int = 0
    segments: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    class_images: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    problems: Problems = dataclasses.field(default_factory=Problems)
    origins: list[str] = dataclasses.field(default_factory=list)
    fingerprint: str = ""

    def add(self, built: Built) -> None:
        self.segments.update(built.segments)
        self.problems.update(built.problems)
        if built.record is not None:
            self.records += 1
            self.class_images.update(built.classes)
            self.origins.append(built.origin)

    def update(self, other: Contents) -> None:
        self.shards += other.records > 0
        self.records += other.records
        self.bytes += other.bytes
        self.segments.update(other.segments)
        self.class_images.update(other.class_images)
        self.problems.update(other.problems)
        self.origins += other.origins

    def save(self, path: str) -> None:
        _write_text(path, json.dumps({**vars(self), "problems": vars(self.problems)}))

    @classmethod
    def load(cls, path: str) -> Contents:
        with open(path) as f:
            fields = json.load(f)
        fields["segments"] = collections.Counter(fields["segments"])
        fields["class_images"] = collections.Counter({int(i): count for i, count in fields["class_images"].items()})
        problems = fields.pop("problems")
        return cls(**fields, problems=Problems(collections.Counter(problems["counts"]), problems["examples"]))


def make_shard(make: Callable[[Any], Built], jobs: Sequence[Any], path: str) -> int:
    """Makes a shard: `path`.array_record, then `path`.json. The number of its jobs."""
    contents, temporary = Contents(), f"{path}.{os.getpid()}.tmp"
    try:
        writer = ArrayRecordWriter(temporary, "group_size:1")
        for job in jobs:
            built = make(job)
            contents.add(built)
            if built.record is not None:
                with _write_errors(path):
                    writer.write(built.record)
        with _write_errors(path):
            writer.close()
            reader = ArrayRecordReader(temporary)
            written = reader.num_records()
            reader.close()
        if written != contents.records:
            raise OSError(f"{path}: {written} of {contents.records} records were written; is the disk full?")
        if contents.records:
            contents.bytes = os.path.getsize(temporary)
            _put(temporary, f"{path}.array_record")
        contents.save(f"{path}.json")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return len(jobs)


@contextlib.contextmanager
def _write_errors(path: str) -> Iterator[None]:
    """ArrayRecord's errors are RuntimeErrors of several sentences; the first says what the matter is."""
    try:
        yield
    except RuntimeError as e:
        raise OSError(f"{path}: {str(e).split(';')[0]}") from None


def _write_text(path: str, text: str) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    _put(path + ".tmp", path)


def _put(temporary: str, path: str) -> None:
    """Renames a file that is whole, on the disk too: a machine may be taken away at any time."""
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


# ---- All shards of a split ----------------------------------------------------------------------------------------


def write_split(out: str, name: str, split: str, plan: Plan, pool: ProcessPoolExecutor | None = None) -> Report:
    """Prepares one split into `<out>/<name>` and enters it in `dataset.json`; without a `worker_pool`, in this process.

    An exception, a kill or a full disk on the way leaves the split as it was before, or not there, and the next call goes on
    with the shards that were finished. Raises ValueError where the set holds other classes already or no image is left.
    """
    folder, title = os.path.join(out, name), f"{name} {split}"
    os.makedirs(folder, exist_ok=True)
    _entry(folder, name, split, plan)  # before the work, so that a clash costs nothing
    stats = [[_stat(path) for path in _files(job)] for job in plan.jobs]
    runs = partition(plan.jobs, [files[0][0] if files else 0 for files in stats])
    key = fingerprint(plan, runs, stats)
    partial = os.path.join(folder, f"{split}.partial")
    os.makedirs(partial, exist_ok=True)
    with _locked(partial, f"{title} is being prepared by another process, in {partial}"):
        if (before := _prepared(folder, split, key)) is not None:
            print(f"{title}: these files are prepared already, nothing was done", file=sys.stderr)
            shutil.rmtree(partial)  # also what a preparation left that was killed at its last step
            return _report(name, split, plan, before)
        _open_partial(partial, key, title)
        paths = [os.path.join(partial, f"{i:05d}") for i in range(len(runs))]
        _take_back(folder, split, paths)
        todo = {path: jobs for path, jobs in zip(paths, runs) if not _finished(path)}
        if len(todo) < len(paths):
            print(f"{title}: {len(paths) - len(todo)} of {len(paths)} shards were finished, going on", file=sys.stderr)
        done = len(plan.jobs) - sum(map(len, todo.values()))
        with tqdm(desc=title, total=len(plan.jobs), initial=done, leave=False, disable=None) as bar:
            for images in _make_shards(plan.make, todo, pool):
                bar.update(images)
        shards, total = [Contents.load(f"{path}.json") for path in paths], Contents()
        for shard in shards:
            total.update(shard)
        if total.records:
            with _locked(folder):  # another split of the set may come to its end at the same time
                _go_live(folder, split, _moves(folder, split, paths, shards), _entry(folder, name, split, plan), total, key)
        shutil.rmtree(partial)
    report = _report(name, split, plan, total)
    if not report.kept:
        raise ValueError(f"nothing of {title} can be used: {'; '.join(report.reasons()) or 'it lists no image'}")
    return report


@contextlib.contextmanager
def _locked(folder: str, busy: str = "") -> Iterator[None]:
    """Holds a folder against other processes; waits for it, or raises ValueError(busy). Not where the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError:
        os.close(handle)
        raise ValueError(busy) from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


def _prepared(folder: str, split: str, key: str) -> Contents | None:
    """What the split holds, where it is whole and was made of the very same."""
    try:
        contents = Contents.load(_report_path(folder, split))
        shards = shard_paths(folder, split, contents.shards)
        whole = split in DatasetInfo.load(folder).splits and sum(map(os.path.getsize, shards)) == contents.bytes
        whole &= os.path.exists(origins_path(folder, split)) == bool(contents.origins)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return contents if whole and contents.fingerprint == key else None


def _report_path(folder: str, split: str) -> str:
    return os.path.join(folder, f"{split}.report.json")


def _entry(folder: str, name: str, split: str, plan: Plan) -> DatasetInfo:
    """The set's `dataset.json`, or a new one, without the split. Raises ValueError where it disagrees with the plan."""
    new = DatasetInfo(name, plan.classes, {}, plan.exhaustive, plan.kind, plan.unique_texts)
    if not os.path.exists(os.path.join(folder, "dataset.json")):
        return new
    info = DatasetInfo.load(folder)
    info.splits.pop(split, None)
    info.class_images.pop(split, None)
    info.expressions.pop(split, None)
    if info.splits and (info.classes, info.exhaustive, info.unique_texts) != (plan.classes, plan.exhaustive, plan.unique_texts):
        others = ", ".join(sorted(info.splits))
        what = "classes" if info.classes != plan.classes else "rules of what is labelled"
        raise ValueError(f"{folder}/dataset.json: its splits ({others}) have other {what} than {split}; give another --name")
    return info if info.splits else new


def _open_partial(partial: str, key: str, title: str) -> None:
    """What the folder holds that was made for the very same is kept, what was made for others is thrown away."""
    note = os.path.join(partial, "fingerprint")
    if os.path.exists(note) and pathlib.Path(note).read_text() == key:
        _remove(partial, r".*\.tmp")
        return
    if os.listdir(partial):
        print(f"{title}: {partial} was begun with other files, options or code; starting anew", file=sys.stderr)
        _remove(partial, r".*")
    _write_text(note, key)


def partition(jobs: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Jobs to the runs that become shards, about equal by the bytes of their images. Workers have no say in it."""
    small = min(SMALL_SHARDS, math.ceil(len(jobs) / FEW_IMAGES))
    count = max(small, math.ceil(sum(sizes) / SHARD_BYTES), math.ceil(len(jobs) / SHARD_IMAGES))
    ends = list(itertools.accumulate(size + (1 << 14) for size in sizes))  # an image costs something whatever its size
    numbered = zip(jobs, [0, *ends])
    return [[job for job, _ in run] for _, run in itertools.groupby(numbered, lambda pair: pair[1] * count // ends[-1])]


def fingerprint(plan: Plan, runs: Sequence[Sequence[Any]], stats: Any) -> str:
    """Differs wherever shards could: by the jobs, their files, how records are made, the code that makes them."""
    digest = hashlib.sha256()
    code = [path for path in sorted(pathlib.Path(__file__).parent.glob("*.py")) if path.name not in COMMANDS]
    for path in (*code, pathlib.Path(record.__file__)):
        digest.update(path.read_bytes())
    for part in (FORMAT, plan.kind, plan.classes, plan.exhaustive, plan.unique_texts, plan.make, stats, *runs):
        digest.update(pickle.dumps(part))
    return digest.hexdigest()


def _files(job: Any) -> list[str]:
    """The image of a job, then all that its labels may name as files. The sample's jobs are seeds."""
    return [job.image, *_paths(job.labels)] if isinstance(job, Job) else []


def _paths(labels: Any) -> Iterator[str]:
    if isinstance(labels, str) and os.sep in labels:
        yield labels
    elif isinstance(labels, tuple):
        for part in labels:
            yield from _paths(part)


def _stat(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change of a file, in ns; zeros where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _finished(path: str) -> bool:
    try:
        contents = Contents.load(f"{path}.json")
    except FileNotFoundError:
        return False
    return _stat(f"{path}.array_record")[0] == contents.bytes


def _make_shards(make: Callable, todo: dict[str, list[Any]], pool: ProcessPoolExecutor | None) -> Iterator[int]:
    """Makes the shards in any order; the number of jobs of each when it is finished."""
    if pool is None:
        yield from (make_shard(make, jobs, path) for path, jobs in todo.items())
        return
    try:
        for done in as_completed([pool.submit(make_shard, make, jobs, path) for path, jobs in todo.items()]):
            yield done.result()
    except BrokenProcessPool:
        mend = "if memory ran out, give fewer --workers. Finished shards are kept, and the same command goes on"
        raise OSError(f"a worker process died; {mend}") from None


def _report(name: str, split: str, plan: Plan, total: Contents) -> Report:
    problems = Problems()
    problems.update(plan.problems)
    images = len(plan.jobs) + sum(count for reason, count in problems.counts.items() if reason.startswith("image:"))
    problems.update(total.problems)
    return Report(name, split, images, total.records, total.bytes, total.shards, total.segments, problems)


def _moves(folder: str, split: str, paths: Sequence[str], shards: Sequence[Contents]) -> list[tuple[str, str]]:
    """Where each shard that holds records lies while it is partial, and where readers look for it."""
    made = [f"{path}.array_record" for path, shard in zip(paths, shards) if shard.records]
    return list(zip(made, shard_paths(folder, split, len(made))))


def _go_live(folder: str, split: str, moves: Iterable[tuple[str, str]], info: DatasetInfo, total: Contents, key: str) -> None:
    """Moves the shards to where readers look for them. `info`: what `dataset.json` says of the other splits."""
    # From here to the last line the split is in no dataset.json, so no reader takes old and new shards for one.
    info.save(folder)
    _remove(folder, rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}\.array_record")
    _remove(folder, re.escape(os.path.basename(origins_path(folder, split))))
    _remove(folder, re.escape(os.path.basename(_report_path(folder, split))))
    for made, live in moves:
        os.replace(made, live)
    if any(total.origins):
        _write_text(origins_path(folder, split), "".join(f"{origin}\n" for origin in total.origins))
    dataclasses.replace(total, origins=list(filter(None, total.origins))[:1], fingerprint=key).save(_report_path(folder, split))
    info.splits[split] = total.records
    info.expressions[split] = total.segments["expression"] + total.segments["expression of nothing"]
    if info.classes:
        info.class_images[split] = tuple(total.class_images[i] for i in range(len(info.classes)))
    info.save(folder)


def _take_back(folder: str, split: str, paths: Sequence[str]) -> None:
    """Moves shards back that a preparation had moved when it was killed, before it could enter the split."""
    entered = os.path.exists(os.path.join(folder, "dataset.json")) and split in DatasetInfo.load(folder).splits
    if entered or not all(os.path.exists(f"{path}.json") for path in paths):
        return
    for made, live in _moves(folder, split, paths, [Contents.load(f"{path}.json") for path in paths]):
        if not os.path.exists(made) and os.path.exists(live):  # old shards are all gone before the first is moved
            os.replace(live, made)


def _remove(folder: str, pattern: str) -> None:
    for name in os.listdir(folder):
        if re.fullmatch(pattern, name):
            os.remove(os.path.join(folder, name))
