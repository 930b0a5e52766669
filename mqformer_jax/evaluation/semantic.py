"""Mean intersection over union of classes by the protocol of mmsegmentation, computed by hotcoco."""

from __future__ import annotations

import numpy as np
from hotcoco import metrics
from hotcoco.semantic import SemanticEval
from jaxtyping import Int

from mqformer_jax.evaluation import worst
from mqformer_jax.input.record import DatasetInfo, Record


class SemanticEvaluator:
    """mIoU over the classes of one data set. Predictions are maps of class indices."""

    def __init__(self, info: DatasetInfo):
        self.info = info
        self.evaluation = SemanticEval([c.name for c in info.classes], ignore_index=len(info.classes))
        self.scores: list[tuple[str, float]] = []

    def update(self, record: Record, prediction: Int[np.ndarray, "h w"]) -> None:
        """Add one image. prediction: the result of `semantic_map` at the record's size."""
        size = (record.height, record.width)
        if prediction.shape != size:
            raise ValueError(
                f"{record.key}: the prediction has shape {prediction.shape}, but the image has {size}; "
                "resize the prediction to the image."
            )
        truth = ground_truth_map(record, self.info)
        prediction = prediction.astype(np.int32)
        count = len(self.info.classes)
        self.evaluation.update(truth, prediction)
        if (truth < count).any():
            scores = metrics.mean_iou(metrics.pixel_confusion(truth, prediction, count, ignore_index=count))
            self.scores.append((record.key, 100.0 * scores["mIoU"]))

    def merge(self, other: SemanticEvaluator) -> None:
        """Add the state of another process."""
        self.evaluation.merge(other.evaluation)
        self.scores += other.scores

    def result(self) -> dict[str, float]:
        """Return miou, fwiou (weighted by pixels) and pixel_accuracy of the classes that occur, in percent."""
        results = self.evaluation.results()
        return {
            name: 100.0 * results[key]
            for name, key in (("miou", "mIoU"), ("fwiou", "fwIoU"), ("pixel_accuracy", "aAcc"))
        }

    def details(self) -> dict:
        """Return iou and accuracy (percent) of each class that occurs, and the images with the lowest mIoU."""
        classes = {
            c["name"]: {"iou": 100.0 * c["IoU"], "accuracy": 100.0 * c["Acc"]}
            for c in self.evaluation.results()["per_class"]
            if c["gt_area"]
        }
        return {"classes": classes, "worst_images": worst("miou", self.scores)}


def ground_truth_map(record: Record, info: DatasetInfo) -> Int[np.ndarray, "h w"]:
    """Return the class index of each pixel. Unlabeled pixels have the index `len(info.classes)` and do not count.

    Crowds have class indices too. Where masks overlap, the later segment in the record wins.
    """
    unknown = len(info.classes)
    out = np.full((record.height, record.width), unknown, np.int32)
    for segment in record.segments:
        if segment.class_id is not None and segment.mask is not None:
            out[record.decode_mask(segment.mask)] = segment.class_id
    if record.ignore is not None:
        out[record.decode_mask(record.ignore)] = unknown
    return out
