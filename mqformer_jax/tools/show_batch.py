"""Draw the examples that training reads from the data sets of a recipe.

    mqformer show --config=coco_ref:small --output=grid.png

The examples are drawn as a grid of augmented images with their targets and prompts. The command also prints statistics
of each data set. It needs no model and no accelerator.
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
from mqformer_jax.input.batch import Batch, unpack
from mqformer_jax.input.mixture import Note, make_loader
from mqformer_jax.visualization.training_batch import ShownExample, ShownPrompt, grid, panel


@dataclasses.dataclass
class Tally:
    """Statistics of the examples of one data set."""

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
            return "no examples"
        share = f", {self.masks / self.targets:.0%} of them with masks" if self.targets else ""
        rows = "1 example" if self.rows == 1 else f"{self.rows} examples"
        prompts, targets = self.prompts / self.rows, self.targets / self.rows
        return f"{rows}, on average {prompts:.1f} prompts and {targets:.1f} targets{share}"


def show(
    config: ConfigDict, output: str, count: int, start_step: int = 0, dataset: str | None = None, side: int = 320
) -> dict[str, Tally]:
    """Write a grid of `count` examples as a PNG file. Return {"name/split": statistics of the examples that were read}.

    The examples are those of the training stream from `start_step` on, or only those of `dataset`. Masks are drawn with
    all pixels, although training reads only the pixels of a lattice.

    side: longer side of each image in pixels. Raises FileNotFoundError if a data set is not prepared, ValueError if
    `output` does not end with .png, or if `dataset` is not in the mixture.
    """
    if not output.lower().endswith(".png"):
        raise ValueError(f"--output={output}: the name of the file must end with .png.")
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)  # before the slow part, so that errors come early
    config = config.copy_and_resolve_references()
    config.data.lattice_stride = 1
    entries = config.data.mixture
    if dataset and dataset not in (names := [entry["name"] for entry in entries]):
        raise ValueError(f"--dataset={dataset}: not in the recipe's data.mixture; give one of {', '.join(names)}.")
    loader = make_loader(config, _numbers)
    print("\n".join(loader.report) + "\n")
    tallies = [Tally() for _ in entries]
    panels = []
    for row, note in rows(loader.stream(start_step)):
        source = int(row.source[0])
        tallies[source].add(row)
        if dataset in (None, entries[source]["name"]):
            panels.append(panel(describe(row, note), side))
        if len(panels) == count:
            break
    height, width = config.data.canvas
    title = f"Training examples from step {start_step} on, seed {config.seed}, canvas {height} x {width}"
    grid(panels, title + (f", only {dataset}" if dataset else "")).save(output)
    return dict(zip(loader.names, tallies))


def rows(stream: Iterable[tuple[Batch, Sequence[Note]]]) -> Iterator[tuple[Batch, Note]]:
    """Yield each example as a batch of one, with its note.

    Later code then unpacks masks one example at a time, because those of a whole batch can take gigabytes.
    """
    for batch, notes in stream:
        for i, note in enumerate(notes):
            yield type(batch)(**{name: value[i : i + 1] for name, value in vars(batch).items()}), note


def describe(row: Batch, note: Note) -> ShownExample:
    """Return the example of a batch of one, in the form that `panel` draws: boxes in pixels, masks as images."""
    n, (height, width) = int(row.num_targets[0]), row.image.shape[1:3]
    centers, sizes = np.split(row.boxes[0, :n] * np.array([width, height] * 2, np.float32), 2, axis=1)
    positive, negative = row.positive[0, :n], row.negative[0, :n]
    is_region, exhaustive = row.is_region[0].tolist(), row.prompt_exhaustive[0].tolist()
    return ShownExample(
        key=note.key,
        prompts=tuple(
            ShownPrompt(text, is_region[p], exhaustive[p], _where(positive[:, p]), _where(negative[:, p]))
            for p, text in enumerate(note.texts)
        ),
        image=row.image[0],
        size=(int(row.size[0, 0]), int(row.size[0, 1])),
        ignore=unpack(row.ignore[0], (height, width)),
        masks=unpack(row.masks[0, :n], (height, width)),
        has_mask=row.has_mask[0, :n],
        boxes=np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1),
        left_out=tuple(f"record {number}: {what}" for number, what in note.bad),
    )


def _where(flags: Bool[np.ndarray, " n"]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(flags).tolist())


def _numbers(texts: Sequence[str]) -> np.ndarray:
    """Return a different placeholder token for each text.

    This function replaces the tokenizer, which may need a checkpoint. The grid shows texts, not tokens.
    """
    return np.arange(len(texts), dtype=np.int32)[:, None]


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of the command.

    Flags are not defined on import, because `mqformer_jax.main` also defines --config.
    """
    cli.define_recipe(values)
    flags.DEFINE_string("output", None, "PNG file to write, e.g. grid.png. Required.", flag_values=values)
    flags.DEFINE_integer("count", 24, "Number of training examples to show, e.g. 6.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("step", 0, "Training step to start at, e.g. 1000.", lower_bound=0, flag_values=values)
    flags.DEFINE_string(
        "dataset", None, "Show only examples of this data set, e.g. refcoco. (default: all)", flag_values=values
    )
    flags.DEFINE_integer(
        "side", 320, "Longer side of each image in pixels, e.g. 512.", lower_bound=100, flag_values=values
    )
    flags.mark_flags_as_required(["config", "output"], values)


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    cli.no_arguments(argv)
    config = given.config
    recipes.check(config)
    config.data.workers = 0  # the stream is the same, and starting processes for a few examples is slow
    tallies = show(config, given.output, given.count, given.step, given.dataset, given.side)
    width = max(map(len, tallies))
    for name, tally in tallies.items():
        print(f"{name:{width}}  {tally}")
    print(f"\nWrote {given.output}")


def run(argv: Sequence[str]) -> None:
    define_flags(flags.FLAGS)
    cli.run(main, "show", __doc__, "stopped; no grid was written.", argv)
