"""Annotate one split of a data set and write it as a split of another data set. A killed job can be resumed.

    <output>/<split>.partial/fingerprint             hash of the input and the settings
    <output>/<split>.partial/00003.*                 unfinished shards (see `shard`)
    <output>/<split>-00003-of-00010.array_record     finished shards, once all are finished

Each output shard holds the records of the input shard with the same number, so several processes can annotate
different shards at the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Generator

from tqdm import tqdm

from mqformer_jax.files import write_text
from mqformer_jax.input.record import DatasetInfo
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare.shard_writer import Contents, locked, moves, prepared, publish_files, remove, restore_files
from mqformer_jax.synthesize.annotators import Annotator
from mqformer_jax.synthesize.report import Tally
from mqformer_jax.synthesize.shard import make_shard

BATCH = 8  # images per call of the teacher


@dataclasses.dataclass(frozen=True)
class Job:
    """One split to annotate.

    root: folder of the data sets. data, output: names of the old and the new data set in `root`. settings: see
    `Annotator`. batch: images per call of the teacher.
    """

    root: str
    data: str
    split: str
    output: str
    settings: str
    batch: int = BATCH

    @functools.cached_property
    def source(self) -> ShardSource:
        return ShardSource(self.root, self.data, self.split)

    @property
    def folder(self) -> str:
        return os.path.join(self.root, self.output)

    @property
    def partial(self) -> str:
        return os.path.join(self.folder, f"{self.split}.partial")

    @property
    def title(self) -> str:
        return f"{self.output} {self.split}"

    def path(self, shard: int) -> str:
        """Return the path of the files of an unfinished shard, without extension."""
        return os.path.join(self.partial, f"{shard:05d}")

    def fingerprint(self) -> str:
        """Return a hash of everything that affects the output: the input files and the settings."""
        files = [(os.path.basename(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in self.source.paths]
        return hashlib.sha256(repr((files, self.settings)).encode()).hexdigest()


def is_complete(job: Job) -> bool:
    """Return whether the new split already exists and was made from the same input with the same settings."""
    return prepared(job.folder, job.split, job.fingerprint()) is not None


@contextlib.contextmanager
def open_job(job: Job) -> Generator[None]:
    """Lock the folder of a job while the context is open. Processes of the same job share the lock.

    Deletes unfinished shards that were made with other settings. Raises ValueError if `output` equals `data` or holds
    another data set, or if a process is writing the split with other settings.
    """
    if job.output == job.data:
        raise ValueError(f"--output={job.output}: give the new data set another name than --data.")
    _entry(job, True)
    os.makedirs(job.partial, exist_ok=True)
    path = os.path.join(job.partial, "fingerprint")
    fingerprint = job.fingerprint()
    busy = f"another process is writing {job.title} with other settings: wait until it ends, or give another --output."
    if not _contains(path, fingerprint):
        with locked(job.partial, busy):
            if not _contains(path, fingerprint):
                remove(job.partial, r".*")
                write_text(path, fingerprint)
    with locked(job.partial, busy, shared=True):
        yield


def _contains(path: str, text: str) -> bool:
    try:
        with open(path) as f:
            return f.read() == text
    except FileNotFoundError:
        return False


def synthesize(job: Job, annotator: Annotator, worker: tuple[int, int] = (0, 1)) -> Tally | None:
    """Annotate the shards of this process. If all shards are then finished, complete the split and return its tally.

    Return None if other processes are not finished. worker: index of this process and number of processes.
    """
    index, count = worker
    with (
        open_job(job),
        tqdm(desc=job.title, total=len(job.source) // count, unit="image", dynamic_ncols=True, disable=None) as bar,
    ):
        for shard in range(index, len(job.source.paths), count):
            make_shard(job.source, shard, job.path(shard), annotator, job.batch, bar.update)
    return finish(job, annotator)


def finish(job: Job, annotator: Annotator) -> Tally | None:
    """If all shards are finished, move them into the new data set and return the tally of the split. Else return None.

    Raises ValueError if no record of the split can be read.
    """
    with locked(job.folder):
        if is_complete(job):
            return Tally.load(_tally_path(job))
        paths = [job.path(shard) for shard in range(len(job.source.paths))]
        if not all(os.path.exists(f"{path}.json") for path in paths):
            return None
        restore_files(job.folder, job.split, paths)
        total, tally = Contents(), Tally(annotator.kind, annotator.name)
        shards = [Contents.load(f"{path}.json") for path in paths]
        for path, contents in zip(paths, shards):
            total.update(contents)
            tally.update(Tally.load(f"{path}.tally.json"))
        if not total.records:
            raise ValueError(f"{job.data} {job.split}: no record can be read; prepare the data set again.")
        tally.save(_tally_path(job))
        publish_files(
            job.folder,
            job.split,
            moves(job.folder, job.split, paths, shards),
            _entry(job, annotator.unique),
            total,
            job.fingerprint(),
        )
        shutil.rmtree(job.partial)
    return tally


def _tally_path(job: Job) -> str:
    return os.path.join(job.folder, f"{job.split}.synthesis.json")


def _entry(job: Job, unique: bool) -> DatasetInfo:
    """Return the new data set's DatasetInfo, including the splits that its folder already holds.

    unique: see `Annotator`. Raises ValueError if the folder holds a data set that was not made from `job.data` by this
    command, or that has other classes.
    """
    info = job.source.info
    unique = unique and (info.unique_texts or not any(info.expressions.values()))
    own = dict(name=job.output, splits={}, class_images={}, expressions={}, source="synthesize", made_from=job.data)
    new = dataclasses.replace(info, **own, unique_texts=unique)
    if not os.path.exists(os.path.join(job.folder, "dataset.json")):
        return new
    old = DatasetInfo.load(job.folder)
    if old.source != "synthesize" or (old.classes, old.exhaustive, old.made_from) != (
        new.classes,
        new.exhaustive,
        new.made_from,
    ):
        raise ValueError(f"{job.folder} holds another data set; give another --output.")
    for part in (old.splits, old.class_images, old.expressions):
        part.pop(job.split, None)
    return dataclasses.replace(old, unique_texts=unique and (old.unique_texts or not old.splits)) if old.splits else new
