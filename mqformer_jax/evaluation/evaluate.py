"""Evaluate a checkpoint on the data sets of a recipe.

    mqformer evaluate --config=coco_ref:sample --checkpoint=runs/demo --save_predictions

Prints a table and writes eval.json, eval_details.json and a grid of pictures for each data set.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict
from tqdm import tqdm

from mqformer_jax import cli
from mqformer_jax import config as recipes
from mqformer_jax.evaluation.augment import joined, mean_regions, mirrored_image, mirrored_texts, views_of
from mqformer_jax.evaluation.instance import FEDERATED_MAX_DETECTIONS
from mqformer_jax.evaluation.submission import Submission
from mqformer_jax.files import write_json
from mqformer_jax.inference.predictor import Predictor, RawPredictions, postprocess
from mqformer_jax.input.record import BadRecord, DatasetInfo, Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.models.mqformer import query_counts
from mqformer_jax.parallel import distributed
from mqformer_jax.parallel.distributed import gather, is_first
from mqformer_jax.segments import Segments, semantic_map, soft_mask
from mqformer_jax.tasks import TASKS
from mqformer_jax.visualization import overlays
from mqformer_jax.visualization.overlays import Shown


def evaluate(predictor: Predictor, config: ConfigDict, folder: str, save_predictions: bool = False) -> dict[str, float]:
    """Evaluate the sets of `config.eval`; writes eval.json, eval_details.json and one picture grid a set into
    `folder`.

    Of several processes each does its share of the images, and the first one writes. Keys are task.metric
    ("panoptic.pq"), in percent (mattes: see `AlphaEvaluator`); from the second set of a task on with "name/split/" in
    front. eval_details.json holds, for each set and task, the figures of each class and the images with the worst.
    save_predictions: each set's answers go to predictions/NAME_SPLIT, as benchmarks take them (`Submission`).
    """
    results: dict[str, float] = {}
    details: dict[str, Any] = {}
    in_the_wild: list[float] = []
    os.makedirs(folder, exist_ok=True)
    sources = [ShardSource(config.data.root, entry["name"], entry["split"]) for entry in config.eval.sets]
    for entry, source in zip(config.eval.sets, sources):
        target = os.path.join(folder, "predictions", f"{source.name}_{source.split}") if save_predictions else None
        evaluation = SetEvaluation(predictor, config.eval, source, tuple(entry["tasks"]), target)
        known = {key.split(".")[0] for key in results}
        evaluators = evaluation.run()
        for task, evaluator in evaluators.items():
            prefix = f"{source.name}/{source.split}/{task}" if task in known else task
            metrics = evaluator.result()
            results.update({f"{prefix}.{name}": value for name, value in metrics.items()})
            if source.name.startswith("seginw_") and "mask_ap" in metrics:
                in_the_wild.append(metrics["mask_ap"])
        if is_first():
            details[f"{source.name}/{source.split}"] = {
                task: evaluator.details() for task, evaluator in evaluators.items()
            }
        if evaluation.shown and is_first():
            overlays.prediction_grid(
                evaluation.shown, source.info, os.path.join(folder, f"{source.name}_{source.split}.png")
            )
    if len(in_the_wild) > 1:  # X-Decoder's two figures for Segmentation in the Wild
        results["seginw.mean_mask_ap"], results["seginw.median_mask_ap"] = (
            float(np.mean(in_the_wild)),
            float(np.median(in_the_wild)),
        )
    if is_first():
        write_json(os.path.join(folder, "eval.json"), results)
        write_json(os.path.join(folder, "eval_details.json"), details)
    return results


class SetEvaluation:
    """The tasks of one data set, evaluated in one pass over its images. predictions: the folder for the predictions, or
    None.
    """

    def __init__(
        self,
        predictor: Predictor,
        options: ConfigDict,
        source: ShardSource,
        tasks: Sequence[str],
        predictions: str | None = None,
    ):
        self.predictor, self.options, self.source, self.tasks, info = predictor, options, source, tasks, source.info
        if any(TASKS[task].by_class for task in tasks) and not info.classes:
            raise ValueError(f"config.eval.sets ({source.name}): {tasks} need classes, and this data set has none.")
        if "instance" in tasks and not info.exhaustive and options.max_detections < FEDERATED_MAX_DETECTIONS:
            self.options = ConfigDict({**options, "max_detections": FEDERATED_MAX_DETECTIONS})
        self.names = [c.name for c in info.classes]
        self.is_region = np.array([c.is_region for c in info.classes], bool)
        templates = predictor.config.data.templates
        self.classes = (
            predictor.embed([c.texts[0] for c in info.classes], self.is_region, templates) if self.names else None
        )
        self.views = views_of(predictor.config, options.scales, options.flip)
        self.plain = (predictor.canvas, False)
        self.submission = Submission(predictions, info) if predictions else None
        self.shown: list[Shown] = []
        learnable = query_counts(predictor.config.model)[0]
        # Any: what an evaluator is given depends on its task
        self.evaluators: dict[str, Any] = {task: make_evaluator(task, info, learnable) for task in tasks}

    def run(self) -> dict[str, Any]:
        """The evaluators of the tasks, with all processes' images. One that cannot be read is named, counted and left
        out.
        """
        count, bad, waiting = min(len(self.source), self.options.max_images or len(self.source)), 0, []
        mine = np.array_split(np.arange(count), jax.process_count())[jax.process_index()]
        name = f"evaluate {self.source.name} {self.source.split}"
        for i in tqdm(mine.tolist(), desc=name, unit="image", dynamic_ncols=True, disable=not is_first()):
            try:
                waiting.append(_read(self.source, i))
            except BadRecord as e:
                bad += 1
                logging.warning(
                    "%s %s: record %d is left out of the evaluation: %s", self.source.name, self.source.split, i, e
                )
            if waiting and (len(waiting) == self.options.batch_size or i == mine[-1]):
                self._update(waiting)
                waiting = []
        # in the images' order, as if one process had seen them all
        (first, submission), *others = gather((self.evaluators, self.submission))
        for evaluators, answered in others:
            for task, evaluator in first.items():
                evaluator.merge(evaluators[task])
            if submission:
                submission.merge(answered)
        if submission and is_first():
            submission.save()
        bad = sum(gather(bad))
        if bad:
            logging.warning(
                "%s %s: %d images could not be read; the figures are without them",
                self.source.name,
                self.source.split,
                bad,
            )
        return first

    def _update(self, items: list[Shown]) -> None:
        if any(TASKS[task].by_class for task in self.tasks):
            self._update_classes(items)
        if "referring" in self.tasks:
            asking = [item for item in items if _expressions(item.record)]
            texts = [[text for text, _ in _expressions(item.record)] for item in asking]
            for item, asked, raw in zip(asking, texts, self._predict_regions([i.image for i in asking], texts)):
                self._update_referring(item, asked, raw)
        if any(not TASKS[task].needs_prompts for task in self.tasks):
            for item, raw in zip(items, self._predict_regions([i.image for i in items], [["foreground"]] * len(items))):
                self._update_soft(item, raw)
        self.shown += items[: max(0, self.options.num_visualizations - len(self.shown))]

    def _predict_regions(self, images: list[np.ndarray], texts: list[list[str]]) -> list[RawPredictions]:
        """One answer an image, of all views; of a mirrored one only where its texts can be said of the mirrored
        image.
        """
        raws: list[list[RawPredictions]] = [[] for _ in images]
        flips: list[list[bool]] = [[] for _ in images]
        for canvas, flip in self.views:
            asked = [(i, mirrored_texts(texts[i]) if flip else texts[i]) for i in range(len(images))]
            asked = [(i, words) for i, words in asked if words is not None]
            if not asked:
                continue
            flat = [text for _, words in asked for text in words]
            cuts = np.cumsum([len(words) for _, words in asked])[:-1]
            embedded = np.split(np.asarray(self.predictor.embed(flat, [True] * len(flat))), cuts)
            seen = [mirrored_image(images[i]) if flip else images[i] for i, _ in asked]
            for (i, _), raw in zip(asked, self.predictor.predict_raw(seen, embedded, self.options.batch_size, canvas)):
                raws[i].append(raw)
                flips[i].append(flip)
        return [mean_regions(a, f) for a, f in zip(raws, flips)]

    def _update_classes(self, items: list[Shown]) -> None:
        """Only semantic maps are made of all views."""
        raws = {}
        for canvas, flip in dict.fromkeys([self.plain, *(self.views if "semantic" in self.tasks else [])]):
            images = [mirrored_image(item.image) if flip else item.image for item in items]
            raws[canvas, flip] = self.predictor.predict_raw(
                images, [self.classes] * len(items), self.options.batch_size, canvas
            )
        for i, item in enumerate(items):
            plain = raws[self.plain][i]
            if "panoptic" in self.tasks:
                item.panoptic = self._postprocess("panoptic", item, plain)
            if "instance" in self.tasks:
                found = self._postprocess("instance", item, plain)
                if item.panoptic is None:
                    item.panoptic = found.above(0.3)
            if "semantic" in self.tasks:
                labels = semantic_map(*joined([raws[view][i] for view in self.views], [flip for _, flip in self.views]))
                self._done("semantic", item.record, labels)
                if item.panoptic is None and len(self.shown) < self.options.num_visualizations:
                    item.panoptic = postprocess(plain, self.names, self.is_region, "semantic", self.options)

    def _postprocess(self, task: str, item: Shown, raw: RawPredictions) -> Segments:
        segments = postprocess(raw, self.names, self.is_region, task, self.options)
        self._done(task, item.record, segments)
        return segments

    def _done(self, task: str, record: Record, answered: Any) -> None:
        """One image's answer to where it is measured, and to where it is kept."""
        self.evaluators[task].update(record, answered)
        if self.submission:
            getattr(self.submission, task)(record, answered)

    def _update_referring(self, item: Shown, texts: list[str], raw: RawPredictions) -> None:
        item.regions = postprocess(raw, texts, np.full(len(texts), True), "referring", self.options)
        for (text, mask), predicted in zip(_expressions(item.record), item.regions.masks):
            target = None if mask is None else item.record.decode_mask(mask)
            group = _expression_group(text, self.options.expression_groups)
            self.evaluators["referring"].update(predicted, target, group, item.record.key)
        if self.submission:
            self.submission.referring(item.record, item.regions)

    def _update_soft(self, item: Shown, raw: RawPredictions) -> None:
        """The soft mask of the foreground as a saliency map and as a matte; where there is a refiner, its matte too."""
        record, soft = item.record, soft_mask(raw.class_probs, raw.masks, 0)
        truth, matte, refiner = _foreground(record), _matte(record), getattr(self.predictor, "refiner", None)
        if "foreground" in self.tasks and truth is not None:
            self.evaluators["foreground"].update(soft, truth, record.key)
            if self.submission:
                self.submission.soft("foreground", record, soft)
        if "matting" in self.tasks and matte is not None:
            self.evaluators["matting"].update(soft, *matte, record.key)
            refined = refiner(item.image, soft[None])[0] if refiner is not None else soft
            if refiner is not None:
                self.evaluators["matting"].update(refined, *matte, record.key, "refined_")
            if self.submission:
                self.submission.soft("matting", record, refined)
        if item.regions is None and truth is not None:
            item.regions = postprocess(raw, ["foreground"], np.array([True]), "foreground", self.options)


