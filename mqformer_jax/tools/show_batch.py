"""What the model will see:  mqformer show --config=configs/coco_ref.py:small --out=sheet.png

A contact sheet of the rows that training will get: pictures as augmented, targets, prompts in words. On the command
line, what was seen of each data set. No model and no device is needed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import flags
from jaxtyping import Bool
from ml_collections import ConfigDict

from mqformer_jax import cli
from mqformer_jax import config as recipes
from mqformer_jax.input.batch import Batch, unpack_masks
from mqformer_jax.input.mixture import Note, make_loader
from mqformer_jax.visualization.training_batch import Asked, Shown, card, sheet


@dataclasses.dataclass
class Tally:
    """What was seen of one data set."""

    rows: int = 0
    targets: int = 0
    prompts: int = 0
    masks: int = 0

    def add(self, row: Batch) -> None:
        self.rows += 1
        self.targets += int(row.num_targets.sum())
        self.prompts += int(row.prompt_valid.sum())
        self.masks += int(row.has_mask.sum())

    def __str__(self) -> str:
        if not self.rows:
            return "no rows"
        share = f", {self.masks / self.targets:.0%} of them with masks" if self.targets else ""
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        prompts, targets = self.prompts / self.rows, self.targets / self.rows
        return f"{rows}, on average {prompts:.1f} prompts and {targets:.1f} targets{share}"


def show(
    config: ConfigDict, out: str, count: int, start_step: int = 0, dataset: str | None = None, side: int = 320
) -> dict[str, Tally]:
    """Writes the sheet, and returns what was seen of each data set ("name/split") up to its last row.

    The rows are those of the training stream from `start_step` on, or those of them that come from `dataset`.
    side: pixels of a picture's longer side. Raises FileNotFoundError, ValueError.
    """
    if not out.lower().endswith(".png"):
        raise ValueError(f"--out={out}: the sheet is a PNG file, call it so.")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)  # fails before the work is done
    entries = config.data.mixture
    if dataset and dataset not in (names := [entry["name"] for entry in entries]):
        raise ValueError(f"--dataset={dataset}: the recipe's data.mixture has {', '.join(names)}.")
    loader = make_loader(config, _numbers)
    print("\n".join(loader.report) + "\n")
    tallies = [Tally() for _ in entries]
    cards = []
    for row, note in rows(loader.stream(start_step)):
        source = int(row.source[0])
        tallies[source].add(row)
        if dataset in (None, entries[source]["name"]):
            cards.append(card(describe(row, note), side))
        if len(cards) == count:
            break
    height, width = config.data.canvas
    title = f"The training stream from step {start_step} on: seed {config.seed}, canvas {height} x {width}"
    sheet(cards, title + (f", only {dataset}" if dataset else "")).save(out)
    return dict(zip(loader.names, tallies))


def rows(stream: Iterable[tuple[Batch, Sequence[Note]]]) -> Iterator[tuple[Batch, Note]]:
    """Each row of a stream as a Batch of one: the unpacked masks of a whole batch may be gigabytes."""
    for batch, notes in stream:
        for i, note in enumerate(notes):
            yield type(batch)(**{name: value[i : i + 1] for name, value in vars(batch).items()}), note


def describe(row: Batch, note: Note) -> Shown:
    """A Batch of one in words and pixels."""
    n, (height, width) = int(row.num_targets[0]), row.image.shape[1:3]
    centres, sizes = np.split(row.boxes[0, :n] * np.array([width, height] * 2, np.float32), 2, axis=1)
    positive, negative = row.positive[0, :n], row.negative[0, :n]
    region, exhaustive = row.prompt_region[0].tolist(), row.prompt_exhaustive[0].tolist()
    return Shown(
        key=note.key,
        asked=tuple(
            Asked(text, region[p], exhaustive[p], _where(positive[:, p]), _where(negative[:, p]))
            for p, text in enumerate(note.texts)
        ),
        image=row.image[0],
        size=(int(row.size[0, 0]), int(row.size[0, 1])),
        ignore=np.unpackbits(row.ignore[0], axis=-1).view(bool),
        masks=unpack_masks(row)[0, :n],
        has_mask=row.has_mask[0, :n],
        boxes=np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1),
        left_out=tuple(f"record {number}: {what}" for number, what in note.bad),
    )


def _where(flags: Bool[np.ndarray, " n"]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(flags).tolist())


def _numbers(texts: Sequence[str]) -> np.ndarray:
    """In place of a tokenizer, which may come from a checkpoint that is not there yet: the sheet shows words."""
    return np.arange(len(texts), dtype=np.int32)[:, None]


def define_flags(values: flags.FlagValues) -> None:
    """Not done on import: `mqformer_jax.main` has a --config of its own."""
    cli.define_recipe(values)
    flags.DEFINE_string("out", None, "The sheet, a PNG file.", flag_values=values)
    flags.DEFINE_integer("count", 24, "How many rows are shown.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("step", 0, "The training step whose rows come first.", lower_bound=0, flag_values=values)
    flags.DEFINE_string("dataset", None, "Show the rows of this data set only.", flag_values=values)
    flags.DEFINE_integer("side", 320, "Pixels of a picture's longer side.", lower_bound=100, flag_values=values)
    flags.mark_flags_as_required(["config", "out"], values)


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    cli.no_arguments(argv)
    config = given.config
    recipes.check(config)
    config.data.workers = 0  # the stream is the same, and a few rows do not pay for starting processes
    tallies = show(config, given.out, given.count, given.step, given.dataset, given.side)
    width = max(map(len, tallies))
    for name, tally in tallies.items():
        print(f"{name:{width}}  {tally}")
    print(f"\n{given.out}")


def run(argv: Sequence[str]) -> None:
    define_flags(flags.FLAGS)
    cli.run(main, "show", __doc__, "stopped, no sheet was written.", argv)
