"""Evaluate a checkpoint on the data sets of a recipe.

    mqformer evaluate --config=coco_ref:sample --checkpoint=runs/demo --save_predictions

Prints a table. Writes eval.json, eval_details.json and, for each data set, a picture of predictions.
"""

from __future__ import annotations

import importlib
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

# the tasks that `SetEvaluation._update` passes to their evaluators
UPDATED = {"panoptic", "instance", "semantic", "referring", "foreground", "matting"}


def evaluate(predictor: Predictor, config: ConfigDict, folder: str, save_predictions: bool = False) -> dict[str, float]:
    """Evaluate the sets of `config.eval`. Write eval.json, eval_details.json and an image grid per set to `folder`.

    Each process evaluates its share of the images, and the first one writes. Returns the metrics. Their keys are
    "task.metric" ("panoptic.pq") for the first set of a task, and "name/split/task.metric" for its other sets. Values
    are in percent (mattes: see `AlphaEvaluator`). eval_details.json holds the metrics of each class and the worst
    images, by set and task. save_predictions: also write predictions/NAME_SPLIT in the formats of benchmarks
    (`Submission`).
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
            results |= {f"{prefix}.{name}": value for name, value in metrics.items()}
            if source.name.startswith("seginw_") and "mask_ap" in metrics:
                in_the_wild.append(metrics["mask_ap"])
        if is_first():
            name = f"{source.name}/{source.split}"
            details[name] = {task: evaluator.details() for task, evaluator in evaluators.items()}
            if evaluation.shown:
                grid = os.path.join(folder, f"{source.name}_{source.split}.png")
                overlays.prediction_grid(evaluation.shown, source.info, grid)
    if len(in_the_wild) > 1:  # the two metrics that X-Decoder reports for Segmentation in the Wild
        results["seginw.mean_mask_ap"] = float(np.mean(in_the_wild))
        results["seginw.median_mask_ap"] = float(np.median(in_the_wild))
    if is_first():
        write_json(os.path.join(folder, "eval.json"), results)
        write_json(os.path.join(folder, "eval_details.json"), details)
    return results


class SetEvaluation:
    """The evaluation of one data set on all its tasks in one pass. predictions: folder for the predictions, or None."""

    def __init__(
        self,
        predictor: Predictor,
        options: ConfigDict,
        source: ShardSource,
        tasks: Sequence[str],
        predictions: str | None = None,
    ):
        self.predictor, self.options, self.source, self.tasks, info = predictor, options, source, tasks, source.info
        if unknown := sorted(set(tasks) - UPDATED):
            raise NotImplementedError(f"SetEvaluation._update has no code for the task {unknown[0]!r}; add it.")
        by_class = [task for task in tasks if TASKS[task].by_class]
        if by_class and not info.classes:
            raise ValueError(f"config.eval.sets: {source.name} has no classes; remove its tasks {', '.join(by_class)}.")
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
        # Any: the arguments of `update` depend on the task
        self.evaluators: dict[str, Any] = {task: make_evaluator(task, info, learnable) for task in tasks}

    def run(self) -> dict[str, Any]:
        """Evaluate all images, split among the processes. Return {task: evaluator}. Log and skip unreadable images."""
        count, bad, pending = min(len(self.source), self.options.max_images or len(self.source)), 0, []
        mine = np.array_split(np.arange(count), jax.process_count())[jax.process_index()]
        name = f"evaluate {self.source.name} {self.source.split}"
        for i in tqdm(mine.tolist(), desc=name, unit="image", dynamic_ncols=True, disable=not is_first()):
            try:
                pending.append(_read(self.source, i))
            except BadRecord as e:
                bad += 1
                logging.warning(
                    "%s %s: record %d is left out of the evaluation: %s", self.source.name, self.source.split, i, e
                )
            if pending and (len(pending) == self.options.batch_size or i == mine[-1]):
                self._update(pending)
                pending = []
        # Merge in the order of the images, so that the result does not depend on the number of processes.
        (first, submission), *others = gather((self.evaluators, self.submission))
        for evaluators, other_submission in others:
            for task, evaluator in first.items():
                evaluator.merge(evaluators[task])
            if submission:
                submission.merge(other_submission)
        if submission and is_first():
            submission.save()
        bad = sum(gather(bad))
        if bad:
            logging.warning(
                "%s %s: %d images could not be read and are left out of the metrics",
                self.source.name,
                self.source.split,
                bad,
            )
        return first

    def _update(self, items: list[Shown]) -> None:
        if any(TASKS[task].by_class for task in self.tasks):
            self._update_classes(items)
        if "referring" in self.tasks:
            referring = [item for item in items if _expressions(item.record)]
            texts = [[text for text, _ in _expressions(item.record)] for item in referring]
            raws = self._predict_regions([item.image for item in referring], texts)
            for item, item_texts, raw in zip(referring, texts, raws):
                self._update_referring(item, item_texts, raw)
        if any(not TASKS[task].needs_prompts for task in self.tasks):
            for item, raw in zip(items, self._predict_regions([i.image for i in items], [["foreground"]] * len(items))):
                self._update_soft(item, raw)
        self.shown += items[: max(0, self.options.num_visualizations - len(self.shown))]

    def _predict_regions(self, images: list[np.ndarray], texts: list[list[str]]) -> list[RawPredictions]:
        """Return one prediction per image, averaged over views. texts: the prompts of each image.

        An image with a text that cannot be mirrored has no mirrored views.
        """
        raws: list[list[RawPredictions]] = [[] for _ in images]
        flips: list[list[bool]] = [[] for _ in images]
        for canvas, flip in self.views:
            prompts = [(i, mirrored_texts(texts[i]) if flip else texts[i]) for i in range(len(images))]
            prompts = [(i, words) for i, words in prompts if words is not None]
            if not prompts:
                continue
            flat = [text for _, words in prompts for text in words]
            cuts = np.cumsum([len(words) for _, words in prompts])[:-1]
            embedded = np.split(np.asarray(self.predictor.embed(flat, [True] * len(flat))), cuts)
            view = [mirrored_image(images[i]) if flip else images[i] for i, _ in prompts]
            predicted = self.predictor.predict_raw(view, embedded, self.options.batch_size, canvas)
            for (i, _), raw in zip(prompts, predicted):
                raws[i].append(raw)
                flips[i].append(flip)
        return [mean_regions(a, f) for a, f in zip(raws, flips)]

    def _update_classes(self, items: list[Shown]) -> None:
        """Predict all classes, and add the results to the evaluators of panoptic, instance and semantic segmentation.

        Only semantic maps are averaged over all views (scales and flips).
        """
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
                self._add("semantic", item.record, labels)
                if item.panoptic is None and len(self.shown) < self.options.num_visualizations:
                    item.panoptic = postprocess(plain, self.names, self.is_region, "semantic", self.options)

    def _postprocess(self, task: str, item: Shown, raw: RawPredictions) -> Segments:
        segments = postprocess(raw, self.names, self.is_region, task, self.options)
        self._add(task, item.record, segments)
        return segments

    def _add(self, task: str, record: Record, prediction: Any) -> None:
        """Add the prediction for one image to the evaluator and to the submission."""
        self.evaluators[task].update(record, prediction)
        if self.submission:
            getattr(self.submission, task)(record, prediction)

    def _update_referring(self, item: Shown, texts: list[str], raw: RawPredictions) -> None:
        item.regions = postprocess(raw, texts, np.full(len(texts), True), "referring", self.options)
        for (text, mask), predicted in zip(_expressions(item.record), item.regions.masks):
            target = None if mask is None else item.record.decode_mask(mask)
            group = _expression_group(text, self.options.expression_groups)
            self.evaluators["referring"].update(predicted, target, group, item.record.key)
        if self.submission:
            self.submission.referring(item.record, item.regions)

    def _update_soft(self, item: Shown, raw: RawPredictions) -> None:
        """Evaluate the foreground's soft mask for the tasks foreground and matting, and the refined matte, if any."""
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
    """Read one record. Raises BadRecord if anything that an evaluator decodes is damaged."""
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
    """Return (expression, mask) for each expression of an image. The mask is None if the expression has no target.

    Expressions whose target has only a box or is a crowd are left out.
    """
    named = [(text, s.mask) for s in record.segments if s.mask is not None and not s.crowd for text in s.texts]
    return named + [(text, None) for text in record.absent_texts]


