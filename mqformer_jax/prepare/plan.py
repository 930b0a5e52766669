"""Jobs (one image each), the plan of a split, and the report on its preparation."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Set
from typing import Any

from mqformer_jax.input.record import ClassInfo, Record
from mqformer_jax.prepare.formats.images import Image, Unusable, read_image
from mqformer_jax.prepare.shard_writer import Built, Problems

HELD_OUT = "image: held out for evaluation by another data set"


@dataclasses.dataclass
class Job:
    """One image to be turned into a record.

    key: the record's key. id: identifies the image in annotation files (see `Plan.without`). image: path of the image
    file. labels: the annotations, which `Plan.make` reads. Put paths of files into `labels` directly or in tuples: a
    resumed preparation checks whether these files changed. `labels` must pickle identically in every run, so it must
    not contain sets of strings. origin: see `Record`. `coco_origin` recognizes COCO's images by their file names.
    """

    key: str
    id: int | str
    image: str
    labels: Any
    origin: str = ""


def coco_origin(name: str) -> str:
    """Return "coco/391895" for the file name of a COCO image (2014 or 2017), and "" for any other file name."""
    found = re.fullmatch(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})\.jpg", os.path.basename(name))
    return f"coco/{int(found[1])}" if found else ""


@dataclasses.dataclass
class Plan:
    """A split that is ready to be prepared.

    kind: the subcommand. make: turns a job into `Built` in a worker process. problems: those found before the jobs run.
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
        """Return a plan with only the jobs for which `keep` is true."""
        problems = Problems()
        problems.update(self.problems)
        return dataclasses.replace(self, jobs=[job for job in self.jobs if keep(job)], problems=problems)

    def held_out(self, fraction: float) -> set[str]:
        """Return the keys of a fraction of the images, at least one and not all.

        A hash of the keys determines the choice. Raises ValueError for fewer than two images.
        """
        keys = sorted({job.key for job in self.jobs}, key=lambda key: hashlib.sha256(key.encode()).digest())
        if len(keys) < 2:
            raise ValueError(f"--val_fraction needs at least two images, but the split has {len(keys)}; leave it out")
        return set(keys[: min(max(round(fraction * len(keys)), 1), len(keys) - 1)])

    def without(self, held_out: Set[int | str]) -> Plan:
        """Return a plan without the images that another data set evaluates on. Each such image counts as dropped.

        held_out: the ids (`Job.id`) of these images.
        """
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
        """Return one text per kind of problem, most frequent first: its count, the problem and up to three examples.

        Problems are dropped items and notes about kept ones, e.g. boxes that were clipped to their image.
        """
        shown = []
        for reason, count in self.problems.counts.most_common():
            names = self.problems.examples[reason]
            shown.append(f"{count} x {reason} ({', '.join(names)}{', …' * (count > len(names))})")
        return shown


def build(make_record: Callable[[Job, Image, Problems], Record], job: Job) -> Built:
    """Return the result of a job: read its image and make its record.

    An error that makes the image unusable is counted in the result, not raised.
    """
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
    ) as e:  # a JSON file can contain anything
        problems.add(
            "image: its annotation is malformed",
            f"{job.key}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}",
        )
    else:
        return Built.of(record, problems)
    return Built(None, collections.Counter(), problems)


def builder(make_record: Callable[..., Record], **context: Any) -> Callable[[Job], Built]:
    """Return a picklable function that maps a job to `build(make_record, job)`.

    context: further keyword arguments of `make_record`.
    """
    return functools.partial(build, functools.partial(make_record, **context))
