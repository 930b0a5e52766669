"""Prepare a split: worker processes convert jobs to records and write ArrayRecord shards.

Shards are written to `<name>/<split>.partial`. After an interruption, the next run reuses the finished shards in this
folder if the plan is unchanged. When all shards are finished, they are moved to `<name>`, and the report is written to
`<name>/<split>.report.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import pathlib
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

import cv2
from tqdm import tqdm

from mqformer_jax.files import write_text
from mqformer_jax.input import record
from mqformer_jax.input.record import FORMAT, DatasetInfo
from mqformer_jax.interrupts import block_ctrl_c_in_children
from mqformer_jax.prepare.plan import Job, Plan, Report
from mqformer_jax.prepare.shard_writer import (
    Built,
    Contents,
    Problems,
    locked,
    moves,
    prepared,
    publish_files,
    remove,
    restore_files,
    write_shard,
)

# A shard holds at most about SHARD_BYTES of image files and about SHARD_IMAGES images. A small split has more shards,
# so that all cores have work: up to SMALL_SHARDS shards of about FEW_IMAGES images.
SHARD_BYTES = 128 << 20
SHARD_IMAGES = 2048
FEW_IMAGES = 32
SMALL_SHARDS = 16
# left out of the fingerprint, since they only affect the plan
COMMANDS = ("cli.py", "command_plans.py", "public.py", "catalog.py")


# ---- Worker processes ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Yield a pool of worker processes, or None if `workers` is 1 or less.

    The processes start on demand. They always end when this process ends.
    """
    if workers <= 1:
        yield None
        return
    # Spawn on every system: forking a process that has threads (OpenCV, hotcoco) may hang.
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (theirs,))
    try:
        yield pool
    except BaseException:
        # Call `shutdown` before the workers end: when they end, the pool's thread cleans up, and meanwhile holds the
        # lock that `shutdown` needs.
        pool.shutdown(wait=False, cancel_futures=True)
        ours.close()  # ends the workers at once; finishing their shards could take minutes
        raise
    pool.shutdown()
    ours.close()


def _start_worker(parent: Connection) -> None:
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """End this process when the parent process dies or closes its end of the pipe."""
    parent.poll(None)
    os._exit(1)


# ---- All shards of a split ----------------------------------------------------------------------------------------


def write_split(out: str, name: str, split: str, plan: Plan, pool: ProcessPoolExecutor | None = None) -> Report:
    """Write one split to `<out>/<name>`, list it in `dataset.json` and return a report.

    pool: the worker processes; None makes the shards in this process. If the call is killed or raises an error (e.g.
    because the disk is full), the split is unchanged or missing, and the next call resumes from the finished shards.
    Raises ValueError if other splits of the data set differ in classes or labeling rules, if another process is
    preparing the split, or if no image is usable.
    """
    folder, title = os.path.join(out, name), f"{name} {split}"
    os.makedirs(folder, exist_ok=True)
    _entry(folder, name, split, plan)  # raises its errors before the long work starts
    stats = [[_stat(path) for path in _files(job)] for job in plan.jobs]
    runs = partition(plan.jobs, [files[0][0] if files else 0 for files in stats])
    key = fingerprint(plan, runs, stats)
    partial = os.path.join(folder, f"{split}.partial")
    os.makedirs(partial, exist_ok=True)
    with locked(partial, f"{title} is being prepared by another process, in {partial}: wait for it to end"):
        if (before := prepared(folder, split, key)) is not None:
            print(f"{title}: already prepared from these files, nothing to do", file=sys.stderr)
            shutil.rmtree(partial)  # remains if a preparation was killed just before its last step
            return _report(name, split, plan, before)
        _open_partial(partial, key, title)
        paths = [os.path.join(partial, f"{i:05d}") for i in range(len(runs))]
        restore_files(folder, split, paths)
        todo = {path: jobs for path, jobs in zip(paths, runs) if not _finished(path)}
        if len(todo) < len(paths):
            print(f"{title}: resuming, {len(paths) - len(todo)} of {len(paths)} shards are finished", file=sys.stderr)
        done = len(plan.jobs) - sum(map(len, todo.values()))
        with tqdm(desc=title, total=len(plan.jobs), initial=done, leave=False, disable=None) as bar:
            for images in _make_shards(plan.make, todo, pool):
                bar.update(images)
        shards, total = [Contents.load(f"{path}.json") for path in paths], Contents()
        for shard in shards:
            total.update(shard)
        if total.records:
            with locked(folder):  # another split of the data set may finish at the same time
                publish_files(
                    folder, split, moves(folder, split, paths, shards), _entry(folder, name, split, plan), total, key
                )
        shutil.rmtree(partial)
    report = _report(name, split, plan, total)
    if not report.kept:
        raise ValueError(
            f"{title} has no usable images: {'; '.join(report.reasons()) or 'the annotations list no images'}"
        )
    return report


