"""Jobs (one for each image), plans (one for each split), and the report of a finished preparation."""

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
    """One image to be converted to a record.

    key: the record's key.
    id: the image's id in annotation files (see `Plan.without`).
    image: path of the image file.
    labels: the annotations, in the form that `Plan.make` expects. If they are in a file of their own, give its path or
        a tuple that contains it: a resumed preparation then checks whether the file changed. (Only strings with a "/"
        count as paths.) `labels` must pickle to the same bytes in every run, so it must not contain sets of strings.
    origin: see `Record`. `coco_origin` returns it for images of COCO.
    """

    key: str
    id: int | str
    image: str
    labels: Any
    origin: str = ""


def coco_origin(name: str) -> str:
    """Return the origin of the COCO image with this file name, e.g. "coco/391895", or "" for any other name."""
    found = re.fullmatch(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})\.jpg", os.path.basename(name))
    return f"coco/{int(found[1])}" if found else ""


@dataclasses.dataclass
class Plan:
    """A split that is ready to be prepared.

    kind: the subcommand of `mqformer prepare`, or "script" for a plan of your own. make: function that converts a job
    to a `Built` in a worker process. problems: problems that were found before any job ran. exhaustive, unique_texts:
    see `DatasetInfo`.
    """

    kind: str
    classes: tuple[ClassInfo, ...]
    jobs: list[Any]
    make: Callable[[Any], Built]
    exhaustive: bool = True
    problems: Problems = dataclasses.field(default_factory=Problems)
    unique_texts: bool = True

    def only(self, keep: Callable[[Job], bool]) -> Plan:
        """Return a copy of the plan with only the jobs for which `keep` returns true."""
        problems = Problems()
        problems.update(self.problems)
        return dataclasses.replace(self, jobs=[job for job in self.jobs if keep(job)], problems=problems)

    def held_out(self, fraction: float) -> set[str]:
        """Return the keys of the images to hold out: `fraction` of all images, but at least one and not all.

        A hash of the keys determines the choice. Raises ValueError if there are fewer than two images.
        """
        keys = sorted({job.key for job in self.jobs}, key=lambda key: hashlib.sha256(key.encode()).digest())
        if len(keys) < 2:
            raise ValueError(f"--val_fraction needs at least two images, but there are {len(keys)}; leave it out")
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
        """Return a line for each kind of problem, most frequent first: the count, the problem, up to three examples.

        A problem is a dropped item, or a note about a kept one, e.g. a box that was clipped to its image.
        """
        shown = []
        for reason, count in self.problems.counts.most_common():
            names = self.problems.examples[reason]
            shown.append(f"{count} x {reason} ({', '.join(names)}{', …' * (count > len(names))})")
        return shown


def build(make_record: Callable[[Job, Image, Problems], Record], job: Job) -> Built:
    """Read the image of a job, make its record, and return both the record and the problems as a `Built`.

    An error that makes the image unusable is not raised. Instead, the result has no record and counts the error as a
    problem.
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
    ) as e:  # what malformed annotations can cause
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
