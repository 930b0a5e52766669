"""One checkpoint x the evaluators of a config -> one table, one eval.json, one sheet of pictures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from mqformer_jax import visualize
from mqformer_jax.evaluation.foreground import ForegroundEvaluator
from mqformer_jax.evaluation.instance import InstanceEvaluator
from mqformer_jax.evaluation.panoptic import PanopticEvaluator
from mqformer_jax.evaluation.referring import ReferringEvaluator
from mqformer_jax.evaluation.semantic import SemanticEvaluator
from mqformer_jax.input.record import BadRecord, Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.parallel.distributed import gather, is_first
from mqformer_jax.predict import Answer, Predictor, answer_segments
from mqformer_jax.segments import semantic_map, soft_mask
from mqformer_jax.visualize import Shown

CLASS_TASKS = ("panoptic", "instance", "semantic")


def evaluate(predictor: Predictor, config: ConfigDict, folder: str) -> dict[str, float]:
    """Evaluate the sets of `config.eval`; writes eval.json and one picture sheet a set into `folder`.

    Of several processes each does its share of the images, and the first one writes. Keys are task.metric ("panoptic.pq"), in percent; from the second set of a task on with "name/split/" in front.
    """
    results: dict[str, float] = {}
    os.makedirs(folder, exist_ok=True)
    for entry in config.eval.sets:
        source = ShardSource(config.data.root, entry["name"], entry["split"])
        evaluation = SetEvaluation(predictor, config.eval, source, tuple(entry["tasks"]))
        known = {key.split(".")[0] for key in results}
        for task, metrics in evaluation.run().items():
            prefix = f"{entry['name']}/{entry['split']}/{task}" if task in known else task
            results.update({f"{prefix}.{name}": value for name, value in metrics.items()})
        if evaluation.shown and is_first():
            visualize.prediction_sheet(evaluation.shown, source.info, os.path.join(folder, f"{source.name}_{source.split}.png"))
    if is_first():
        save_json(os.path.join(folder, "eval.json"), results)
    return results


class SetEvaluation:
    """The tasks of one data set, evaluated in one pass over its images."""

    def __init__(self, predictor: Predictor, options: ConfigDict, source: ShardSource, tasks: Sequence[str]):
        self.predictor, self.options, self.source, self.tasks, info = predictor, options, source, tasks, source.info
        if set(tasks) & set(CLASS_TASKS) and not info.classes:
            raise ValueError(f"config.eval.sets ({source.name}): {tasks} need classes, and this data set has none.")
        self.names = [c.name for c in info.classes]
        self.region = np.array([not c.thing for c in info.classes], bool)
        templates = predictor.config.data.templates
        self.classes = predictor.embed([c.texts[0] for c in info.classes], self.region, templates) if self.names else None
        self.shown: list[Shown] = []
        make = {
            "panoptic": lambda: PanopticEvaluator(info),
            "instance": lambda: InstanceEvaluator(info),
            "semantic": lambda: SemanticEvaluator(info),
            "referring": ReferringEvaluator,
            "foreground": ForegroundEvaluator,
        }
        self.evaluators = {task: make[task]() for task in tasks}

    def run(self) -> dict[str, dict[str, float]]:
        """Metrics of each task, of all processes' images. One that cannot be read is named, counted and left out."""
        count, bad, waiting = min(len(self.source), self.options.limit or len(self.source)), 0, []
        mine = np.array_split(np.arange(count), jax.process_count())[jax.process_index()]
        name = f"evaluate {self.source.name} {self.source.split}"
        for i in tqdm(mine.tolist(), desc=name, unit="image", dynamic_ncols=True, disable=not is_first()):
            try:
                waiting.append(_read(self.source, i))
            except BadRecord as e:
                bad += 1
                logging.warning("%s %s: record %d is left out of the evaluation: %s", self.source.name, self.source.split, i, e)
            if waiting and (len(waiting) == self.options.batch_size or i == mine[-1]):
                self._update(waiting)
                waiting = []
        first, *others = gather(self.evaluators)  # in the images' order, as if one process had seen them all
        for other in others:
            for task, evaluator in first.items():
                evaluator.merge(other[task])
        bad = sum(gather(bad))
        if bad:
            logging.warning("%s %s: %d images could not be read; the figures are without them", self.source.name, self.source.split, bad)
        return {task: evaluator.result() for task, evaluator in first.items()}

    def _update(self, items: list[Shown]) -> None:
        images = [item.image for item in items]
        if set(self.tasks) & set(CLASS_TASKS):
            answers = self.predictor.ask(images, [self.classes] * len(items), self.options.batch_size)
            for item, answer in zip(items, answers):
                self._update_classes(item, answer)
        if "referring" in self.tasks:
            asking = [item for item in items if _expressions(item.record)]
            texts = [[text for text, _ in _expressions(item.record)] for item in asking]
            for item, asked, answer in zip(asking, texts, self._ask_regions([i.image for i in asking], texts)):
                self._update_referring(item, asked, answer)
        if "foreground" in self.tasks:
            for item, answer in zip(items, self._ask_regions(images, [["foreground"]] * len(items))):
                truth = _foreground(item.record)
                if truth is not None:
                    self.evaluators["foreground"].update(soft_mask(answer.class_probs, answer.masks, 0), truth)
                    if item.regions is None:
                        item.regions = answer_segments(answer, ["foreground"], np.array([True]), "foreground", self.options)
        self.shown += items[: max(0, self.options.pictures - len(self.shown))]

    def _ask_regions(self, images: list[np.ndarray], texts: list[list[str]]) -> list[Answer]:
        if not images:
            return []
        flat = [text for asked in texts for text in asked]
        embedded = np.split(np.asarray(self.predictor.embed(flat, [True] * len(flat))), np.cumsum([len(t) for t in texts])[:-1])
        return self.predictor.ask(images, embedded, self.options.batch_size)

    def _update_classes(self, item: Shown, answer: Answer) -> None:
        record, evaluators = item.record, self.evaluators
        if "panoptic" in evaluators:
            item.panoptic = answer_segments(answer, self.names, self.region, "panoptic", self.options)
            evaluators["panoptic"].update(record, item.panoptic)
        if "instance" in evaluators:
            found = answer_segments(answer, self.names, self.region, "instance", self.options)
            evaluators["instance"].update(record, found)
            if item.panoptic is None:
                item.panoptic = found.above(0.3)
        if "semantic" in evaluators:
            evaluators["semantic"].update(record, semantic_map(answer.class_probs, answer.masks))
            if item.panoptic is None:
                item.panoptic = answer_segments(answer, self.names, self.region, "panoptic", self.options)

    def _update_referring(self, item: Shown, texts: list[str], answer: Answer) -> None:
        item.regions = answer_segments(answer, texts, np.full(len(texts), True), "referring", self.options)
        for (text, mask), predicted in zip(_expressions(item.record), item.regions.masks):
            target = None if mask is None else item.record.decode_mask(mask)
            self.evaluators["referring"].update(predicted, target, _kind(text, self.options.kinds))


