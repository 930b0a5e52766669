"""The definition of each task, read by recipes, input, predictor, evaluation, command line and web app.

To add a task: add it here, turn its annotations into prompts and targets (input/tasks.py), and write an evaluator.
"""

from __future__ import annotations

import dataclasses

FOREGROUND = "foreground"  # the default prompt of tasks that do not need prompts


@dataclasses.dataclass(frozen=True)
class Task:
    """The definition of one task.

    help: a description for users, in one or two sentences.
    segments: how scores and masks become segments: "panoptic" (no overlaps), "instance" (ranked, may overlap),
        "semantic" (every pixel to one prompt), "region" (one region for each prompt), or "" if it cannot be predicted.
    evaluator: "module:class" of the evaluator, or "" if there is none.
    metrics: {name: meaning} of the metrics in the printed table.
    trained: whether a training mixture may name the task.
    by_class: whether the prompts are class names, to which templates apply.
    chooses_regions: whether the user marks with "*" each prompt that stands for one region, while others may have
        several instances. If False, every prompt stands for one region.
    needs_prompts: False if the prompt defaults to "foreground".
    soft: whether there is also a soft mask or matte, which can be used as an alpha channel.
    score: default score threshold on the command line, or None for the threshold of the recipe.
    """

    help: str
    segments: str = ""
    evaluator: str = ""
    metrics: dict[str, str] = dataclasses.field(default_factory=dict)
    trained: bool = True
    by_class: bool = False
    chooses_regions: bool = False
    needs_prompts: bool = True
    soft: bool = False
    score: float | None = None


_SHARE = "share of the true positives that learnable queries predict, %"
TASKS = {
    "panoptic": Task(
        help="Every pixel belongs to at most one segment. A star makes a prompt one region (sky*); other prompts are "
        "split into instances.",
        segments="panoptic",
        evaluator="mqformer_jax.evaluation.panoptic:PanopticEvaluator",
        metrics={
            "pq": "panoptic quality, 0 to 100: recognition quality times segmentation quality",
            "pq_things": "the same for things (instances)",
            "pq_stuff": "the same for stuff (regions)",
            "learnable_share_things": _SHARE,
            "learnable_share_stuff": _SHARE,
        },
        by_class=True,
        chooses_regions=True,
    ),
    "instance": Task(
        help="One mask for each object, best first. Masks may overlap.",
        segments="instance",
        evaluator="mqformer_jax.evaluation.instance:InstanceEvaluator",
        metrics={
            "mask_ap": "average precision of masks, 0 to 100, mean over IoU thresholds 0.5 to 0.95 (COCO)",
            "mask_ap50": "the same at an IoU threshold of 0.5",
            "mask_ar_100": "average recall with 100 masks per image",
            "mask_ar_300": "average recall with 300 masks per image",
            "box_ap": "average precision of boxes",
            "box_ap50": "the same at an IoU threshold of 0.5",
            "box_ar_100": "average recall with 100 boxes per image",
            "box_ar_300": "average recall with 300 boxes per image",
        },
        by_class=True,
        chooses_regions=True,
        score=0.3,
    ),
    "semantic": Task(
        help="Every pixel belongs to the prompt that fits it best.",
        segments="semantic",
        evaluator="mqformer_jax.evaluation.semantic:SemanticEvaluator",
        metrics={
            "miou": "intersection over union, 0 to 100, mean over classes",
            "pixel_accuracy": "pixels with the right class, %",
        },
        by_class=True,
    ),
    "detection": Task(help="Boxes of objects, for data sets that have no masks.", by_class=True),
    "referring": Task(
        help='One region for each phrase, such as "the red star on the left".',
        segments="region",
        evaluator="mqformer_jax.evaluation.referring:ReferringEvaluator",
        metrics={
            "miou": "intersection over union, 0 to 100, mean over phrases (with /GROUP: over one group of phrases)",
            "ciou": "sum of all intersections over sum of all unions; large objects dominate it",
            "precision@0.5": "phrases whose region has an IoU of at least 0.5, %",
            "no_target_accuracy": "phrases without a target that get no region, %",
        },
        soft=True,
    ),
    "foreground": Task(
        help="The salient object, as one region. It needs no prompts.",
        segments="region",
        evaluator="mqformer_jax.evaluation.foreground:ForegroundEvaluator",
        metrics={
            "mae": "mean absolute error of the soft mask, 0 to 100: lower is better",
            "mse": "mean squared error of the soft mask, 0 to 100: lower is better",
            "max_f": "best F-measure over thresholds, 0 to 100",
            "s_measure": "structure measure, 0 to 100",
            "mean_e": "enhanced-alignment measure, mean over thresholds, 0 to 100",
        },
        needs_prompts=False,
        soft=True,
    ),
    "matting": Task(
        help="One region for each prompt, with soft edges. Without prompts, the salient object.",
        segments="region",
        evaluator="mqformer_jax.evaluation.alpha:AlphaEvaluator",
        metrics={
            "sad": "sum of absolute differences to the true matte, in thousands of pixels: lower is better",
            "mse": "mean squared error, in thousandths: lower is better",
            "grad": "error of the matte's gradient, in thousands: lower is better",
            "conn": "connectivity error, in thousands: lower is better",
            **{f"refined_{name}": "the same after the matting refiner" for name in ("sad", "mse", "grad", "conn")},
        },
        trained=False,
        needs_prompts=False,
        soft=True,
    ),
}
TRAINED = tuple(name for name, task in TASKS.items() if task.trained)
EVALUATED = tuple(name for name, task in TASKS.items() if task.evaluator)
PREDICTED = tuple(name for name, task in TASKS.items() if task.segments)
