"""Several prepared data sets mixed into one endless, exactly resumable stream of batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import cv2
import grain
import numpy as np
from absl import logging

from mqformer_jax.input.batch import Batch, BatchSpec, PackedExample, collate, pack_example
from mqformer_jax.input.example import Example
from mqformer_jax.input.holdout import Part, exclude_eval_images
from mqformer_jax.input.prompts import choose_prompts
from mqformer_jax.input.record import BadRecord, ClassInfo, DatasetInfo, Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.input.tasks import needs_whole_image, to_example
from mqformer_jax.input.transforms import color_jitter, fit, random_flip, resize_crop
from mqformer_jax.interrupts import deaf_children

MAX_IN_A_ROW = 64  # unusable records, after which a data set is taken to be broken
FEW = 1000  # records before which the share of unusable ones is taken of so many

# the loader works on many images at once; OpenCV's own threads would only fight over the same cores
cv2.setNumThreads(1)


@runtime_checkable
class Source(Protocol):
    """What the loader asks of a data set: random access to the bytes of its records."""

    info: DatasetInfo
    name: str
    split: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class Note:
    """What the Batch does not say of a row. key: "dataset/image". texts: its prompts in words.

    bad: the records that were unusable on the way to this one: (number, what is wrong).
    """

    key: str
    texts: tuple[str, ...]
    bad: tuple[tuple[int, str], ...]


def make_loader(config: Any, tokenizer: Callable[[Sequence[str]], np.ndarray]) -> Loader:
    """Opens the data sets of `config.data.mixture` under `config.data.root`, without the images that others evaluate
    on.

    Raises FileNotFoundError, ValueError.
    """
    data = config.data
    sources = [ShardSource(data.root, entry["name"], entry["split"]) for entry in data.mixture]
    if not data.leak_guard:
        return Loader(sources, config, tokenizer)
    sources, report = exclude_eval_images(sources, data.root, config.eval.sets)
    return Loader(sources, config, tokenizer, report)


class Loader:
    """The training stream of a config: `data`, `batch_size` (over all hosts) and `seed`.

    The rows of the global batch at a step depend on the seed and the step alone: not on the number of hosts, workers or
    threads, nor on where a run was stopped. Data sets are interleaved by their weights (`weight`, or
    size^`data.size_exponent`), each shuffled anew every epoch and augmented anew every time. The rows of a global batch
    are shuffled before the hosts share them out; a host would otherwise meet the same data set at every step wherever
    the mixture's period divides its share.

    names: of the sources, each its own. report: what they are, and what was left out of them, in words.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: Any,
        tokenizer: Callable[[Sequence[str]], np.ndarray],
        report: Sequence[str] = (),
    ):
        data = config.data
        if data.canvas[1] % 8:
            raise ValueError(f"data.canvas: the width must be a multiple of 8, not {data.canvas[1]}.")
        self._config = config
        self.names = _labels(sources)
        self._sizes = [len(s) for s in sources]
        if 0 in self._sizes or not sources:
            raise ValueError(f"data.mixture: {self.names[self._sizes.index(0)] if sources else 'it'} is empty.")
        self._weights = [_weight(e, size, data.size_exponent) for e, size in zip(data.mixture, self._sizes)]
        self._bad: list[set[int]] = [set() for _ in sources]
        self._read = [0] * len(sources)
        self._spec = BatchSpec.of(data)
        shares = [f"{w / sum(self._weights):.1%}" for w in self._weights]
        self.report = [
            f"{n}: {size} images, {share} of the rows" for n, size, share in zip(self.names, self._sizes, shares)
        ] + [*report]
        for source in sources:
            _warn_of_twins(source, tokenizer)
        transforms = [
            RecordTransform(
                s,
                i,
                tuple(entry["tasks"]),
                (entry.get("min_mask_score", 0.0), entry.get("min_caption_score", 0.0)),
                data,
                tokenizer,
            )
            for i, (s, entry) in enumerate(zip(sources, data.mixture))
        ]
        streams = [
            WindowShuffle(grain.MapDataset.range(size).repeat(), size, (config.seed, i)).random_map(
                transform, seed=_seed(config.seed, i)
            )
            for i, (size, transform) in enumerate(zip(self._sizes, transforms))
        ]
        mixed = grain.MapDataset.mix(streams, weights=self._weights)
        # Grain computes lengths in floats: sys.maxsize would round up past what len() may return, 2^53 is exact and
        # endless enough.
        self._rows = WindowShuffle(mixed, config.batch_size, (config.seed, len(sources)))[: 1 << 53]

    def batches(self, start_step: int = 0, host: int = 0, num_hosts: int = 1) -> Iterator[Batch]:
        """This host's batches, [batch_size / num_hosts] rows each, from `start_step` on, without end."""
        return (batch for batch, _ in self.stream(start_step, host, num_hosts))

    def stream(self, start_step: int = 0, host: int = 0, num_hosts: int = 1) -> Iterator[tuple[Batch, list[Note]]]:
        """`batches`, each with a note for every row.

        An unusable record is named once in the log; the next usable one takes its place. Raises ValueError where more
        than `data.max_corrupt_fraction` of the records that this host has read of a data set are unusable. One unusable
        record is always allowed, and the fraction is taken of at least FEW records.
        """
        size, data = self._config.batch_size, self._config.data
        if size % num_hosts:
            raise ValueError(f"batch_size: {size} cannot be shared by {num_hosts} hosts.")
        batches = self._rows.batch(size // num_hosts, batch_fn=functools.partial(_collate, spec=self._spec))[
            host::num_hosts
        ][start_step:]
        ahead = max(2, data.threads // max(1, data.workers))  # batches, in each process
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead))
        if not data.workers:
            return map(self._checked, iter(stream))
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
        with deaf_children():  # it makes the threads that start the workers
            iterator = iter(stream)
        return map(self._checked, _deaf(iterator))

    @property
    def bad(self) -> dict[str, int]:
        """How many records of each data set were unusable so far."""
        return {name: len(bad) for name, bad in zip(self.names, self._bad)}

    def _checked(self, item: tuple[Batch, list[Note]]) -> tuple[Batch, list[Note]]:
        """Counts what the rows of a batch say of unusable records. Here, since worker processes each see a part of
        them.
        """
        batch, notes = item
        for source, note in zip(batch.source, notes):
            name, size, bad = self.names[source], self._sizes[source], self._bad[source]
            self._read[source] += 1
            for number, what in note.bad:
                if number not in bad:
                    bad.add(number)
                    logging.warning("%s: record %d is left out: %s", name, number, what)
            limit, seen = self._config.data.max_corrupt_fraction, min(size, max(self._read[source], FEW))
            if len(bad) > max(1, limit * seen):
                raise ValueError(
                    f"{name}: {len(bad)} of {seen} records are unusable, data.max_corrupt_fraction is {limit}; "
                    "prepare the data set again."
                )
        return item

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must hold of the data (JSON): the next step to read, and what `check_state` compares."""
        mixture = [list(entry) for entry in zip(self.names, self._sizes, self._weights)]
        return {"step": step, "seed": self._config.seed, "batch_size": self._config.batch_size, "mixture": mixture}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError where `batches(state["step"])` would not go on with the same images in the same order.

        What is made of them (tasks, augmentation, canvas) may change: that is the user's to decide.
        """
        now = self.state(state["step"])
        for field in ("mixture", "batch_size", "seed"):
            if state[field] != now[field]:
                was, is_ = state[field], now[field]
                raise ValueError(
                    f"{field}: the checkpoint was written with {was}, the config says {is_}; "
                    "restore it or start a new run."
                )


