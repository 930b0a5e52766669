"""AP against pycocotools on noisy copies of a random ground truth."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mqformer_jax.evaluation.instance import InstanceEvaluator
from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, Segment, encode_rle
from mqformer_jax.segments import Segments

INFO = DatasetInfo("toy", (ClassInfo(("cat",)), ClassInfo(("sky",), is_region=True), ClassInfo(("dog",))), {})
TEXTS = [c.name for c in INFO.classes]
SIZE = 224


def ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1


def box(mask: np.ndarray) -> list[float]:
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(cols[0]), float(rows[0]), float(cols[-1] + 1), float(rows[-1] + 1)]


def random_set(images: int = 8) -> tuple[list[Record], list[Segments]]:
    rng = np.random.default_rng(0)
    records, answers = [], []
    for image in range(images):
        segments, masks, boxes, scores, labels = [], [], [], [], []
        for i in range(7):
            shape = np.concatenate([rng.uniform(70, 150, 2), rng.choice([10, 25, 65], 1) * rng.uniform(0.8, 1.2, 2)])
            mask, label = ellipse(*shape), int(rng.integers(0, 3))
            segments.append(Segment(label, box=tuple(box(mask)), mask=encode_rle(mask), crowd=label != 1 and i == 6))
            for _ in range(int(rng.integers(0, 3))):
                noisy = ellipse(*(shape + rng.normal(size=4) * 0.12 * shape.min()))
                masks.append(noisy)
                boxes.append(np.array(box(noisy)) + rng.normal(size=4))
                scores.append(rng.random())
                labels.append(label if rng.random() < 0.9 else 2 - label)
        records.append(Record(str(image), b"", SIZE, SIZE, tuple(segments)))
        prompts = np.array(labels)
        answers.append(
            Segments(TEXTS, np.stack(masks), np.array(boxes, np.float32), np.array(scores), prompts, prompts)
        )
    return records, answers


def xywh(b) -> list[float]:
    x0, y0, x1, y1 = map(float, b)
    return [x0, y0, x1 - x0, y1 - y0]


def reference(records: list[Record], answers: list[Segments], iou_type: str) -> np.ndarray:
    """pycocotools' AP, AP50, AP75, small, medium, large, AR with 1, 10, 100 segments an image, small, medium, large, in
    percent.
    """
    truth, found = [], []
    for i, (record, answer) in enumerate(zip(records, answers)):
        for s in (s for s in record.segments if s.class_id != 1):
            mask = record.decode_mask(s.mask)
            fields = {
                "id": len(truth) + 1,
                "image_id": i,
                "category_id": s.class_id,
                "iscrowd": int(s.crowd),
                "bbox": xywh(s.box),
            }
            truth.append({**fields, "area": int(mask.sum()), "segmentation": {"size": [SIZE, SIZE], "counts": s.mask}})
        for mask, b, score, label in zip(answer.masks, answer.boxes, answer.scores, answer.prompt_ids):
            where = (
                {"segmentation": {"size": [SIZE, SIZE], "counts": encode_rle(mask)}}
                if iou_type == "segm"
                else {"bbox": xywh(b)}
            )
            if label != 1:
                found.append({"image_id": i, "category_id": int(label), "score": float(score), **where})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        images = [{"id": i, "height": SIZE, "width": SIZE} for i in range(len(records))]
        coco.dataset = {"images": images, "categories": [{"id": 0}, {"id": 2}], "annotations": truth}
        coco.createIndex()
        e = COCOeval(coco, coco.loadRes(found), iou_type)
        e.evaluate()
        e.accumulate()
        e.summarize()
    return 100 * e.stats


def evaluated(records: list[Record], answers: list[Segments], info: DatasetInfo = INFO) -> dict[str, float]:
    evaluator = InstanceEvaluator(info)
    for record, answer in zip(records, answers):
        evaluator.update(record, answer)
    return evaluator.result()


def test_mask_and_box_ap_and_ar_match_pycocotools():
    records, answers = random_set()
    result = evaluated(records, answers)
    for name, iou_type in (("mask", "segm"), ("box", "bbox")):
        want = reference(records, answers, iou_type)
        assert 5 < want[0] < 95 and (want >= 0).all()
        keys = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "ar_1", "ar_10", "ar_100", "ar_s", "ar_m", "ar_l")
        got = [result[f"{name}_{k}"] for k in keys]
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_predictions_inside_a_crowd_are_not_false_positives():
    mask = ellipse(80, 80, 40, 40)
    inside = np.stack([mask, ellipse(70, 70, 8, 8), ellipse(20, 20, 10, 10)])
    crowd = Segment(0, mask=encode_rle(ellipse(80, 80, 60, 60)), crowd=True)
    record = Record("a", b"", SIZE, SIZE, (crowd, Segment(0, mask=encode_rle(inside[2]))))
    zeros = np.zeros(3, int)
    answer = Segments(TEXTS, inside, np.array([box(m) for m in inside]), np.array([0.9, 0.8, 0.7]), zeros, zeros)
    assert evaluated([record], [answer])["mask_ap"] == pytest.approx(100)
    alone = Record("a", b"", SIZE, SIZE, record.segments[1:])
    assert evaluated([alone], [answer])["mask_ap"] < 50


def test_objects_without_masks_give_box_ap_only():
    b = (10.0, 10.0, 50.0, 60.0)
    record = Record("a", b"", SIZE, SIZE, (Segment(0, box=b),))
    answer = Segments(
        TEXTS, np.zeros((1, SIZE, SIZE), bool), np.array([b]), np.ones(1), np.zeros(1, int), np.zeros(1, int)
    )
    result = evaluated([record], [answer])
    assert result["box_ap"] == pytest.approx(100) and "mask_ap" not in result


def test_unchecked_classes_of_federated_sets_give_no_false_positives():
    info = DatasetInfo("lvis", INFO.classes, {}, exhaustive=False)
    masks = np.stack([ellipse(40, 40, 20, 20), ellipse(110, 110, 20, 20)])
    zeros = np.zeros(2, int)
    cat = Record("a", b"", SIZE, SIZE, (Segment(0, mask=encode_rle(masks[0])),))
    answer = Segments(TEXTS, masks[:1], np.array([box(masks[0])]), np.array([0.5]), zeros[:1], zeros[:1])
    false = Segments(TEXTS, masks[1:], np.array([box(masks[1])]), np.array([0.9]), zeros[:1], zeros[:1])
    unchecked, absent = Record("b", b"", SIZE, SIZE), Record("b", b"", SIZE, SIZE, absent_classes=(0,))
    assert evaluated([cat, unchecked], [answer, false], info)["mask_ap"] == pytest.approx(100)
    assert evaluated([cat, absent], [answer, false], info)["mask_ap"] == pytest.approx(50)


def test_ap_is_zero_without_predictions():
    records, _ = random_set(1)
    empty = Segments(
        TEXTS, np.zeros((0, SIZE, SIZE), bool), np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), np.zeros(0, int)
    )
    result = evaluated(records, [empty])
    assert result["mask_ap"] == 0 and result["box_ap"] == 0


def test_class_frequency_groups_use_training_image_counts():
    records, answers = random_set()
    info = DatasetInfo(
        "lvis", INFO.classes, {}, exhaustive=False, class_images={"val": (500, 0, 1), "train": (10, 0, 101)}
    )
    evaluator = InstanceEvaluator(info)
    for record, answer in zip(records, answers):
        evaluator.update(record, answer)
    result, classes = evaluator.result(), evaluator.details()["classes"]
    assert result["mask_ap_r"] == classes["cat"]["mask_ap"] and result["mask_ap_f"] == classes["dog"]["mask_ap"]
    assert "mask_ap_c" not in result and "mask_ar_300" in result and "mask_ar_100" not in result