def _read(source: ShardSource, index: int) -> Shown:
    """One record with all that an evaluator will decode of it. Raises BadRecord where any of it is damaged."""
    record = Record.from_bytes(source[index])
    for segment in record.segments:
        if segment.mask is not None:
            record.decode_mask(segment.mask)
        if segment.alpha is not None:
            record.decode_alpha(segment.alpha)
        if segment.trimap is not None:
            record.decode_alpha(segment.trimap)
    return Shown(record, record.decode_image())


def _expressions(record: Record) -> list[tuple[str, bytes | None]]:
    """Each expression of an image with its mask (None: it names nothing); those known by a box alone are left out."""
    named = [(text, s.mask) for s in record.segments if s.mask is not None and not s.crowd for text in s.texts]
    return named + [(text, None) for text in record.absent_texts]


def _expression_group(text: str, groups: Sequence[tuple[str, str]]) -> str | None:
    return next((name for name, pattern in groups if re.search(pattern, text)), None)


def _foreground(record: Record) -> np.ndarray | None:
    """The foreground of a record as floats 0 to 1: its matte where there is one, else its mask."""
    for segment in record.segments:
        if segment.foreground and segment.alpha is not None:
            return record.decode_alpha(segment.alpha) / 255.0
        if segment.foreground and segment.mask is not None:
            return record.decode_mask(segment.mask).astype(np.float64)
    return None