class WindowShuffle(grain.MapDataset):
    """Every `window` elements of the parent in an order of their own: a window may be an epoch or a global batch.

    Grain's own shuffle walks through 2^16 indices to find one below `window`: 3 ms an element for a batch of 8.
    """

    def __init__(self, parent: grain.MapDataset, window: int, seed: tuple[int, ...]):
        super().__init__(parent)
        self._window, self._shuffle_seed = window, seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        window, i = divmod(index, self._window)
        return self._parent[window * self._window + int(self._order(window)[i])]

    def _order(self, window: int) -> np.ndarray:
        orders = self._orders
        if window not in orders:
            order = np.random.default_rng((*self._shuffle_seed, window)).permutation(self._window)
            # Threads meet here: the dict is replaced, never changed. Two windows are kept, since an epoch ends in
            # mid-batch.
            self._orders = orders = dict([*list(orders.items())[-1:], (window, order)])
        return orders[window]


@dataclasses.dataclass(frozen=True)
class RecordTransform:
    """Reads, augments and packs one record of one data set: (index, rng) to a row of a Batch and its note.

    number: the data set's place in the mixture. min_scores: of masks and captions that a teacher added, below which
        they are left out. data: `config.data`.
    """

    source: Source
    number: int
    tasks: tuple[str, ...]
    min_scores: tuple[float, float]
    data: Any
    tokenizer: Callable[[Sequence[str]], np.ndarray]

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[PackedExample, Note]:
        bad = []
        for i in range(index, index + MAX_IN_A_ROW):
            i %= len(self.source)
            try:
                packed, key, texts = self._example(i, rng)
                return packed, Note(key, tuple(texts), tuple(bad))
            except (BadRecord, cv2.error) as e:
                bad.append((self.source.indices[i] if isinstance(self.source, Part) else i, str(e)))
        raise ValueError(
            f"{self.source.name}/{self.source.split}: {MAX_IN_A_ROW} records in a row are unusable; "
            f"prepare the data set again. The last one: {bad[-1][1]}"
        )

    def _example(self, index: int, rng: np.random.Generator) -> tuple[PackedExample, str, list[str]]:
        record, data = Record.from_bytes(self.source[index]).trusting(*self.min_scores), self.data
        key = f"{self.source.name}/{record.key}"
        example = to_example(record, self.source.info, self.tasks, key, tuple(data.templates))
        example = self._augment(example, needs_whole_image(record, self.tasks), rng)
        texts, indices = choose_prompts(example, data.max_prompts, rng)
        return pack_example(example, texts, indices, self.tokenizer, BatchSpec.of(data), self.number, rng), key, texts

    def _augment(self, example: Example, whole: bool, rng: np.random.Generator) -> Example:
        data, canvas = self.data, tuple(self.data.canvas)
        example = fit(example, canvas) if whole else resize_crop(example, canvas, rng, tuple(data.scale_range))
        example = random_flip(example, rng, data.flip)
        return color_jitter(example, rng, data.color_jitter) if data.color_jitter else example


