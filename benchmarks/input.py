"""Compare the speed of the full recipe's input with that of a torch DataLoader and of JPEG decoding alone.

    pip install -e '.[test,parity]'
    python benchmarks/input.py --source=FOLDER [--quality=99]

FOLDER holds the original files that `mqformer prepare small --source=FOLDER` reads. Its panoptic and referring training
sets are mixed as in configs/coco_ref.py, on a 1024 x 1024 canvas. The torch loaders (benchmarks/torch_input.py) read
the same images in the same proportions from the original JSON, PNG and JPEG files. "decoding" only decodes JPEGs in
memory with OpenCV. Each measurement runs in a separate process, on one core or on all cores. The loaders are measured
in turn, --repeats times, and a ratio is the median of the ratios of all rounds. The goals per core are 1.5 times the
speed of torch and half the speed of decoding.

Afterwards, the script prints the size of a batch on the device and the loader's memory over --memory_batches. The
script needs Linux.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from absl import flags, logging
from mqformer_jax.configs import coco_ref

from mqformer_jax.input.mixture import make_loader
from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.models.tokenizer import make_tokenizer
from mqformer_jax.prepare.datasets import small
from mqformer_jax.prepare.shards import write_split

SETS = (
    dict(name="coco_2017_panoptic", split="train", tasks=("panoptic",)),
    dict(name="refcoco", split="train", tasks=("referring",)),
)
BESIDE = ("torch", "torch, tuned", "decoding")  # each row of the table is compared with these rows
MEMORY_CANVAS, MEMORY_BATCH, MEMORY_READINGS = 256, 4, 20
FLAT = 0.05  # a process may grow by this fraction of its memory


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings of all measurements.

    root: folder of the records. source: folder of the original files. canvas: side in pixels. batch_size: images.
    seconds: length of a measurement. warm_up: seconds before it.
    """

    root: str
    source: str
    canvas: int
    batch_size: int
    seconds: float
    warm_up: float

    def recipe(self, seed: int, threads: int = 0, workers: int = 0) -> Any:
        """Return the config of configs/coco_ref.py with SETS."""
        config = coco_ref.full()
        config.seed, config.batch_size, config.eval.sets = seed, self.batch_size, ()
        # CLIP's tokenizer needs a file. All tokenizers cache their texts, so the choice does not affect the speed.
        config.model.text.tokenizer = "words"
        config.data.update(
            root=self.root, mixture=SETS, canvas=(self.canvas, self.canvas), threads=threads, workers=workers
        )
        return config

    def records(self, number: int) -> list[Record]:
        """Return the records of SETS[number]."""
        source = ShardSource(self.root, SETS[number]["name"], SETS[number]["split"])
        return [Record.from_bytes(source[i]) for i in range(len(source))]


# ---------------------------------------------------------------- endless streams of batches


def ours(setting: Setting, seed: int, threads: int = 0, workers: int = 0) -> Iterator[Any]:
    """Return the batches of this project's loader."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([sys.argv[0]])  # Grain passes absl's flags to its worker processes
    logging.set_verbosity(logging.WARNING)
    config = setting.recipe(seed, threads, workers)
    return make_loader(config, make_tokenizer(config.model.text)).batches()


def torch_loader(setting: Setting, seed: int, workers: int = 0, tuned: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Return the batches of the torch DataLoader, or of its optimized version (`tuned`)."""
    import torch_input  # here, because it needs torch, which is an optional dependency

    np.random.seed(seed)
    config = setting.recipe(seed)
    how = (config.data.to_dict(), make_tokenizer(config.model.text), tuned)
    names = [[record.key for record in setting.records(i)] for i in range(len(SETS))]
    kinds = (torch_input.Panoptic, torch_input.Referring)
    datasets = [kind(os.path.join(setting.source, "coco"), n, *how) for kind, n in zip(kinds, names)]
    return iter(
        torch_input.loader(
            datasets, mixed([*map(len, names)], config.data.size_exponent, seed), setting.batch_size, workers
        )
    )