def _matte(record: Record) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The alpha of a record's foreground as floats 0 to 1 and its trimap, if it has one; None where it has no matte."""
    for segment in record.segments:
        if segment.foreground and segment.alpha is not None:
            return record.decode_alpha(segment.alpha) / 255.0, None if segment.trimap is None else record.decode_alpha(
                segment.trimap
            )
    return None


def make_evaluator(task: str, info: DatasetInfo, learnable: int) -> Any:
    """Return the evaluator of a task. learnable: the number of learnable queries, whose share PQ reports."""
    module, _, name = TASKS[task].evaluator.partition(":")
    kind = getattr(importlib.import_module(module), name)
    given = {"info": info, "learnable": learnable}
    return kind(**{key: given[key] for key in inspect.signature(kind).parameters if key in given})


def explain(results: dict[str, float]) -> list[str]:
    """Return a line for each metric of the printed table that says what it means."""
    shown: dict[str, str] = {}
    for key in results:
        task, metric = key.split(".", 1)
        metric = metric.split("/")[0]
        if text := TASKS[task.rsplit("/", 1)[-1]].metrics.get(metric):
            shown.setdefault(metric, text)
    width = max(map(len, shown), default=0)
    return [f"  {metric:{width}}  {text}" for metric, text in shown.items()]


