"""Annotate one shard: log the annotations of each batch of records, then write the records with their annotations.

00003.annotations       log: one msgpack list of annotations per record, in order
00003.tally.json        counts for the report
00003.array_record      the finished shard
00003.json              statistics of the shard; written last
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mqformer_jax.input.record import BadRecord, DatasetInfo, Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare.shard_writer import Built, Contents, Problems, write_shard
from mqformer_jax.synthesize.annotations import Annotation, usable_box, with_annotations
from mqformer_jax.synthesize.annotators import Annotator
from mqformer_jax.synthesize.report import Tally
from mqformer_jax.synthesize.teachers import Picture


def make_shard(
    source: ShardSource,
    shard: int,
    path: str,
    annotator: Annotator,
    batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Annotate one shard of a source. Resume if an earlier call was interrupted.

    path: path of the new shard's files, without extension. batch: images per call of the teacher. progress: called with
    the number of records that are newly done. Raises ValueError if another process is working on the same shard.
    """
    if os.path.exists(f"{path}.json"):
        return progress(Contents.load(f"{path}.json").records)
    with open(f"{path}.annotations", "a+b") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path}: another process is working on this shard; give each process its own --worker."
            ) from None
        except OSError:
            pass  # the file system has no locks
        done = _count_complete(log)
        progress(done)
        for current in _prefetch(_batches(_records(source.paths[shard], done), source.info, annotator, batch)):
            for annotations in _annotate(annotator, current):
                log.write(msgpack.packb([dataclasses.asdict(annotation) for annotation in annotations]))
            log.flush()
            os.fsync(log.fileno())
            progress(len(current.done))
        log.seek(0)
        write_shard(_annotated(source, shard, log, annotator, f"{path}.tally.json"), path)
    os.remove(f"{path}.annotations")


@dataclasses.dataclass
class Batch:
    """Records that are annotated in one call of the teacher.

    done: the numbers of all records of the batch. pictures: the images with at least one usable box. owners: the record
    number of each picture. unusable: {record number: annotations of its unusable boxes}. The teacher does not see these
    boxes.
    """

    done: list[int]
    pictures: list[Picture]
    owners: list[int]
    unusable: dict[int, list[Annotation]]


def _batches(
    records: Iterable[tuple[int, bytes | None]], info: DatasetInfo, annotator: Annotator, size: int
) -> Iterator[Batch]:
    batch = Batch([], [], [], {})
    for number, data in records:
        batch.done.append(number)
        picture, batch.unusable[number] = _picture(data, info, annotator)
        if picture is not None:
            batch.pictures.append(picture)
            batch.owners.append(number)
        if len(batch.pictures) == size or len(batch.done) == 64 * size:
            yield batch
            batch = Batch([], [], [], {})
    if batch.done:
        yield batch


def _prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches, reading and decoding the next one in a thread."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield batch


def _picture(data: bytes | None, info: DatasetInfo, annotator: Annotator) -> tuple[Picture | None, list[Annotation]]:
    """Return a record's image with its usable boxes (None if it has none), and annotations of its unusable boxes."""
    try:
        record = Record.from_bytes(data or b"")
        boxes = {i: usable_box(record, i) for i in annotator.wanted(record, info)}
        unusable = [Annotation(i, box) for i, box in boxes.items() if isinstance(box, str)]
        usable = [i for i, box in boxes.items() if not isinstance(box, str)]
        if not usable:
            return None, unusable
        try:
            image = record.decode_image()
        except BadRecord:
            return None, unusable + [Annotation(i, "the image cannot be decoded") for i in usable]
        return Picture(record, info, image, tuple(usable), np.stack([boxes[i] for i in usable])), unusable
    except BadRecord:  # reported when the record is written
        return None, []


def _annotate(annotator: Annotator, batch: Batch) -> Iterator[list[Annotation]]:
    found = dict(zip(batch.owners, annotator(batch.pictures))) if batch.pictures else {}
    for number in batch.done:
        yield batch.unusable[number] + found.get(number, [])


def _records(path: str, start: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, bytes) of the records of a shard, starting at number `start`.

    The bytes of a damaged record are None.
    """
    reader = ArrayRecordReader(path)
    try:
        for number in range(start, reader.num_records()):
            try:
                yield number, reader.read([number])[0]
            except RuntimeError:
                yield number, None
    finally:
        reader.close()


def _count_complete(log: BinaryIO) -> int:
    """Return the number of complete entries of the log. Truncate an incomplete entry at its end."""
    log.seek(0)
    unpacker, count, end = msgpack.Unpacker(log, raw=False), 0, 0
    with contextlib.suppress(ValueError, msgpack.UnpackException):
        for entry in unpacker:
            if not isinstance(entry, list):  # a power failure can leave garbage
                break
            count, end = count + 1, unpacker.tell()
    log.truncate(end)
    log.seek(0, os.SEEK_END)
    return count


def _annotated(
    source: ShardSource, shard: int, log: BinaryIO, annotator: Annotator, tally_path: str
) -> Iterator[Built]:
    """Yield the records with their annotations, then write the tally."""
    tally = Tally(annotator.kind, annotator.name)
    for (number, data), entry in zip(_records(source.paths[shard]), msgpack.Unpacker(log, raw=False)):
        problems = Problems()
        try:
            record = Record.from_bytes(data) if data is not None else None
        except BadRecord:
            record = None
        if record is None:
            problems.add("image: the record is damaged", f"shard {shard}, record {number}")
            yield Built(None, collections.Counter(), problems)
            continue
        annotations = [Annotation.of(fields) for fields in entry]
        tally.add(record, source.info, (shard, number), annotations)
        for reason in {a.reason for a in annotations if a.reason.startswith("the image")}:
            problems.add(f"image: {reason[10:]}", record.key)
        yield Built.of(with_annotations(record, annotations, annotator.name), problems)
    tally.save(tally_path)