def _read(source: ShardSource, index: int) -> Shown:
    """One record with all that an evaluator will decode of it. Raises BadRecord where any of it is damaged."""
    record = Record.from_bytes(source[index])
    for segment in record.segments:
        if segment.mask is not None:
            record.decode_mask(segment.mask)
        if segment.alpha is not None:
            record.decode_alpha(segment.alpha)
    return Shown(record, record.decode_image())


def _expressions(record: Record) -> list[tuple[str, bytes | None]]:
    """Each expression of an image with its mask (None: it names nothing); those known by a box alone are left out."""
    named = [(text, s.mask) for s in record.segments if s.mask is not None and not s.crowd for text in s.texts]
    return named + [(text, None) for text in record.absent_texts]


def _kind(text: str, kinds: Sequence[tuple[str, str]]) -> str | None:
    return next((name for name, pattern in kinds if re.search(pattern, text)), None)


def _foreground(record: Record) -> np.ndarray | None:
    """The foreground of a record as floats 0 to 1: its matte where there is one, else its mask."""
    for segment in record.segments:
        if segment.foreground and segment.alpha is not None:
            return record.decode_alpha(segment.alpha) / 255.0
        if segment.foreground and segment.mask is not None:
            return record.decode_mask(segment.mask).astype(np.float64)
    return None


def table(results: dict[str, float]) -> str:
    """The headline of each task, a line each; eval.json has the rest."""
    tasks: dict[str, list[str]] = {}
    for key, value in results.items():
        task, metric = key.split(".", 1)
        tasks.setdefault(task, []).append(f"{metric} {value:.1f}")
    return "\n".join(f"{task:>24}  " + "  ".join(metrics) for task, metrics in tasks.items())


def save_json(path: str, values: dict) -> None:
    with open(path + ".tmp", "w") as f:
        json.dump(values, f, indent=1)
    os.replace(path + ".tmp", path)
