"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019), computed by hotcoco as in panopticapi."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from hotcoco.panoptic import PanopticEval
from jaxtyping import Bool, Int

from mqformer_jax.evaluation import shifted, worst
from mqformer_jax.input.record import DatasetInfo, Record, encode_rle
from mqformer_jax.segments import Segments, ground_truth_segments


class PanopticEvaluator:
    """PQ of the classes of one data set. Prompt i of the evaluated `Segments` is class i of `info`.

    Pixels without a labeled segment (including `Record.ignore`) are void: they do not count, and a prediction that lies
    mostly on void or on a crowd of its own class is not a false positive.
    learnable: the number of learnable queries, which come first. If it is given, their share of the true positives is
        reported too.
    """

    def __init__(self, info: DatasetInfo, learnable: int | None = None):
        self.info, self.learnable = info, learnable
        # rows: things, stuff; columns: all true positives, true positives of learnable queries
        self.matched = np.zeros((2, 2), int)
        self.images: list[dict] = []
        self.truth: list[dict] = []
        self.found: list[dict] = []

    def update(self, record: Record, segments: Segments) -> None:
        """Add one image. segments: the result of `panoptic_segments`; they must not overlap."""
        if segments.panoptic is None or len(segments.texts) != len(self.info.classes):
            raise ValueError(
                f"{record.key}: panoptic quality needs panoptic segments with the {len(self.info.classes)} classes of "
                f"{self.info.name} as prompts, but the segments have {len(segments.texts)} prompts."
            )
        image = {"id": len(self.images) + 1, "height": record.height, "width": record.width, "file_name": record.key}
        self.images.append(image)
        labeled = ground_truth_segments(record, self.info)
        known = (
            np.ones((record.height, record.width), bool)
            if record.ignore is None
            else ~record.decode_mask(record.ignore)
        )
        self._add(self.truth, labeled, known)
        self._add(self.found, segments, np.ones_like(known))
        taken = (labeled.panoptic > 0) | ~known  # a pixel belongs to one segment, as in a panoptic PNG
        for segment in record.segments:
            if segment.crowd and segment.class_id is not None and segment.mask is not None:
                mask = record.decode_mask(segment.mask) & ~taken
                taken |= mask
                self._append(self.truth, segment.class_id, mask, crowd=True)
        if self.learnable is not None:
            for k in np.flatnonzero(
                _matched(np.where(known, labeled.panoptic, 0), labeled.prompt_ids, segments, ~(taken & known))
            ):
                is_region = int(self.info.classes[segments.prompt_ids[k]].is_region)
                self.matched[is_region] += 1, segments.query_ids[k] < self.learnable

    def merge(self, other: PanopticEvaluator) -> None:
        """Add the state of another process; its images come after those of this one."""
        shift = len(self.images)
        self.truth += shifted(other.truth, shift, len(self.truth))
        self.found += shifted(other.found, shift, len(self.found))
        self.images += [{**image, "id": image["id"] + shift} for image in other.images]
        self.matched += other.matched

    def result(self) -> dict[str, float]:
        """Return pq, sq and rq in percent, averaged over the classes that occur.

        If the data set has things and stuff, also return the three metrics for each, with the suffix _things or _stuff.
        learnable_share_things, learnable_share_stuff: share of the true positives that learnable queries predict. A
        region that several queries predict counts for the first of them.
        """
        results = self._evaluate(self.images, self.truth, self.found)
        groups = {"": "All"}
        if len({c.is_region for c in self.info.classes}) == 2:
            groups |= {"_things": "Things", "_stuff": "Stuff"}
        quality = {
            f"{k}{suffix}": 100.0 * results[group][k] for suffix, group in groups.items() for k in ("pq", "sq", "rq")
        }
        kinds = zip(("things", "stuff"), self.matched.tolist())
        return quality | {
            f"learnable_share_{kind}": 100.0 * learnable / matched for kind, (matched, learnable) in kinds if matched
        }

    def details(self) -> dict:
        """Return the metrics of each class that occurs, and the images with the lowest PQ.

        Each class has is_region, pq, sq and rq in percent, and the counts tp, fp and fn.
        """
        classes = {}
        for i, values in sorted(self._evaluate(self.images, self.truth, self.found)["per_class"].items()):
            if values["tp"] + values["fp"] + values["fn"]:
                quality = {k: 100.0 * values[k] for k in ("pq", "sq", "rq")}
                info = self.info.classes[i - 1]
                counts = {k: values[k] for k in ("tp", "fp", "fn")}
                classes[info.name] = {"is_region": info.is_region} | quality | counts
        truth, found, scores = _by_image(self.truth), _by_image(self.found), []
        for image in self.images:
            total = self._evaluate([image], truth[image["id"]], found[image["id"]])["All"]
            if total["n"]:
                scores.append((image["file_name"], 100.0 * total["pq"]))
        return {"classes": classes, "worst_images": worst("pq", scores)}

    def _evaluate(self, images: list[dict], truth: list[dict], found: list[dict]) -> dict:
        categories = [
            {"id": i + 1, "name": c.name, "isthing": int(not c.is_region)} for i, c in enumerate(self.info.classes)
        ]
        dataset = lambda annotations: {"images": images, "categories": categories, "annotations": annotations}
        evaluation = PanopticEval(dataset(truth), dataset(found))
        evaluation.evaluate()
        return evaluation.results()

    def _add(self, annotations: list[dict], segments: Segments, known: np.ndarray) -> None:
        for i, label in enumerate(segments.prompt_ids):
            self._append(annotations, int(label), (segments.panoptic == i + 1) & known)

    def _append(self, annotations: list[dict], label: int, mask: np.ndarray, crowd: bool = False) -> None:
        if mask.any():
            rle = {"size": list(mask.shape), "counts": encode_rle(mask)}
            fields = {"id": len(annotations) + 1, "image_id": len(self.images), "category_id": label + 1}
            annotations.append({**fields, "segmentation": rle, "area": int(mask.sum()), "iscrowd": int(crowd)})


def _by_image(annotations: list[dict]) -> dict[int, list[dict]]:
    found = defaultdict(list)
    for annotation in annotations:
        found[annotation["image_id"]].append(annotation)
    return found


def _matched(
    truth: Int[np.ndarray, "h w"], labels: Int[np.ndarray, " n"], segments: Segments, void: Bool[np.ndarray, "h w"]
) -> Bool[np.ndarray, " m"]:
    """Return which predicted segments are true positives: their IoU with a true segment of their class is above 0.5.

    truth: index of the true segment + 1 at each pixel; 0 for pixels without one and for crowds. labels: classes of the
    true segments. void: unlabeled pixels, which do not count in the IoU.
    """
    n, m = len(labels), len(segments)
    shared = np.bincount((truth * (m + 1) + segments.panoptic).ravel(), minlength=(n + 1) * (m + 1)).reshape(
        n + 1, m + 1
    )
    union = (
        shared.sum(1, keepdims=True) + shared.sum(0) - shared - np.bincount(segments.panoptic[void], minlength=m + 1)
    )
    iou = shared[1:, 1:] / np.maximum(union[1:, 1:], 1)
    return ((iou > 0.5) & (labels[:, None] == segments.prompt_ids)).any(0)
