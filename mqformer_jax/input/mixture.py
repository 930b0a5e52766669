"""Mix prepared data sets into one endless stream of batches, which can be resumed exactly at any step."""

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
from mqformer_jax.interrupts import block_ctrl_c_in_children

MAX_IN_A_ROW = 64  # the run stops after this many consecutive unusable records
MIN_RECORDS = 1000  # the fraction of unusable records is computed over at least this many

# The loader processes many images in parallel. Threads of OpenCV would compete for the same cores.
cv2.setNumThreads(1)


@runtime_checkable
class Source(Protocol):
    """The interface of a data set: `source[i]` returns the bytes of record i."""

    info: DatasetInfo
    name: str
    split: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class Note:
    """Information about one row of a Batch, for logs.

    key: "dataset/image". texts: the wordings of its prompts. bad: (index, problem) of each unusable record that this
    row replaces.
    """

    key: str
    texts: tuple[str, ...]
    bad: tuple[tuple[int, str], ...]


def make_loader(config: Any, tokenizer: Callable[[Sequence[str]], np.ndarray]) -> Loader:
    """Return a loader of the data sets in `config.data.mixture`, without evaluation images (`exclude_eval_images`).

    With `config.data.leak_guard=False`, evaluation images are kept. Raises FileNotFoundError if a data set is not
    prepared, ValueError if it is damaged or the config does not fit it.
    """
    data = config.data
    sources = [ShardSource(data.root, entry["name"], entry["split"]) for entry in data.mixture]
    if not data.leak_guard:
        return Loader(sources, config, tokenizer)
    sources, report = exclude_eval_images(sources, data.root, config.eval.sets)
    return Loader(sources, config, tokenizer, report)


class Loader:
    """A loader of training batches. It uses the fields `data`, `batch_size` (over all hosts) and `seed` of a config.

    The rows of the global batch of a step depend only on the seed and the step, not on interruptions or on the number
    of hosts, workers or threads. Data sets are interleaved by weight (`weight`, or size^`data.size_exponent`). Records
    are shuffled again in every epoch and augmented differently each time. The rows of a global batch are shuffled
    before they are split among the hosts. Otherwise, if the interleaving repeats with a period that divides a host's
    share, each host would always get the same data sets.

    names: unique names of the sources. report: log lines that describe the sources and the excluded images.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: Any,
        tokenizer: Callable[[Sequence[str]], np.ndarray],
        report: Sequence[str] = (),
    ):
        data = config.data
        self._config = config
        self.names = _unique_names(sources)
        self._sizes = [len(s) for s in sources]
        if not sources:
            raise ValueError("data.mixture is empty: name at least one data set.")
        if 0 in self._sizes:
            raise ValueError(
                f"data.mixture: {self.names[self._sizes.index(0)]} has no images; remove it, or prepare it again."
            )
        self._weights = [_weight(e, size, data.size_exponent) for e, size in zip(data.mixture, self._sizes)]
        self._bad: list[set[int]] = [set() for _ in sources]
        self._read = [0] * len(sources)
        self._spec = BatchSpec.of(data)
        shares = [f"{w / sum(self._weights):.1%}" for w in self._weights]
        self.report = [
            f"{n}: {size} images, {share} of the training examples"
            for n, size, share in zip(self.names, self._sizes, shares)
        ] + [*report]
        for source in sources:
            _warn_of_equal_classes(source, tokenizer)
        transforms = [
            RecordTransform(
                s,
                i,
                tuple(entry["tasks"]),
                (entry.get("min_mask_score", 0.0), entry.get("min_caption_score", 0.0)),
                data,
                self._spec,
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
        # Grain computes lengths in floats: sys.maxsize would round up to more than len() may return; 2^53 is exact.
        self._rows = WindowShuffle(mixed, config.batch_size, (config.seed, len(sources)))[: 1 << 53]

    def batches(self, start_step: int = 0, host: int = 0, num_hosts: int = 1) -> Iterator[Batch]:
        """Return an endless iterator over the batches of one host, from `start_step` on.

        A batch has batch_size / num_hosts rows. host: index of the host.
        """
        return (batch for batch, _ in self.stream(start_step, host, num_hosts))

    def stream(self, start_step: int = 0, host: int = 0, num_hosts: int = 1) -> Iterator[tuple[Batch, list[Note]]]:
        """Return the same iterator as `batches`, but over (batch, notes). There is one note for each row of the batch.

        An unusable record is logged once and replaced by the next usable one. Raises ValueError if, in a data
        set, more than `data.max_corrupt_fraction` of the records that this host has read are unusable. One unusable
        record is always allowed, and the fraction is computed over at least MIN_RECORDS records.
        """
        size, data = self._config.batch_size, self._config.data
        if size % num_hosts:
            raise ValueError(f"batch_size: {size} is not divisible by {num_hosts} hosts; use a multiple.")
        batches = self._rows.batch(size // num_hosts, batch_fn=functools.partial(_collate, spec=self._spec))[
            host::num_hosts
        ][start_step:]
        ahead = max(2, data.threads // max(1, data.workers))  # batches per process
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead))
        if not data.workers:
            return map(self._count_unusable, iter(stream))
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
        with block_ctrl_c_in_children():  # iter() starts the threads that start the workers
            iterator = iter(stream)
        return map(self._count_unusable, _block_ctrl_c(iterator))

    @property
    def bad(self) -> dict[str, int]:
        """Return the number of unusable records of each data set so far."""
        return {name: len(bad) for name, bad in zip(self.names, self._bad)}

    def _count_unusable(self, item: tuple[Batch, list[Note]]) -> tuple[Batch, list[Note]]:
        """Count the unusable records of a batch in this process, since each worker reads only a part of the records."""
        batch, notes = item
        for source, note in zip(batch.source, notes):
            name, size, bad = self.names[source], self._sizes[source], self._bad[source]
            self._read[source] += 1
            for number, problem in note.bad:
                if number not in bad:
                    bad.add(number)
                    logging.warning("%s: record %d is left out: %s", name, number, problem)
            limit, seen = self._config.data.max_corrupt_fraction, min(size, max(self._read[source], MIN_RECORDS))
            if len(bad) > max(1, limit * seen):
                raise ValueError(
                    f"{name}: {len(bad)} of {seen} records are unusable, more than data.max_corrupt_fraction = "
                    f"{limit}; prepare the data set again."
                )
        return item

    def state(self, step: int) -> dict[str, Any]:
        """Return the state for a checkpoint (JSON): the next step, and the settings that `check_state` compares."""
        mixture = [list(entry) for entry in zip(self.names, self._sizes, self._weights)]
        return {"step": step, "seed": self._config.seed, "batch_size": self._config.batch_size, "mixture": mixture}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError if `batches(state["step"])` would not continue with the same images in the same order.

        Tasks, augmentation and canvas may change.
        """
        current = self.state(state["step"])
        for field in ("mixture", "batch_size", "seed"):
            if state[field] != current[field]:
                raise ValueError(
                    f"{field}: the checkpoint was saved with {state[field]}, but the config has {current[field]}; "
                    "restore the old value, or start a new run with another --workdir."
                )


