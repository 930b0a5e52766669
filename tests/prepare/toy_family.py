"""A family of 24 images that can be stopped in the middle, for test_shards.py; worker processes import it and little
else.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import time

import numpy as np

from mqformer_jax.input.record import ClassInfo, Record, Segment
from mqformer_jax.prepare import plan, shards

CLASSES = (ClassInfo(("cat",)), ClassInfo(("sky",), is_region=True), ClassInfo(("dog",)))
COUNT, SHARDS = 24, 6


def make(job, log, act=None, greeting=""):
    """Number 5 is dropped, even ones show cats, each third a crowd of dogs. Every job is noted in `log`.

    At job 9 it waits while there is a file `log`/wait, and does `act` while there is one `log`/act.
    """
    (log / f"{job.key}.{time.monotonic_ns()}").touch()
    if job.key == "09" and (log / "act").exists():
        act()
    while job.key == "09" and (log / "wait").exists():
        time.sleep(0.01)
    problems = plan.Problems()
    if int(job.key) % 7 == 1:
        problems.add("note: a Sunday", job.key)
    if int(job.key) == 5:
        problems.add("image: nobody likes it", job.key)
        return plan.Built(None, collections.Counter(), problems)
    cats = [Segment(0, (greeting,), (0.0, 0.0, 1.0, 1.0))] * 2 if int(job.key) % 2 == 0 else []
    dogs = [Segment(2, box=(0.0, 0.0, 1.0, 1.0), crowd=True)] if int(job.key) % 3 == 0 else []
    hidden = [Segment(1, box=(0.0, 0.0, 1.0, 1.0), foreground=True)]
    image = pathlib.Path(job.image).read_bytes()
    return plan.Built.of(Record(job.key, image, 1, 1, tuple(cats + dogs + hidden), origin=job.origin), problems)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


@dataclasses.dataclass
class Toy:
    """The family in a folder: pictures, the log of `make`, and where it is prepared."""

    root: pathlib.Path
    act: object = None

    def __post_init__(self):
        for folder in (self.pictures, self.log):
            folder.mkdir(parents=True, exist_ok=True)
        for i in range(COUNT):
            path = self.pictures / f"{i:02d}.jpg"
            if not path.exists():
                path.write_bytes(np.random.default_rng(i).bytes(1000))

    pictures = property(lambda self: self.root / "pictures")
    # joined once: Python 3.13 pickles a path as the parts it was made from, and the pickle is in the fingerprint
    log = property(lambda self: pathlib.Path(os.path.join(self.root, "log")))
    folder = property(lambda self: self.root / "out" / "toy")
    partial = property(lambda self: self.folder / "train.partial")

    def plan(self, **context):
        jobs = [
            plan.Job(f"{i:02d}", i, str(self.pictures / f"{i:02d}.jpg"), {"of": i}, f"coco/{i}" * (i % 4 > 0))
            for i in range(COUNT)
        ]
        return plan.Plan("toy", CLASSES, jobs, functools.partial(make, log=self.log, act=self.act, **context))

    def prepare(self, plan=None, workers=1):
        with shards.worker_pool(workers) as pool:
            return shards.write_split(str(self.root / "out"), "toy", "train", plan or self.plan(), pool)

    @contextlib.contextmanager
    def acting(self, what):
        """`act` at job 9 within, and only there; it stays part of the plan."""
        self.act = what
        (self.log / "act").touch()
        yield
        (self.log / "act").unlink()

    def made(self):
        """How often each job was done since the last look."""
        names = [path for path in self.log.iterdir() if path.suffix]
        for path in names:
            path.unlink()
        return collections.Counter(path.stem for path in names)

    def result(self):
        """All that a reader can see: file by file, bytes by bytes; but for what the files it was made of were
        called.
        """
        found = {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}
        report = json.loads(found["train.report.json"])
        assert len(report.pop("fingerprint")) == 64
        return found | {"train.report.json": report}
