"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019), computed by hotcoco's panopticapi protocol."""

from __future__ import annotations

import numpy as np
from hotcoco.panoptic import PanopticEval

from mqformer_jax.evaluation import shifted
from mqformer_jax.input.record import DatasetInfo, Record, encode_rle
from mqformer_jax.segments import Segments, ground_truth_segments


class PanopticEvaluator:
    """PQ over the classes of one data set; prompt i of the evaluated `Segments` is class i of `info`.

    Pixels under no labelled segment (`Record.ignore` among them) are void: they count for nothing, and a prediction that
    lies mostly on void or on a crowd of its own class is no false positive.
    """

    def __init__(self, info: DatasetInfo):
        self.info = info
        self.images: list[dict] = []
        self.truth: list[dict] = []
        self.found: list[dict] = []

    def update(self, record: Record, segments: Segments) -> None:
        """`segments` must not overlap: those of `panoptic_segments`."""
        if segments.panoptic is None or len(segments.texts) != len(self.info.classes):
            raise ValueError(
                f"{record.key}: panoptic quality needs panoptic segments with the {len(self.info.classes)} classes of "
                f"{self.info.name} as prompts; these have {len(segments.texts)} prompts."
            )
        image = {"id": len(self.images) + 1, "height": record.height, "width": record.width}
        self.images.append(image)
        labelled = ground_truth_segments(record, self.info)
        known = np.ones((record.height, record.width), bool) if record.ignore is None else ~record.decode_mask(record.ignore)
        self._add(self.truth, labelled, known)
        self._add(self.found, segments, np.ones_like(known))
        taken = (labelled.panoptic > 0) | ~known  # a pixel has one owner, as in a panoptic PNG
        for segment in record.segments:
            if segment.crowd and segment.class_id is not None and segment.mask is not None:
                mask = record.decode_mask(segment.mask) & ~taken
                taken |= mask
                self._append(self.truth, segment.class_id, mask, crowd=True)

    def merge(self, other: PanopticEvaluator) -> None:
        """Adds what another process saw, as images that come after one's own."""
        shift = len(self.images)
        self.truth += shifted(other.truth, shift, len(self.truth))
        self.found += shifted(other.found, shift, len(self.found))
        self.images += [{**image, "id": image["id"] + shift} for image in other.images]

    def result(self) -> dict[str, float]:
        """pq, sq, rq in percent over all classes that occur; the same with _things and _stuff where the data set has both."""
        categories = [{"id": i + 1, "name": c.name, "isthing": int(c.thing)} for i, c in enumerate(self.info.classes)]
        evaluation = PanopticEval(self._dataset(self.truth, categories), self._dataset(self.found, categories))
        evaluation.evaluate()
        results = evaluation.results()
        groups = {"": "All"}
        if len({c.thing for c in self.info.classes}) == 2:
            groups |= {"_things": "Things", "_stuff": "Stuff"}
        return {f"{k}{suffix}": 100.0 * results[group][k] for suffix, group in groups.items() for k in ("pq", "sq", "rq")}

    def _add(self, annotations: list[dict], segments: Segments, known: np.ndarray) -> None:
        for i, label in enumerate(segments.prompt_ids):
            self._append(annotations, int(label), (segments.panoptic == i + 1) & known)

    def _append(self, annotations: list[dict], label: int, mask: np.ndarray, crowd: bool = False) -> None:
        if mask.any():
            rle = {"size": list(mask.shape), "counts": encode_rle(mask)}
            fields = {"id": len(annotations) + 1, "image_id": len(self.images), "category_id": label + 1}
            annotations.append({**fields, "segmentation": rle, "area": int(mask.sum()), "iscrowd": int(crowd)})

    def _dataset(self, annotations: list[dict], categories: list[dict]) -> dict:
        return {"images": self.images, "categories": categories, "annotations": annotations}