class WindowShuffle(grain.MapDataset):
    """A dataset that shuffles `parent` within consecutive windows of `window` elements (epochs or global batches).

    Each window has its own order. Grain's shuffle is slow for small windows, because it draws from 2^16 indices until
    one is below `window`: with windows of 8, it takes 3 ms per element.
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
            # The dict is replaced and never changed, because several threads read it. It keeps two windows, because an
            # epoch can end inside a batch.
            self._orders = orders = dict([*list(orders.items())[-1:], (window, order)])
        return orders[window]


@dataclasses.dataclass(frozen=True)
class RecordTransform:
    """A function that reads a record of one data set, augments it, and returns the packed example and its note.

    Its arguments are the index of the record and a random generator. number: index of the data set in the mixture.
    min_scores: lowest scores of synthetic masks and of synthetic captions. data: `config.data`.
    """

    source: Source
    number: int
    tasks: tuple[str, ...]
    min_scores: tuple[float, float]
    data: Any
    spec: BatchSpec
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
            f"prepare the data set again. The last error: {bad[-1][1]}"
        )

    def _example(self, index: int, rng: np.random.Generator) -> tuple[PackedExample, str, list[str]]:
        record, data = Record.from_bytes(self.source[index]).trusting(*self.min_scores), self.data
        key = f"{self.source.name}/{record.key}"
        example = to_example(record, self.source.info, self.tasks, key, tuple(data.templates))
        example = self._augment(example, not needs_whole_image(record, self.tasks), rng)
        texts, indices = choose_prompts(example, data.max_prompts, rng)
        return pack_example(example, texts, indices, self.tokenizer, self.spec, self.number, rng), key, texts

    def _augment(self, example: Example, may_crop: bool, rng: np.random.Generator) -> Example:
        data, canvas = self.data, tuple(self.data.canvas)
        example = resize_crop(example, canvas, rng, tuple(data.scale_range)) if may_crop else fit(example, canvas)
        example = random_flip(example, rng, data.flip)
        return color_jitter(example, rng, data.color_jitter) if data.color_jitter else example


def _block_ctrl_c(stream: Iterator[Any]) -> Iterator[Any]:
    """Yield the elements of an endless stream. Block Ctrl-C in the workers, which start with the first elements."""
    while True:
        with block_ctrl_c_in_children():
            item = next(stream)
        yield item


def _collate(items: Sequence[tuple[PackedExample, Note]], spec: BatchSpec) -> tuple[Batch, list[Note]]:
    examples, notes = zip(*items)
    return collate(examples, spec), list(notes)


def _warn_of_equal_classes(source: Source, tokenizer: Callable[[Sequence[str]], np.ndarray]) -> None:
    """Warn when two class names tokenize identically: an image may then have the same prompt as present and absent."""
    names = [text for c in source.info.classes for text in c.texts]
    classes = [c for c in source.info.classes for _ in c.texts]
    seen: dict[bytes, tuple[ClassInfo, str]] = {}
    for name, info, row in zip(names, classes, tokenizer(names) if names else ()):
        other_info, other = seen.setdefault(row.tobytes(), (info, name))
        if other_info is not info:
            logging.warning(
                "%s: the classes %r and %r tokenize identically; rename one of them or, with the tokenizer 'words', "
                "raise config.model.text.vocab_size.",
                source.name,
                other,
                name,
            )


def _unique_names(sources: Sequence[Source]) -> list[str]:
    """Return names for logs and metrics: "name/split", numbered if a source occurs several times."""
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
