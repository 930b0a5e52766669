"""Metrics of referring segmentation, in which each expression has one region or none."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from jaxtyping import Bool

from mqformer_jax.evaluation import worst

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class ReferringEvaluator:
    """IoU metrics of expressions with a target, and the share of empty predictions for expressions without a target.

    ciou: sum of all intersections over sum of all unions; large objects dominate it (Yu et al., RefCOCO). miou: mean
    IoU over expressions. precision@t: share of expressions with an IoU of at least t. no_target_accuracy: share of
    expressions without a target whose prediction is empty (Liu et al., "GRES", CVPR 2023).
    """

    def __init__(self):
        # kind → (intersection, union) of each expression, in pixels
        self.areas: dict[str | None, list[tuple[int, int]]] = defaultdict(list)
        self.rejected: list[bool] = []
        # record key → IoU of each expression; for one without a target, 1 if the prediction is empty, else 0
        self.scores: dict[str, list[float]] = defaultdict(list)

    def update(
        self,
        prediction: Bool[np.ndarray, "h w"],
        target: Bool[np.ndarray, "h w"] | None,
        kind: str | None = None,
        key: str = "",
    ) -> None:
        """Add one expression with its predicted mask. target: the true mask, or None if there is no target.

        kind: the group of the expression, e.g. "relation"; each group has metrics of its own. key: of the record, for
        `details`.
        """
        if target is None:
            self.rejected.append(not prediction.any())
            self.scores[key].append(float(self.rejected[-1]))
            return
        if prediction.shape != target.shape:
            raise ValueError(
                f"{key or 'expression'}: the predicted mask has shape {prediction.shape}, but the true mask has "
                f"{target.shape}; resize the prediction to the image."
            )
        intersection, union = int((prediction & target).sum()), int((prediction | target).sum())
        self.areas[kind].append((intersection, union))
        self.scores[key].append(intersection / max(union, 1))

    def merge(self, other: ReferringEvaluator) -> None:
        """Add the state of another process."""
        for kind, areas in other.areas.items():
            self.areas[kind] += areas
        self.rejected += other.rejected
        for key, scores in other.scores.items():
            self.scores[key] += scores

    def result(self) -> dict[str, float]:
        """Return ciou, miou, precision@0.5 to 0.9 and no_target_accuracy, in percent.

        Also return ciou/KIND and miou/KIND for each group, where KIND is the argument `kind` of `update`.
        """
        results = {}
        all_areas = [pair for pairs in self.areas.values() for pair in pairs]
        if all_areas:
            results["ciou"], results["miou"], ious = _ious(all_areas)
            results |= {f"precision@{t}": 100.0 * float(np.mean(ious >= t)) for t in THRESHOLDS}
        if self.rejected:
            results["no_target_accuracy"] = 100.0 * float(np.mean(self.rejected))
        for kind in sorted(k for k in self.areas if k is not None):
            results[f"ciou/{kind}"], results[f"miou/{kind}"], _ = _ious(self.areas[kind])
        return results

    def details(self) -> dict:
        """Return the images whose expressions have the lowest mean IoU."""
        return {
            "worst_images": worst(
                "miou", [(key, 100.0 * float(np.mean(scores))) for key, scores in self.scores.items()]
            )
        }


def _ious(pairs: list[tuple[int, int]]) -> tuple[float, float, np.ndarray]:
    """Return cIoU and mIoU in percent, and the IoU of each expression: 0 if target and prediction are both empty."""
    inter, union = np.array(pairs, np.float64).T
    ious = inter / np.maximum(union, 1)
    return 100.0 * float(inter.sum() / max(union.sum(), 1)), 100.0 * float(ious.mean()), ious