def decoding(setting: Setting, seed: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield lists of the shapes of decoded images. No image is kept, so the next one reuses its memory."""
    files = [[np.frombuffer(record.image, np.uint8) for record in setting.records(i)] for i in range(len(SETS))]
    order = mixed([*map(len, files)], setting.recipe(seed).data.size_exponent, seed)
    while True:
        yield [
            cv2.imdecode(files[i][j], cv2.IMREAD_COLOR_RGB).shape
            for i, j in itertools.islice(order, setting.batch_size)
        ]


def mixed(sizes: Sequence[int], alpha: float, seed: int) -> Iterator[tuple[int, int]]:
    """Yield (data set, index) endlessly, in the proportions of our loader. Data sets are shuffled in every epoch.

    sizes: number of images of each data set. alpha: exponent of the sizes.
    """
    rng, weights = np.random.default_rng(seed), np.array(sizes, float) ** alpha
    streams = [
        itertools.chain.from_iterable(rng.permutation(size).tolist() for _ in itertools.count()) for size in sizes
    ]
    given = np.zeros(len(sizes))
    while True:
        i = int(np.argmin((given + 1) / weights))
        given[i] += 1
        yield i, next(streams[i])


# ---------------------------------------------------------------- speed


def alone(cores: set[int], measure: str, setting: Setting, *args: Any) -> Any:
    """Run a function of MEASURES in a new process that may use only these cores. Return its result."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        command = [sys.executable, __file__, "--alone", json.dumps([measure, dataclasses.asdict(setting), args])]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    finally:
        os.sched_setaffinity(0, before)


def rate(setting: Setting, seed: int, stream_of: str, options: dict[str, Any]) -> float:
    """Return the images per second over `setting.seconds`, measured `setting.warm_up` seconds after the first batch."""
    stream = STREAMS[stream_of](setting, seed, **options)
    next(stream)
    _count(stream, setting.warm_up)
    images, seconds = _count(stream, setting.seconds)
    return images / seconds


def _count(stream: Iterator[Any], seconds: float) -> tuple[int, float]:
    """Read batches for at least `seconds`. Return the number of images and the seconds that passed."""
    images, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        batch = next(stream)
        images += len(batch) if isinstance(batch, list) else len(batch.size)
    return images, passed


def speeds(contestants: dict[str, tuple[str, dict[str, Any]]], setting: Setting, cores: set[int], repeats: int) -> str:
    """Measure the contestants in turn. Return their rows of the table.

    contestants: {name: (name of the stream in STREAMS, its options)}. cores: cores that a contestant may use.
    """
    turns = [
        [alone(cores, "rate", setting, seed, *contestant) for contestant in contestants.values()]
        for seed in range(repeats)
    ]
    columns = dict(zip(contestants, zip(*turns)))
    rows = []
    for name, rates in columns.items():
        shown = [f"{value:.1f}" for value in (min(rates), statistics.median(rates), max(rates))]
        ratios = [
            statistics.median(a / b for a, b in zip(rates, columns[other])) if other in columns else None
            for other in BESIDE
        ]
        shown += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append(f"| {name} | {len(cores)} | {' | '.join(shown)} |")
    return "\n".join(rows)


# ---------------------------------------------------------------- size of batches


def weight(setting: Setting, batches: int = 8) -> str:
    """Return a table that compares our loader with the torch loader.

    It has the KB per image that each of them sends to the device, and the mean number of labels of an image.

    For our loader, the table also lists the five largest fields of a batch.
    """
    found = list(itertools.islice(ours(setting, 0), batches))
    theirs = list(itertools.chain.from_iterable(itertools.islice(torch_loader(setting, 0), batches)))
    images, names = len(theirs), [field.name for field in dataclasses.fields(found[0])]
    sizes = {name: sum(getattr(batch, name).nbytes for batch in found) / images / 1e3 for name in names}
    rows = [f"| ours: {name} | {sizes[name]:.0f} |" for name in sorted(names, key=sizes.get, reverse=True)[:5]]
    rows += [f"| ours: all | {sum(sizes.values()):.0f} |"]
    rows += [
        f"| torch | {sum(tensor.nbytes for example in theirs for tensor in example.values()) / images / 1e3:.0f} |"
    ]
    our_work = [
        sum(int(getattr(batch, name).sum()) for batch in found) / images
        for name in ("num_targets", "has_mask", "prompt_valid")
    ]
    their_work = [statistics.fmean(len(example[name]) for example in theirs) for name in ("boxes", "masks", "tokens")]
    work = [
        f"{name} {a:.1f} boxes, {b:.1f} masks, {c:.1f} prompts"
        for name, (a, b, c) in (("ours", our_work), ("torch", their_work))
    ]
    text = f"Means per image: {'; '.join(work)} (torch also counts objects that a crop removes)."
    return "\n".join(["| sent to the device | KB per image |", "|---|---|", *rows, "", text])


# ---------------------------------------------------------------- memory


def memory(setting: Setting, workers: int, batches: int) -> str:
    """Return a table of the memory of this process and of its worker processes over a number of batches.

    "warm" is the memory after the first tenth of the batches. The memory is flat if it ends within FLAT of this value.
    """
    stream, readings = ours(setting, 0, 1, workers), []
    for _ in range(MEMORY_READINGS):
        for _ in range(batches // MEMORY_READINGS):
            next(stream)
        readings.append((resident(os.getpid()), sum(map(resident, children()))))
    rows = [f"| MB over {batches} batches | warm | last | largest | flat |", "|---|---|---|---|---|"]
    for name, values in zip(("loader", f"its {workers} workers"), zip(*readings[MEMORY_READINGS // 10 - 1 :])):
        flat = values[-1] <= (1 + FLAT) * values[0]
        rows.append(f"| {name} | {values[0]:.0f} | {values[-1]:.0f} | {max(values):.0f} | {'yes' if flat else 'no'} |")
    return "\n".join(rows)


def children() -> list[int]:
    """Return the ids of this process's child processes."""
    pids = []
    for path in glob.glob("/proc/self/task/*/children"):
        with open(path) as f:
            pids += map(int, f.read().split())
    return pids


def resident(pid: int) -> float:
    """Return the resident memory in MB. A page shared by several processes counts for each."""
    with open(f"/proc/{pid}/status") as f:
        return sum(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS:"))


# ---------------------------------------------------------------- files that all loaders read


def prepare(source: str, folder: str, quality: int | None) -> tuple[str, str]:
    """Prepare the records in `folder`. Return the folder of the records and the folder of the original files.

    The original files are in `source`, or, if `quality` is given, in a copy with JPEGs of this quality.
    """
    if quality is not None:
        source = reencoded(source, os.path.join(folder, "source"), quality)
    root = os.path.join(folder, "records")
    wanted = {(entry["name"], entry["split"]) for entry in SETS}
    for name, split, plan in small.plans(source):
        if (name, split) in wanted:
            print(write_split(root, name, split, plan), file=sys.stderr)
            wanted.remove((name, split))
        if not wanted:
            break
    return root, source


def reencoded(source: str, folder: str, quality: int) -> str:
    """Copy SOURCE/coco to `folder` with JPEGs of this quality. Other files become links. Return `folder`."""
    theirs, own = os.path.abspath(os.path.join(source, "coco")), os.path.join(folder, "coco")
    os.makedirs(os.path.join(own, "images"))
    for entry in os.listdir(theirs):
        if entry != "images":
            os.symlink(os.path.join(theirs, entry), os.path.join(own, entry))
    for name in os.listdir(os.path.join(theirs, "images")):
        image = cv2.imread(os.path.join(theirs, "images", name))
        cv2.imwrite(os.path.join(own, "images", name), image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return folder


STREAMS = {"ours": ours, "torch": torch_loader, "decoding": decoding}
MEASURES = {"rate": rate, "weight": weight, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", help="Folder that `mqformer prepare small --source` reads.")
    what.add_argument("--alone", help=argparse.SUPPRESS)  # run one measurement; used by the function `alone`
    parser.add_argument(
        "--quality",
        type=int,
        help="Encode the JPEGs again with this quality. (default: keep the files; COCO's have 163 KB on average)",
    )
    parser.add_argument("--canvas", type=int, default=1024, help="Side of the canvas, pixels. (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="Images per batch. (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="Seconds of one measurement. (default: %(default)s)")
    parser.add_argument(
        "--warm_up", type=float, default=10, help="Seconds before a measurement. (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="Number of rounds. (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="Number of threads, and of worker processes, in measurements on several cores. (default: %(default)s)",
    )
    parser.add_argument(
        "--memory_batches",
        type=int,
        default=10_000,
        help="Number of batches of the memory measurement; 0 skips it. (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.alone:
        measure, setting, rest = json.loads(args.alone)
        print(json.dumps(MEASURES[measure](Setting(**setting), *rest)))
        return
    cores, n = os.sched_getaffinity(0), args.workers
    os.environ["PYTHONWARNINGS"] = (
        "ignore::UserWarning:multiprocessing.resource_tracker"  # it warns about Grain's prefetched batches
    )
    with tempfile.TemporaryDirectory() as folder:
        root, source = prepare(args.source, folder, args.quality)
        setting = Setting(root, source, args.canvas, args.batch_size, args.seconds, args.warm_up)
        sizes = [len(record.image) for i in range(len(SETS)) for record in setting.records(i)]
        print(
            f"{len(sizes)} JPEGs of {statistics.fmean(sizes) / 1e3:.0f} KB on average, canvas {args.canvas}, "
            f"batches of {args.batch_size}\n"
        )
        print(
            f"| images/s | cores | min | median | max | {' | '.join(f'relative to {name}' for name in BESIDE)} |"
            f"\n|{'---|' * 8}",
            flush=True,
        )
        one = {
            "ours": ("ours", {}),
            "torch": ("torch", {}),
            "torch, tuned": ("torch", {"tuned": True}),
            "decoding": ("decoding", {}),
        }
        print(speeds(one, setting, {max(cores)}, args.repeats), flush=True)
        several = {
            f"ours, {n} threads": ("ours", {"threads": n}),
            f"ours, {n} workers": ("ours", {"threads": 1, "workers": n}),
            "torch": ("torch", {"workers": n}),
            "torch, tuned": ("torch", {"workers": n, "tuned": True}),
        }
        print(speeds(several, setting, cores, args.repeats), flush=True)
        print(f"\n{alone(cores, 'weight', setting)}", flush=True)
        if args.memory_batches:
            smaller = dataclasses.replace(setting, canvas=MEMORY_CANVAS, batch_size=MEMORY_BATCH)
            print(
                f"\nBatches of {MEMORY_BATCH} at canvas {MEMORY_CANVAS}:\n\n"
                f"{alone(cores, 'memory', smaller, n, args.memory_batches)}"
            )


if __name__ == "__main__":
    main()
