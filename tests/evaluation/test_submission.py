"""What is saved of a model's answers, read back as a benchmark's server reads it."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import test_instance_metric as instance
import test_panoptic_metric as panoptic
from hotcoco.panoptic import pq_compute
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mqformer_jax.evaluation.panoptic import PanopticEvaluator
from mqformer_jax.evaluation.submission import Submission, class_ids
from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, Segment, encode_rle


def load(path):
    return json.loads(path.read_text())


def test_instances_are_saved_as_coco_results(tmp_path):
    records, answers = instance.random_set(2)
    submission = Submission(str(tmp_path), instance.INFO)
    for i, (record, answer) in enumerate(zip(records, answers)):
        submission.instance(Record(f"{i + 7:012d}.jpg", b"", record.height, record.width), answer)
    submission.save()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "height": 224, "width": 224} for i in (7, 8)],
            "categories": [],
            "annotations": [],
        }
        truth.createIndex()
        masks, boxes = truth.loadRes(load(tmp_path / "segm.json")), truth.loadRes(load(tmp_path / "bbox.json"))
    assert len(masks.anns) == len(boxes.anns) == sum(map(len, answers))
    first = masks.anns[1]
    np.testing.assert_array_equal(masks.annToMask(first), answers[0].masks[0])
    assert first["category_id"] == answers[0].prompt_ids[0] + 1 and first["score"] == pytest.approx(
        float(answers[0].scores[0])
    )
    x0, y0, x1, y1 = answers[0].boxes[0]
    np.testing.assert_allclose(boxes.anns[1]["bbox"], [x0, y0, x1 - x0, y1 - y0])


def test_saved_panoptic_files_have_the_pq_of_the_evaluator(tmp_path):
    """The truth as a submission of its own, and the two folders compared by the published protocol for files."""
    rng = np.random.default_rng(0)
    found, truth = (Submission(str(tmp_path / name), panoptic.INFO) for name in ("found", "truth"))
    evaluator = PanopticEvaluator(panoptic.INFO)
    for i in range(3):
        cells, labels = panoptic.scene(rng, 6)
        exact = panoptic.predicted(cells, labels, np.zeros_like(cells, bool))
        record = Record(
            f"{i}.png",
            b"",
            *cells.shape,
            tuple(Segment(int(c), mask=encode_rle(m)) for c, m in zip(exact.prompt_ids, exact.masks)),
        )
        answer = panoptic.predicted(*panoptic.disturbed(rng, cells, labels), rng.random(cells.shape) < 0.05)
        truth.panoptic(record, exact)
        found.panoptic(record, answer)
        evaluator.update(record, answer)
    truth.save()
    found.save()
    data = load(tmp_path / "truth" / "panoptic.json")
    data["images"] = [{"id": i, "height": 32, "width": 32, "file_name": f"{i}.png"} for i in range(3)]
    for annotation in data["annotations"]:
        ids = np.array(Image.open(tmp_path / "truth" / "panoptic" / annotation["file_name"])).astype(int) @ [
            1,
            256,
            65536,
        ]
        for s in annotation["segments_info"]:
            s.update(iscrowd=0, area=int((ids == s["id"]).sum()))
    (tmp_path / "truth" / "panoptic.json").write_text(json.dumps(data))
    scored = pq_compute(*(str(tmp_path / name / "panoptic.json") for name in ("truth", "found")))
    assert 10 < evaluator.result()["pq"] < 90
    assert 100 * scored["All"]["pq"] == pytest.approx(evaluator.result()["pq"], abs=1e-9)


def test_semantic_maps_and_soft_masks_are_saved_under_the_image_name(tmp_path):
    submission, record = Submission(str(tmp_path), panoptic.INFO), Record("town/000019.jpeg", b"", 4, 5)
    labels = np.arange(20).reshape(4, 5) % 4
    submission.semantic(record, labels)
    submission.soft("foreground", record, labels / 3)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "semantic" / "town" / "000019.png")), labels)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "foreground" / "town" / "000019.png")), labels * 85)


def test_merged_referring_masks_are_saved_as_rle_in_one_file(tmp_path):
    records, answers = instance.random_set(1)
    submission, other = Submission(str(tmp_path), instance.INFO), Submission(str(tmp_path), instance.INFO)
    answer = answers[0]
    answer.texts = [f"the {i}th thing" for i in range(len(answer))]
    submission.referring(Record("COCO_train2014_000000000042.jpg", b"", 224, 224), answer)
    other.referring(Record("b", b"", 224, 224), answer)
    submission.merge(other)
    submission.save()
    entries = load(tmp_path / "referring.json")
    assert [e["image_id"] for e in entries] == [42] * len(answer) + ["b"] * len(answer)
    for entry, text, mask in zip(entries, answer.texts, answer.masks):
        assert entry["text"] == text
        np.testing.assert_array_equal(coco_mask.decode(entry["segmentation"]), mask)


def test_coco_classes_keep_their_official_category_ids(real_data):
    for file, count in (("coco/panoptic/val.json", 133), ("coco/instances_val.json", 80)):
        ids = [c["id"] for c in load(real_data / file)["categories"]]
        assert class_ids(DatasetInfo("coco_2017", (ClassInfo(("a",)),) * count, {})) == ids and len(ids) == count


def test_category_ids_outside_coco_count_from_one():
    assert class_ids(panoptic.INFO) == [1, 2, 3, 4]
    assert class_ids(DatasetInfo("lvis_v1", (ClassInfo(("a",)),) * 80, {}))[:12] == list(range(1, 13))
