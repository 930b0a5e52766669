"""What is to be prepared: jobs (one image each), the plan of a split, and what came of it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Set
from typing import Any

from mqformer_jax.input.record import ClassInfo, Record
from mqformer_jax.prepare.formats.images import Image, Unusable, read_image
from mqformer_jax.prepare.shard_writer import Built, Problems

HELD_OUT = "image: held out for evaluation by another set"


@dataclasses.dataclass
class Job:
    """One image to be made a record. id: what other annotation files call it. labels: whatever its family needs.

    Paths of files belong in `labels` itself or in tuples of it, where a preparation that goes on looks whether they
    changed.
    It must pickle alike on every run: no sets of strings.
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
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
    ) as e:  # a json can hold anything anywhere
        problems.add(
            "image: its annotation is malformed",
            f"{job.key}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}",
        )
    else:
        return Built.of(record, problems)
    return Built(None, collections.Counter(), problems)


def builder(make_record: Callable[..., Record], **context: Any) -> Callable[[Job], Built]:
    """`build` for one family of records; `context` is passed on as keywords. Goes to worker processes."""
    return functools.partial(build, functools.partial(make_record, **context))