def table(results: dict[str, float]) -> str:
    """The headline of each task, a line each; eval.json has the rest."""
    tasks: dict[str, list[str]] = {}
    for key, value in results.items():
        task, metric = key.split(".", 1)
        name = task.rsplit("/", 1)[-1]
        if metric.split("/")[0] in TASKS[name].metrics:
            tasks.setdefault(task, []).append(f"{metric} {value:.{2 if name == 'matting' else 1}f}")
    return "\n".join(f"{task:>24}  " + "  ".join(metrics) for task, metrics in tasks.items())


# --- the command line


def named(sets: Sequence[dict], names: Sequence[str]) -> tuple[dict, ...]:
    """The sets that are called NAME/SPLIT, all of them where nothing is named. Raises ValueError in one line for an
    unknown one.
    """
    known = [f"{entry['name']}/{entry['split']}" for entry in sets]
    for name in names:
        if name not in known:
            raise ValueError(f"--datasets={name}: config.eval.sets of this recipe has {', '.join(known) or 'nothing'}.")
    return tuple(entry for entry, name in zip(sets, known) if not names or name in names)


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    cli.no_arguments(argv)
    config, out = given.config, given.output or os.path.join(given.checkpoint, "eval")
    recipes.check(config)
    config.eval.sets = named(config.eval.sets, given.datasets)
    if not config.eval.sets:
        raise ValueError("config.eval.sets = (): this recipe evaluates nothing; name sets there.")
    distributed.initialize()
    cli.keep_compiled()
    results = evaluate(
        Predictor.from_checkpoint(given.checkpoint, jax.local_devices()), config, out, given.save_predictions
    )
    if is_first():
        print(table(results))
        print(f"\n{out}: eval.json, eval_details.json, pictures" + (", predictions" if given.save_predictions else ""))


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of the command."""
    cli.define_recipe(values)
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir of a training run or folder of a converted model, e.g. runs/demo. Required.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "datasets",
        [],
        "Data sets of the recipe's eval.sets to evaluate, e.g. refcoco/val,lvis/val. (default: all)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "Folder for the results, e.g. results/demo. (default: CHECKPOINT/eval)", flag_values=values
    )
    flags.DEFINE_bool(
        "save_predictions",
        False,
        "Also write the predictions in the formats of the benchmarks. (default: false)",
        flag_values=values,
    )
    flags.mark_flags_as_required(["config", "checkpoint"], values)


def run(argv: Sequence[str]) -> None:
    define_flags(flags.FLAGS)
    cli.run(main, "evaluate", __doc__, "stopped; there is no eval.json of it.", argv)
