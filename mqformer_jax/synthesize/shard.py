"""One shard: its records are asked about in batches, the answers noted as they come, and at the end the records written
with them.

00003.answers           the verdicts on the records so far, one msgpack map a record, in their order
00003.array_record      the finished shard; then .tally.json, what the report needs; then .json, its contents
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
from mqformer_jax.synthesize.makers import Maker
from mqformer_jax.synthesize.report import Tally
from mqformer_jax.synthesize.teachers import Picture
from mqformer_jax.synthesize.verdicts import Verdict, usable_box, with_verdicts


def make_shard(
    source: ShardSource,
    shard: int,
    path: str,
    maker: Maker,
    batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Makes one shard of a source, from where an earlier call was stopped.

    path: of its files, without their endings. batch: pictures that the teacher is given at once. progress: told how
    many more records are done. Raises ValueError where another process makes the same shard.
    """
    if os.path.exists(f"{path}.json"):
        return progress(Contents.load(f"{path}.json").records)
    with open(f"{path}.answers", "a+b") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process makes this shard; give each process its own --share.") from None
        except OSError:
            pass  # a file system without locks
        done = _whole_answers(log)
        progress(done)
        for asked in _ahead(_batches(_records(source.paths[shard], done), source.info, maker, batch)):
            for verdicts in _ask(maker, asked):
                log.write(msgpack.packb([dataclasses.asdict(v) for v in verdicts]))
            log.flush()
            os.fsync(log.fileno())
            progress(len(asked.done))
        log.seek(0)
        write_shard(_built(source, shard, log, maker, f"{path}.tally.json"), path)
    os.remove(f"{path}.answers")


@dataclasses.dataclass
class Batch:
    """Records that are asked about together. done: all of them by number; pictures: of those with a box to ask about,
    and whose they are.

    refused: verdicts that need no teacher, by number.
    """

    done: list[int]
    pictures: list[Picture]
    owners: list[int]
    refused: dict[int, list[Verdict]]


def _batches(
    records: Iterable[tuple[int, bytes | None]], info: DatasetInfo, maker: Maker, size: int
) -> Iterator[Batch]:
    batch = Batch([], [], [], {})
    for number, data in records:
        batch.done.append(number)
        picture, batch.refused[number] = _picture(data, info, maker)
        if picture is not None:
            batch.pictures.append(picture)
            batch.owners.append(number)
        if len(batch.pictures) == size or len(batch.done) == 64 * size:
            yield batch
            batch = Batch([], [], [], {})
    if batch.done:
        yield batch


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; the next is read and decoded while a teacher works on one."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield batch


def _picture(data: bytes | None, info: DatasetInfo, maker: Maker) -> tuple[Picture | None, list[Verdict]]:
    """What a teacher is asked about a record, and the boxes that it cannot be asked about."""
    try:
        record = Record.from_bytes(data or b"")
        boxes = {i: usable_box(record, i) for i in maker.wanted(record, info)}
        refused = [Verdict(i, box) for i, box in boxes.items() if isinstance(box, str)]
        asked = [i for i, box in boxes.items() if not isinstance(box, str)]
        if not asked:
            return None, refused
        try:
            image = record.decode_image()
        except BadRecord:
            return None, refused + [Verdict(i, "the image cannot be decoded") for i in asked]
        return Picture(record, info, image, tuple(asked), np.stack([boxes[i] for i in asked])), refused
    except BadRecord:  # counted where the record is written
        return None, []


def _ask(maker: Maker, batch: Batch) -> Iterator[list[Verdict]]:
    answers = dict(zip(batch.owners, maker(batch.pictures))) if batch.pictures else {}
    for number in batch.done:
        yield batch.refused[number] + answers.get(number, [])


def _records(path: str, start: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """The records of a shard from a number on; None for one that is damaged."""
    reader = ArrayRecordReader(path)
    try:
        for number in range(start, reader.num_records()):
            try:
                yield number, reader.read([number])[0]
            except RuntimeError:
                yield number, None
    finally:
        reader.close()


def _whole_answers(log: BinaryIO) -> int:
    """How many records the log has whole answers for; what follows the last of them, cut short by a kill, is cut
    off.
    """
    log.seek(0)
    unpacker, count, end = msgpack.Unpacker(log, raw=False), 0, 0
    with contextlib.suppress(ValueError, msgpack.UnpackException):
        for answer in unpacker:
            if not isinstance(answer, list):  # what a machine without power wrote
                break
            count, end = count + 1, unpacker.tell()
    log.truncate(end)
    log.seek(0, os.SEEK_END)
    return count


def _built(source: ShardSource, shard: int, log: BinaryIO, maker: Maker, tally_path: str) -> Iterator[Built]:
    """The records with their answers; then writes what the report needs."""
    tally = Tally(maker.kind, maker.name)
    for (number, data), answers in zip(_records(source.paths[shard]), msgpack.Unpacker(log, raw=False)):
        problems = Problems()
        try:
            record = Record.from_bytes(data) if data is not None else None
        except BadRecord:
            record = None
        if record is None:
            problems.add("image: the record is damaged", f"shard {shard}, record {number}")
            yield Built(None, collections.Counter(), problems)
            continue
        verdicts = [Verdict.of(answer) for answer in answers]
        tally.add(record, source.info, (shard, number), verdicts)
        for reason in {v.reason for v in verdicts if v.reason.startswith("the image")}:
            problems.add(f"image: {reason[10:]}", record.key)
        yield Built.of(with_verdicts(record, verdicts, maker.name), problems)
    tally.save(tally_path)