def _expression_group(text: str, groups: Sequence[tuple[str, str]]) -> str | None:
    return next((name for name, pattern in groups if re.search(pattern, text)), None)


def _foreground(record: Record) -> np.ndarray | None:
    """Return the matte, or else the mask, of a record's foreground as floats 0 to 1; None if it has neither."""
    for segment in record.segments:
        if segment.foreground and segment.alpha is not None:
            return record.decode_alpha(segment.alpha) / 255.0
        if segment.foreground and segment.mask is not None:
            return record.decode_mask(segment.mask).astype(np.float64)
    return None


def _matte(record: Record) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Return (alpha as floats 0 to 1, trimap or None) of the foreground, or None if the record has no matte."""
    for segment in record.segments:
        if segment.foreground and segment.alpha is not None:
            return record.decode_alpha(segment.alpha) / 255.0, None if segment.trimap is None else record.decode_alpha(
                segment.trimap
            )
    return None


def make_evaluator(task: str, info: DatasetInfo, learnable: int) -> Any:
    """Return the evaluator of a task. learnable: number of learnable queries, for the metrics `learnable_share_*`."""
    module, _, name = TASKS[task].evaluator.partition(":")
    kind = getattr(importlib.import_module(module), name)
    if task == "panoptic":
        return kind(info, learnable)
    return kind(info) if TASKS[task].by_class else kind()


def explain(results: dict[str, float]) -> list[str]:
    """Return a line for each metric of the printed table, with the task, the metric's name and an explanation.

    The lines name the task because metrics of different tasks may have the same name, such as mse.
    """
    meanings: dict[str, str] = {}
    for key in results:
        task, metric = (part.split("/") for part in key.split(".", 1))
        if text := TASKS[task[-1]].metrics.get(metric[0]):
            meanings[f"{task[-1]} {metric[0]}"] = text
    width = max(map(len, meanings), default=0)
    return [f"  {name:{width}}  {text}" for name, text in meanings.items()]


def table(results: dict[str, float]) -> str:
    """Return a table of the main metrics (`Task.metrics`). eval.json has all metrics.

    results: {"TASK.METRIC" or "NAME/SPLIT/TASK.METRIC": value}, as from `evaluate`. The table has a line for each task
    of each data set, which starts with the part before the dot, e.g. "panoptic" or "refcoco/val/referring".
    """
    tasks: dict[str, list[str]] = {}
    for key, value in results.items():
        task, metric = key.split(".", 1)
        name = task.rsplit("/", 1)[-1]
        if metric.split("/")[0] in TASKS[name].metrics:
            tasks.setdefault(task, []).append(f"{metric} {value:.{2 if name == 'matting' else 1}f}")
    return "\n".join(f"{task:>24}  " + "  ".join(metrics) for task, metrics in tasks.items())


def named(sets: Sequence[dict], names: Sequence[str]) -> tuple[dict, ...]:
    """Return the sets whose NAME/SPLIT is in `names`, or all if it is empty. Raises ValueError for an unknown name."""
    known = [f"{entry['name']}/{entry['split']}" for entry in sets]
    for name in names:
        if name not in known:
            raise ValueError(f"--datasets={name}: unknown; config.eval.sets has {', '.join(known) or 'no data sets'}.")
    return tuple(entry for entry, name in zip(sets, known) if not names or name in names)


def ignored_fields(recipe: ConfigDict, checkpoint: ConfigDict) -> list[str]:
    """Return the fields of a recipe that are ignored because the checkpoint has other values, which are used."""
    fields = ("canvas", "templates")
    return [f"config.data.{name}" for name in fields if tuple(recipe.data[name]) != tuple(checkpoint.data[name])]


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    cli.no_arguments(argv)
    config, out = given.config, given.output or os.path.join(given.checkpoint, "eval")
    recipes.check(config)
    config.eval.sets = named(config.eval.sets, given.datasets)
    if not config.eval.sets:
        raise ValueError("config.eval.sets is empty: list the data sets to evaluate there.")
    distributed.initialize()
    cli.keep_compiled()
    predictor = Predictor.from_checkpoint(given.checkpoint, jax.local_devices())
    if is_first() and (ignored := ignored_fields(config, predictor.config)):
        logging.warning("fields that are ignored, because the checkpoint has other values: %s", ", ".join(ignored))
    results = evaluate(predictor, config, out, given.save_predictions)
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
        "The data sets in the recipe's eval.sets to evaluate, e.g. refcoco/val,lvis/val. (default: all)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "Folder for the results, e.g. results/demo. (default: CHECKPOINT/eval)", flag_values=values
    )
    flags.DEFINE_bool(
        "save_predictions",
        False,
        "Also write the predictions in the file formats of benchmarks. (default: false)",
        flag_values=values,
    )
    flags.mark_flags_as_required(["config", "checkpoint"], values)


def run(argv: Sequence[str]) -> None:
    define_flags(flags.FLAGS)
    cli.run(main, "evaluate", __doc__, "stopped; eval.json was not written.", argv)
