"""The work on one split of a data set, which becomes a split of another. Killed anywhere, the same work goes on where
it was.

    <out>/<split>.partial/fingerprint             what is being made, of what, by whom
    <out>/<split>.partial/00003.*                 the shards that are being made (`shard`)
    <out>/<split>-00003-of-00010.array_record     where readers look, when all shards are finished

A shard of the output holds the records of the shard of its number in the input, so any number of processes may share
the shards by number.
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

from mqformer_jax.input.record import DatasetInfo
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare.shard_writer import Contents, go_live, locked, moves, prepared, remove, take_back, write_text
from mqformer_jax.synthesize.makers import Maker
from mqformer_jax.synthesize.report import Tally
from mqformer_jax.synthesize.shard import make_shard

BATCH = 8  # pictures that a teacher is given at once


@dataclasses.dataclass(frozen=True)
class Work:
    """One split of a prepared data set to be made another set. settings: the maker's."""

    root: str
    data: str
    split: str
    out: str
    settings: str
    batch: int = BATCH

    @functools.cached_property
    def source(self) -> ShardSource:
        return ShardSource(self.root, self.data, self.split)

    @property
    def folder(self) -> str:
        return os.path.join(self.root, self.out)

    @property
    def partial(self) -> str:
        return os.path.join(self.folder, f"{self.split}.partial")

    @property
    def title(self) -> str:
        return f"{self.out} {self.split}"

    def path(self, shard: int) -> str:
        """Of the files of a shard that is being made, without their endings."""
        return os.path.join(self.partial, f"{shard:05d}")

    def fingerprint(self) -> str:
        """Differs wherever the records that come out could: by the input's files and the settings."""
        files = [(os.path.basename(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in self.source.paths]
        return hashlib.sha256(repr((files, self.settings)).encode()).hexdigest()


def is_made(work: Work) -> bool:
    """Whether the split is there already, made of the same by the same."""
    return prepared(work.folder, work.split, work.fingerprint()) is not None


@contextlib.contextmanager
def begun(work: Work) -> Generator[None]:
    """Holds the folder of the work, beside other processes that do the same work. What was begun with other settings is
    thrown away.

    Raises ValueError where the set holds other splits of another kind, or other work goes on in the folder.
    """
    if work.out == work.data:
        raise ValueError(f"--out={work.out}: give the new set a name of its own.")
    _entry(work, True)
    os.makedirs(work.partial, exist_ok=True)
    note, key, busy = (
        os.path.join(work.partial, "fingerprint"),
        work.fingerprint(),
        f"{work.title} is being made with other settings",
    )
    if not _says(note, key):
        with locked(work.partial, busy + ": wait for that, or give another --out."):
            if not _says(note, key):
                remove(work.partial, r".*")
                write_text(note, key)
    with locked(work.partial, busy, shared=True):
        yield


def _says(path: str, text: str) -> bool:
    try:
        with open(path) as f:
            return f.read() == text
    except FileNotFoundError:
        return False


def synthesize(work: Work, maker: Maker, share: tuple[int, int] = (0, 1)) -> Tally | None:
    """Makes a process's share of the shards (its number, and how many there are), and if it ends last, the set. None
    where others are not ready.
    """
    with (
        begun(work),
        tqdm(
            desc=work.title, total=len(work.source) // share[1], unit="image", dynamic_ncols=True, disable=None
        ) as bar,
    ):
        for shard in range(share[0], len(work.source.paths), share[1]):
            make_shard(work.source, shard, work.path(shard), maker, work.batch, bar.update)
    return finish(work, maker)


def finish(work: Work, maker: Maker) -> Tally | None:
    """Moves the shards to where readers look for them, if all are finished; then the report of the whole split, else
    None.
    """
    with locked(work.folder):
        if is_made(work):
            return Tally.load(_tally_path(work))
        paths = [work.path(shard) for shard in range(len(work.source.paths))]
        if not all(os.path.exists(f"{path}.json") for path in paths):
            return None
        take_back(work.folder, work.split, paths)
        total, tally = Contents(), Tally(maker.kind, maker.name)
        shards = [Contents.load(f"{path}.json") for path in paths]
        for path, contents in zip(paths, shards):
            total.update(contents)
            tally.update(Tally.load(f"{path}.tally.json"))
        if not total.records:
            raise ValueError(f"nothing of {work.data} {work.split} can be read; prepare it again")
        tally.save(_tally_path(work))
        go_live(
            work.folder,
            work.split,
            moves(work.folder, work.split, paths, shards),
            _entry(work, maker.unique),
            total,
            work.fingerprint(),
        )
        shutil.rmtree(work.partial)
    return tally


def _tally_path(work: Work) -> str:
    return os.path.join(work.folder, f"{work.split}.synthesis.json")


def _entry(work: Work, unique: bool) -> DatasetInfo:
    """What `dataset.json` says of the new set's other splits. Raises ValueError where they are of another kind."""
    info = work.source.info
    spoken = any(info.expressions.values())
    unique = unique and (info.unique_texts or not spoken)
    own = dict(name=work.out, splits={}, class_images={}, expressions={}, source="synthesize", made_from=work.data)
    new = dataclasses.replace(info, **own, unique_texts=unique)
    if not os.path.exists(os.path.join(work.folder, "dataset.json")):
        return new
    old = DatasetInfo.load(work.folder)
    if old.source != "synthesize" or (old.classes, old.exhaustive, old.made_from) != (
        new.classes,
        new.exhaustive,
        new.made_from,
    ):
        raise ValueError(f"{work.folder} holds another data set: give another --out.")
    for part in (old.splits, old.class_images, old.expressions):
        part.pop(work.split, None)
    return dataclasses.replace(old, unique_texts=unique and (old.unique_texts or not old.splits)) if old.splits else new
