"""Write shards atomically, and list a split in `dataset.json` only when all of its shards are finished.

After a shard is written, its statistics (`Contents`) are written beside it as JSON. `<split>.report.json` holds the
statistics of the whole split.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Generator, Iterable, Sequence, Set

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mqformer_jax.files import replace_file, write_text
from mqformer_jax.input.record import DatasetInfo, Record, origins_path, shard_paths


@dataclasses.dataclass
class Problems:
    """Dropped items, and notes about kept items: for each reason, the count and the names of the first three."""

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
class Built:
    """The result of a job: the record's bytes (None if the image was dropped), segment counts by kind, and problems.

    classes: indices of the classes that the image shows. origin: see `Record`.
    """

    record: bytes | None
    segments: collections.Counter[str]
    problems: Problems
    classes: Set[int] = frozenset()
    origin: str = ""

    @classmethod
    def of(cls, record: Record, problems: Problems) -> Built:
        classes = {s.class_id for s in record.segments if s.class_id is not None and not (s.crowd or s.foreground)}
        return cls(record.to_bytes(), count_segments(record), problems, classes, record.origin)


def count_segments(record: Record) -> collections.Counter[str]:
    """Return the numbers of segments of each kind (mask, box only, crowd, matte, ...) and of expressions."""
    counts: collections.Counter[str] = collections.Counter()
    for s in record.segments:
        shape = "matte" if s.alpha else "mask" if s.mask else "box only"
        counts["crowd" if s.crowd else f"foreground {shape}" if s.foreground else shape] += 1
        counts["synthetic mask"] += bool(s.mask_by)
        counts["synthetic expression"] += len(s.captions)
        counts["expression"] += len(s.texts) + len(s.captions)
    counts["expression of nothing"] += len(record.absent_texts)
    return +counts


@dataclasses.dataclass
class Contents:
    """Statistics of one or more shards.

    shards: number of shards that hold records; a shard without records has no file. bytes: size of the files.
    class_images: {class index: number of images that show the class}. origins: the `origin` of each record (see
    `Record`), in order. fingerprint: a hash of the plan and of the code that prepares it, or "" for a part of
    a split.
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
        write_text(path, json.dumps({**vars(self), "problems": vars(self.problems)}))

    @classmethod
    def load(cls, path: str) -> Contents:
        with open(path) as f:
            fields = json.load(f)
        fields["segments"] = collections.Counter(fields["segments"])
        fields["class_images"] = collections.Counter({int(i): count for i, count in fields["class_images"].items()})
        problems = fields.pop("problems")
        return cls(**fields, problems=Problems(collections.Counter(problems["counts"]), problems["examples"]))


def write_shard(made: Iterable[Built], path: str) -> Contents:
    """Write the records of a shard to `path`.array_record and their statistics to `path`.json. Return the statistics.

    made: the results of the jobs. Each record is written as soon as it is made. Raises OSError if a file cannot be
    written.
    """
    contents, temporary = Contents(), f"{path}.{os.getpid()}.tmp"
    try:
        writer = ArrayRecordWriter(temporary, "group_size:1")
        for built in made:
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
            raise OSError(
                f"{path}: only {written} of {contents.records} records were written; "
                "check that the disk has free space, then run the same command to resume"
            )
        if contents.records:
            contents.bytes = os.path.getsize(temporary)
            replace_file(temporary, f"{path}.array_record")
        contents.save(f"{path}.json")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return contents


@contextlib.contextmanager
def _write_errors(path: str) -> Generator[None]:
    """Convert ArrayRecord's RuntimeErrors to OSErrors. Of each message, keep only the first clause."""
    try:
        yield
    except RuntimeError as e:
        raise OSError(
            f"{path}: cannot be written ({str(e).split(';')[0]}); "
            "check that the disk has free space, then run the same command to resume"
        ) from None


@contextlib.contextmanager
def locked(folder: str, busy: str = "", shared: bool = False) -> Generator[None]:
    """Hold a lock on a folder inside this context.

    If another process holds the lock, wait or, if `busy` is given, raise ValueError with this message. On file systems
    without locks, do nothing. shared: several processes may hold a shared lock at once.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError:
        os.close(handle)
        raise ValueError(busy) from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


def report_path(folder: str, split: str) -> str:
    return os.path.join(folder, f"{split}.report.json")


def publish_files(
    folder: str, split: str, moves: Iterable[tuple[str, str]], info: DatasetInfo, total: Contents, key: str
) -> None:
    """Move finished shards into the data set's folder and list the split in `dataset.json`.

    moves: (temporary path, final path) of each shard. info: `dataset.json` without this split. total: statistics of all
    shards. key: fingerprint of the plan.
    """
    # Only the last line lists the split in dataset.json, so that no reader mixes old and new shards.
    info.save(folder)
    remove(folder, rf"{re.escape(split)}-\d{{5}}-of-\d{{5}}\.array_record")
    remove(folder, re.escape(os.path.basename(origins_path(folder, split))))
    remove(folder, re.escape(os.path.basename(report_path(folder, split))))
    for made, live in moves:
        os.replace(made, live)
    if any(total.origins):
        write_text(origins_path(folder, split), "".join(f"{origin}\n" for origin in total.origins))
    dataclasses.replace(total, origins=list(filter(None, total.origins))[:1], fingerprint=key).save(
        report_path(folder, split)
    )
    info.splits[split] = total.records
    info.expressions[split] = total.segments["expression"] + total.segments["expression of nothing"]
    if info.classes:
        info.class_images[split] = tuple(total.class_images[i] for i in range(len(info.classes)))
    info.save(folder)


def prepared(folder: str, split: str, key: str) -> Contents | None:
    """Return the statistics of the split if it is complete and has the fingerprint `key`, else None."""
    try:
        contents = Contents.load(report_path(folder, split))
        shards = shard_paths(folder, split, contents.shards)
        whole = split in DatasetInfo.load(folder).splits and sum(map(os.path.getsize, shards)) == contents.bytes
        whole &= os.path.exists(origins_path(folder, split)) == bool(contents.origins)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return contents if whole and contents.fingerprint == key else None


def moves(folder: str, split: str, paths: Sequence[str], shards: Sequence[Contents]) -> list[tuple[str, str]]:
    """Return (temporary path, final path) of each shard that holds records.

    paths: temporary paths of all shards, without extension. shards: their contents.
    """
    made = [f"{path}.array_record" for path, shard in zip(paths, shards) if shard.records]
    return list(zip(made, shard_paths(folder, split, len(made))))


def restore_files(folder: str, split: str, paths: Sequence[str]) -> None:
    """Move shards back to `paths` if a preparation was killed while it published them.

    `publish_files` moves the shards before it lists the split in `dataset.json`. paths: see `moves`.
    """
    entered = os.path.exists(os.path.join(folder, "dataset.json")) and split in DatasetInfo.load(folder).splits
    if entered or not all(os.path.exists(f"{path}.json") for path in paths):
        return
    for made, live in moves(folder, split, paths, [Contents.load(f"{path}.json") for path in paths]):
        # Old shards are removed before the first move, so `live` is a new shard.
        if not os.path.exists(made) and os.path.exists(live):
            os.replace(live, made)


def remove(folder: str, pattern: str) -> None:
    for name in os.listdir(folder):
        if re.fullmatch(pattern, name):
            os.remove(os.path.join(folder, name))