def _deaf(stream: Iterator[Any]) -> Iterator[Any]:
    """The same endless stream, whose first elements start worker processes: Ctrl-C is not for them."""
    while True:
        with deaf_children():
            item = next(stream)
        yield item


def _collate(items: Sequence[tuple[PackedExample, Note]], spec: BatchSpec) -> tuple[Batch, list[Note]]:
    examples, notes = zip(*items)
    return collate(examples, spec), list(notes)


def _warn_of_twins(source: Source, tokenizer: Callable[[Sequence[str]], np.ndarray]) -> None:
    """Two classes that a tokenizer makes the same are one prompt that is both there and not: say so."""
    names = [text for c in source.info.classes for text in c.texts]
    classes = [c for c in source.info.classes for _ in c.texts]
    seen: dict[bytes, tuple[ClassInfo, str]] = {}
    for name, mine, row in zip(names, classes, tokenizer(names) if names else ()):
        its, other = seen.setdefault(row.tobytes(), (mine, name))
        if its is not mine:
            logging.warning(
                "%s: the tokenizer cannot tell %r from %r; with words, raise config.model.text.vocab_size.",
                source.name,
                name,
                other,
            )


def _labels(sources: Sequence[Source]) -> list[str]:
    """Names for logs and metrics: "name/split", numbered where one is there several times."""
    plain = [f"{s.name}/{s.split}" for s in sources]
    return [
        name if plain.count(name) == 1 else f"{name} ({plain[: i + 1].count(name)})" for i, name in enumerate(plain)
    ]


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _weight(entry: Any, size: int, size_exponent: float) -> float:
    weight = entry.get("weight")
    weight = float(size**size_exponent if weight is None else weight)
    if not weight > 0:
        raise ValueError(f"data.mixture: {entry['name']} has weight {weight}; it must be positive.")
    return weight
