"""Plans for the data sets that `mqformer prepare sample` makes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from mqformer_jax.prepare.plan import Built, Plan, Problems
from mqformer_jax.prepare.sample import scenes

SAMPLE_IMAGES = 8


def plans(output: str, seed: int, train: int, val: int, size: int) -> Iterator[tuple[str, str, Plan]]:
    """Write some validation images to OUTPUT/sample_images, then yield (name, split, plan) of each sample split.

    seed, train, val, size: see `scenes.datasets`.
    """
    datasets = scenes.datasets(seed, train, val, size)
    _write_sample_images(os.path.join(output, "sample_images"), datasets[0])
    for dataset in datasets:
        render = functools.partial(_render, dataset.name, dataset.size)
        for split, seeds in dataset.seeds.items():
            yield dataset.name, split, Plan("sample", dataset.classes, list(seeds), render)


def _write_sample_images(folder: str, dataset: scenes.SampleSet) -> None:
    """Write the first images of the split "val" as 1.png, 2.png, ..., for trying out a trained model."""
    os.makedirs(folder, exist_ok=True)
    for i, seed in enumerate(dataset.seeds["val"][:SAMPLE_IMAGES], 1):
        with open(os.path.join(folder, f"{i}.png"), "wb") as f:
            f.write(scenes.render(dataset.name, seed, dataset.size).image)


def _render(name: str, size: int, seed: int) -> Built:
    return Built.of(scenes.render(name, seed, size), Problems())