def _entry(folder: str, name: str, split: str, plan: Plan) -> DatasetInfo:
    """Return the contents of `dataset.json` without the split, or new contents if the file lists no other split.

    Raises ValueError if the other splits differ from the plan in their classes or labeling rules (`exhaustive`,
    `unique_texts`).
    """
    new = DatasetInfo(name, plan.classes, {}, plan.exhaustive, plan.kind, plan.unique_texts)
    if not os.path.exists(os.path.join(folder, "dataset.json")):
        return new
    info = DatasetInfo.load(folder)
    info.splits.pop(split, None)
    info.class_images.pop(split, None)
    info.expressions.pop(split, None)
    if info.splits and (info.classes, info.exhaustive, info.unique_texts) != (
        plan.classes,
        plan.exhaustive,
        plan.unique_texts,
    ):
        others = ", ".join(sorted(info.splits))
        what = "classes" if info.classes != plan.classes else "labeling rules"
        raise ValueError(
            f"{folder}/dataset.json: the split {split} and the existing splits ({others}) differ in their {what}; "
            "give another --output, or another --name if the command has this option"
        )
    return info if info.splits else new


def _open_partial(partial: str, key: str, title: str) -> None:
    """Make the folder `partial` ready for the shards of the plan with the fingerprint `key`.

    If the folder has this fingerprint, remove only the unfinished files in it, *.tmp. Otherwise, empty it and write the
    fingerprint.
    """
    note = os.path.join(partial, "fingerprint")
    if os.path.exists(note) and pathlib.Path(note).read_text() == key:
        remove(partial, r".*\.tmp")
        return
    if os.listdir(partial):
        print(f"{title}: {partial} was made with other files, options or code; starting over", file=sys.stderr)
        remove(partial, r".*")
    write_text(note, key)


def partition(jobs: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Return the jobs of each shard: consecutive runs of `jobs` whose images have about the same total size.

    sizes: size of each job's image in bytes. The result does not depend on the number of workers.
    """
    small = min(SMALL_SHARDS, math.ceil(len(jobs) / FEW_IMAGES))
    count = max(small, math.ceil(sum(sizes) / SHARD_BYTES), math.ceil(len(jobs) / SHARD_IMAGES))
    ends = list(itertools.accumulate(size + (1 << 14) for size in sizes))  # plus a constant cost per image
    numbered = zip(jobs, [0, *ends])
    return [[job for job, _ in run] for _, run in itertools.groupby(numbered, lambda pair: pair[1] * count // ends[-1])]


def fingerprint(plan: Plan, runs: Sequence[Sequence[Any]], stats: Any) -> str:
    """Return a hash of everything that affects the contents of the shards.

    These are the plan, the jobs of each shard (`runs`), the sizes and modification times of their files (`stats`), and
    the code that makes records.
    """
    digest = hashlib.sha256()
    code = [path for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")) if path.name not in COMMANDS]
    for path in (*code, pathlib.Path(record.__file__)):
        digest.update(path.read_bytes())
    for part in (FORMAT, plan.kind, plan.classes, plan.exhaustive, plan.unique_texts, plan.make, stats, *runs):
        digest.update(pickle.dumps(part))
    return digest.hexdigest()


def _files(job: Any) -> list[str]:
    """Return the paths of a job's image and of the files in its labels. Jobs of the sample are seeds: return []."""
    return [job.image, *_paths(job.labels)] if isinstance(job, Job) else []


def _paths(labels: Any) -> Iterator[str]:
    if isinstance(labels, str) and os.sep in labels:
        yield labels
    elif isinstance(labels, tuple):
        for part in labels:
            yield from _paths(part)


def _stat(path: str) -> tuple[int, int]:
    """Return the size of a file in bytes and its modification time in ns, or zeros if it does not exist."""
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


def _make_shard(make: Callable[[Any], Built], jobs: Sequence[Any], path: str) -> int:
    """Write a shard and return the number of its jobs."""
    write_shard(map(make, jobs), path)
    return len(jobs)


def _make_shards(make: Callable, todo: dict[str, list[Any]], pool: ProcessPoolExecutor | None) -> Iterator[int]:
    """Make the shards in any order. Whenever one is finished, yield the number of its jobs."""
    if pool is None:
        yield from (_make_shard(make, jobs, path) for path, jobs in todo.items())
        return
    try:
        with block_ctrl_c_in_children():  # the first `submit` starts the workers
            shards = [pool.submit(_make_shard, make, jobs, path) for path, jobs in todo.items()]
        for done in as_completed(shards):
            yield done.result()
    except BrokenProcessPool:
        mend = "If memory ran out, give fewer --workers. Run the same command to resume from the finished shards."
        raise OSError(f"a worker process died. {mend}") from None


def _report(name: str, split: str, plan: Plan, total: Contents) -> Report:
    problems = Problems()
    problems.update(plan.problems)
    images = len(plan.jobs) + sum(count for reason, count in problems.counts.items() if reason.startswith("image:"))
    problems.update(total.problems)
    return Report(name, split, images, total.records, total.bytes, total.shards, total.segments, problems)
