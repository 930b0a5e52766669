"""Average precision and recall of masks and boxes by the protocols of COCO and LVIS, computed by hotcoco."""

from __future__ import annotations

from hotcoco import COCO, COCOeval

from mqformer_jax.evaluation import shifted, worst
from mqformer_jax.input.record import DatasetInfo, Record, box_of, encode_rle
from mqformer_jax.segments import Segments

FEDERATED_MAX_DETECTIONS = 300  # segments per image (Gupta et al., "LVIS", CVPR 2019); COCO uses 100
_PRECISIONS = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_s", "APm": "ap_m", "APl": "ap_l"}
_COCO = _PRECISIONS | {"AR1": "ar_1", "AR10": "ar_10", "AR100": "ar_100", "ARs": "ar_s", "ARm": "ar_m", "ARl": "ar_l"}
_LVIS = _PRECISIONS | {"APr": "ap_r", "APc": "ap_c", "APf": "ap_f"}
_LVIS |= {
    f"AR{size}@{FEDERATED_MAX_DETECTIONS}": f"ar_{size or FEDERATED_MAX_DETECTIONS}" for size in ("", "s", "m", "l")
}


class InstanceEvaluator:
    """AP and AR of the things of one data set. Prompt i of the evaluated `Segments` is class i of `info`.

    An image that has a labeled object without a mask counts for box AP only. If the data set is not exhaustive (LVIS),
    the federated protocol applies: predictions of classes that are not labeled in the image do not count.
    """

    def __init__(self, info: DatasetInfo):
        self.info = info
        self.images: list[dict] = []
        self.truth: list[dict] = []
        self.found: list[dict] = []
        self.with_masks: list[int] = []

    def update(self, record: Record, segments: Segments) -> None:
        """Add one image. segments: the result of `instance_segments`. Segments of stuff are left out."""
        if len(segments.texts) != len(self.info.classes):
            raise ValueError(
                f"{record.key}: average precision needs the {len(self.info.classes)} classes of {self.info.name} "
                f"as prompts, but the segments have {len(segments.texts)} prompts."
            )
        image_id = len(self.images) + 1
        image = {"id": image_id, "height": record.height, "width": record.width, "file_name": record.key}
        if not self.info.exhaustive:
            image["neg_category_ids"] = [i + 1 for i in record.absent_classes]
            image["not_exhaustive_category_ids"] = [i + 1 for i in record.partial_classes]
        self.images.append(image)
        things = [s for s in record.segments if s.class_id is not None and not self.info.classes[s.class_id].is_region]
        if all(s.mask is not None for s in things):
            self.with_masks.append(image_id)
        for s in things:
            mask = None if s.mask is None else record.decode_mask(s.mask)
            box = s.box if s.box is not None or mask is None else box_of(mask)
            if box is None:  # an empty mask
                continue
            x0, y0, x1, y1 = box
            area = (x1 - x0) * (y1 - y0) if mask is None else int(mask.sum())
            fields = {
                "id": len(self.truth) + 1,
                "image_id": image_id,
                "category_id": s.class_id + 1,
                "iscrowd": int(s.crowd),
            }
            rle = {} if mask is None else {"segmentation": {"size": list(mask.shape), "counts": s.mask}}
            self.truth.append({**fields, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, **rle})
        for mask, box, score, label in zip(segments.masks, segments.boxes, segments.scores, segments.prompt_ids):
            if not self.info.classes[label].is_region:
                x0, y0, x1, y1 = map(float, box)
                fields = {"image_id": image_id, "category_id": int(label) + 1, "score": float(score)}
                rle = {"size": list(mask.shape), "counts": encode_rle(mask)}
                self.found.append({**fields, "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": rle})

    def merge(self, other: InstanceEvaluator) -> None:
        """Add the state of another process; its images come after those of this one."""
        shift = len(self.images)
        self.truth += shifted(other.truth, shift, len(self.truth))
        self.found += shifted(other.found, shift)
        self.images += [{**image, "id": image["id"] + shift} for image in other.images]
        self.with_masks += [image + shift for image in other.with_masks]

    def result(self) -> dict[str, float]:
        """Return AP and AR of masks and boxes in percent.

        Keys are mask_ap, _ap50, _ap75, _ap_s, _ap_m, _ap_l, _ar_1, _ar_10, _ar_100, _ar_s, _ar_m, _ar_l, and the same
        with box_ instead of mask_. Federated sets have _ar_300 instead of the first three recalls, and _ap_r, _ap_c,
        _ap_f (rare, common and frequent classes) if the number of images of each class is known. A metric for which the
        data set has no objects is left out.
        """
        keys, results = _COCO if self.info.exhaustive else _LVIS, {}
        for name, evaluation in self._evaluations().items():
            values = evaluation.get_results()
            results |= {
                f"{name}_{short}": 100.0 * values[key] for key, short in keys.items() if values.get(key, -1) >= 0
            }
        return results

    def details(self) -> dict:
        """Return the AP of each class in percent, and the images with the lowest AP50 (of masks, else of boxes)."""
        classes: dict[str, dict[str, float]] = {}
        for name, evaluation in self._evaluations().items():
            measured = evaluation.report()["per_class"]  # only classes that occur, unordered
            for label in (c.name for c in self.info.classes if c.name in measured):
                classes.setdefault(label, {})[f"{name}_ap"] = 100.0 * measured[label]["AP"]
            images = evaluation.image_diagnostics()["img_summary"]
        scores = [(self.images[i - 1]["file_name"], 100.0 * image["ap"]) for i, image in images.items()]
        return {"classes": classes, "worst_images": worst(f"{name}_ap50", scores)}

    def _evaluations(self) -> dict[str, COCOeval]:
        boxes = {"box": self._evaluate("bbox", [i["id"] for i in self.images])}
        return boxes | ({"mask": self._evaluate("segm", self.with_masks)} if self.with_masks else {})

    def _evaluate(self, iou_type: str, image_ids: list[int]) -> COCOeval:
        wanted = set(image_ids)
        truth = COCO(
            {
                "images": [i for i in self.images if i["id"] in wanted],
                "categories": self._categories(),
                "annotations": [a for a in self.truth if a["image_id"] in wanted],
            }
        )
        # hotcoco treats a box result with a mask as a mask result and recomputes its box.
        other = "segmentation" if iou_type == "bbox" else "bbox"
        found = [{k: v for k, v in d.items() if k != other} for d in self.found if d["image_id"] in wanted]
        evaluation = COCOeval(truth, truth.load_res(found), iou_type, lvis_style=not self.info.exhaustive)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summary_lines()  # `summarize` without printing; fills the results
        return evaluation

    def _categories(self) -> list[dict]:
        shown = self.info.class_images.get("train") or next(iter(self.info.class_images.values()), ())
        frequency = [{"frequency": "r" if n <= 10 else "c" if n <= 100 else "f"} for n in shown] or [{}] * len(
            self.info.classes
        )
        return [
            {"id": i + 1, "name": c.name, **frequency[i]} for i, c in enumerate(self.info.classes) if not c.is_region
        ]
