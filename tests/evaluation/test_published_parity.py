"""Every evaluator against the published evaluation code, on real images: noisy copies of the ground truth are the
predictions.

What is compared with reads the original annotation files; the evaluators read the records that were prepared from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import sys
import types

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mqformer_jax.evaluation.alpha import AlphaEvaluator
from mqformer_jax.evaluation.foreground import ForegroundEvaluator
from mqformer_jax.evaluation.instance import InstanceEvaluator
from mqformer_jax.evaluation.panoptic import PanopticEvaluator
from mqformer_jax.evaluation.semantic import SemanticEvaluator
from mqformer_jax.input.record import DatasetInfo, Record, box_of, encode_rle
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.segments import Segments

SIZES = ("s", "m", "l")
COCO_STATS = ["ap", "ap50", "ap75", *(f"ap_{s}" for s in SIZES), "ar_1", "ar_10", "ar_100", *(f"ar_{s}" for s in SIZES)]


def read(root: str, name: str, split: str, limit: int | None = None) -> tuple[DatasetInfo, list[Record]]:
    source = ShardSource(root, name, split)
    return source.info, [Record.from_bytes(source[i]) for i in range(min(len(source), limit or len(source)))]


def noisy(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mask moved, and grown or shrunk, by some share of its size."""
    side = max(1.0, mask.sum() ** 0.5)
    moved = np.roll(mask, rng.normal(0, 0.06 * side, 2).round().astype(int), (0, 1))
    change, kernel = rng.normal(0, 0.05 * side), np.ones((3, 3), np.uint8)
    return (cv2.dilate if change > 0 else cv2.erode)(moved.astype(np.uint8), kernel, iterations=int(abs(change))) > 0


def noisy_instances(record: Record, info: DatasetInfo, rng: np.random.Generator) -> Segments:
    """None, one or two noisy copies of each object, some of them under the name of another class of the image or of
    any.
    """
    labels = [s.class_id for s in record.segments]
    masks, boxes, classes = [], [], []
    for segment in record.segments:
        for _ in range(int(rng.choice(3, p=(0.15, 0.65, 0.2)))):
            mask = noisy(record.decode_mask(segment.mask), rng)
            if mask.any():
                masks.append(mask)
                boxes.append(np.array(box_of(mask)) + rng.normal(size=4))
                other = rng.choice(labels) if rng.random() < 0.5 else rng.integers(len(info.classes))
                classes.append(segment.class_id if rng.random() < 0.9 else int(other))
    n, shape = len(masks), (record.height, record.width)
    stack = np.stack(masks) if masks else np.zeros((0, *shape), bool)
    ids = np.array(classes, int)
    return Segments([c.name for c in info.classes], stack, np.array(boxes).reshape(n, 4), rng.random(n), ids, ids)


def results_json(answers: list[Segments], image_ids: list[int], class_ids: list[int], iou_type: str) -> list[dict]:
    found = []
    for image_id, answer in zip(image_ids, answers):
        for mask, (x0, y0, x1, y1), score, label in zip(answer.masks, answer.boxes, answer.scores, answer.prompt_ids):
            rle = {"size": list(mask.shape), "counts": encode_rle(mask)}
            where = {"bbox": [x0, y0, x1 - x0, y1 - y0]} if iou_type == "bbox" else {"segmentation": rle}
            found.append({"image_id": image_id, "category_id": class_ids[label], "score": float(score), **where})
    return found


def mended(data: dict) -> dict:
    """As records have it: an object's area is its mask's pixels (the file has that of its polygons, which is a little
    another), and a box that lies elsewhere than the mask, as those of one image do, is the mask's."""
    size = {i["id"]: (i["height"], i["width"]) for i in data["images"]}
    for a in data["annotations"]:
        rle = coco_mask.frPyObjects(a["segmentation"], *size[a["image_id"]])
        rle = coco_mask.merge(rle) if isinstance(rle, list) else rle
        a["area"] = int(coco_mask.area(rle))
        if coco_mask.iou([a["bbox"]], [coco_mask.toBbox(rle)], [0])[0, 0] < 0.1:
            a["bbox"] = coco_mask.toBbox(rle).tolist()
    return data


def load(*parts) -> dict:
    with open("/".join(map(str, parts))) as f:
        return json.load(f)


def subset(data: dict, records: list[Record], info: DatasetInfo) -> tuple[dict, list[int], list[int]]:
    """The annotations of these records, and the ids that the file gives to their images and to the classes of `info`,
    in its order.
    """
    by_file = {i["file_name"]: i["id"] for i in data["images"]}
    ids = [by_file[record.key] for record in records]
    data["images"] = [i for i in data["images"] if i["id"] in ids]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in ids]
    assert len(data["categories"]) == len(info.classes)
    return data, ids, [c["id"] for c in data["categories"]]


def evaluated(info: DatasetInfo, records: list[Record], answers: list[Segments]) -> InstanceEvaluator:
    evaluator = InstanceEvaluator(info)
    for record, answer in zip(records, answers):
        evaluator.update(record, answer)
    return evaluator


@pytest.mark.slow
def test_coco_ap_and_ar_match_pycocotools(small_root, real_data):
    info, records = read(small_root, "coco_2017", "val")
    rng = np.random.default_rng(0)
    answers = [noisy_instances(record, info, rng) for record in records]
    evaluator = evaluated(info, records, answers)
    found, details = evaluator.result(), evaluator.details()
    data, image_ids, class_ids = subset(mended(load(real_data, "coco", "instances_val.json")), records, info)
    for name, iou_type in (("mask", "segm"), ("box", "bbox")):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = data
            truth.createIndex()
            e = COCOeval(truth, truth.loadRes(results_json(answers, image_ids, class_ids, iou_type)), iou_type)
            e.evaluate()
            e.accumulate()
            e.summarize()
        assert 20 < 100 * e.stats[0] < 80
        np.testing.assert_allclose([found[f"{name}_{k}"] for k in COCO_STATS], 100 * e.stats, rtol=0, atol=1e-9)
        precision = e.eval["precision"][:, :, :, 0, -1]
        assert class_ids == e.params.catIds
        for i, c in enumerate(info.classes):
            if (precision[:, :, i] > -1).any():
                assert details["classes"][c.name][f"{name}_ap"] == pytest.approx(
                    100 * precision[:, :, i].mean(), abs=1e-9
                )
    scores = [image["mask_ap50"] for image in details["worst_images"]]
    assert len(scores) == 10 and scores == sorted(scores)


@pytest.fixture
def lvis(published, monkeypatch):
    """The LVIS authors' package, which is older than NumPy 2."""
    monkeypatch.syspath_prepend(str(published("lvis")))
    monkeypatch.setattr(np, "float", float, raising=False)
    return importlib.import_module("lvis")


def test_federated_ap_matches_lvis_api(lvis, small_root, real_data, tmp_path):
    info, records = read(small_root, "lvis_v0.5", "train")
    rng = np.random.default_rng(1)
    # 29 images have rare classes only
    shown = tuple(int(n) for n in rng.choice([3, 10, 11, 100, 101, 900], len(info.classes)))
    info = dataclasses.replace(info, class_images={"train": shown})
    answers = [noisy_instances(record, info, rng) for record in records]
    found = evaluated(info, records, answers).result()
    data, image_ids, class_ids = subset(mended(load(real_data, "coco", "lvis.json")), records, info)
    frequency = {c: "r" if n <= 10 else "c" if n <= 100 else "f" for c, n in zip(class_ids, shown)}
    data["categories"] = [{**c, "frequency": frequency[c["id"]]} for c in data["categories"]]
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    names = {"AP": "ap", "AP50": "ap50", "AP75": "ap75"} | {f"AP{k}": f"ap_{k}" for k in (*SIZES, "r", "c", "f")}
    names |= {"AR@300": "ar_300"} | {f"AR{s}@300": f"ar_{s}" for s in SIZES}
    for name, iou_type in (("mask", "segm"), ("box", "bbox")):
        e = lvis.LVISEval(str(tmp_path / "lvis.json"), results_json(answers, image_ids, class_ids, iou_type), iou_type)
        e.run()
        assert 20 < 100 * e.results["AP"] < 80
        np.testing.assert_allclose(
            [found[f"{name}_{k}"] for k in names.values()], [100 * e.results[k] for k in names], rtol=0, atol=1e-9
        )


def noisy_panoptic(record: Record, info: DatasetInfo, rng: np.random.Generator, queries: int) -> Segments:
    """Segments one over the other, each noisy, some left out, some of another class; a region once a class."""
    panoptic, labels = np.zeros((record.height, record.width), np.int32), []
    for segment in sorted(record.segments, key=lambda s: -record.decode_mask(s.mask).sum()):
        label = segment.class_id if rng.random() < 0.9 else int(rng.integers(len(info.classes)))
        if rng.random() < 0.9 and not (label in labels and info.classes[label].is_region):
            labels.append(label)
            panoptic[noisy(record.decode_mask(segment.mask), rng)] = len(labels)
    kept = [i for i in range(len(labels)) if (panoptic == i + 1).any()]
    panoptic = np.select([panoptic == i + 1 for i in kept], list(range(1, len(kept) + 1)), 0) if kept else panoptic
    n, labels = len(kept), np.array(labels, int)[kept]
    masks = panoptic == np.arange(1, n + 1)[:, None, None]
    texts = [c.name for c in info.classes]
    return Segments(texts, masks, np.zeros((n, 4)), np.ones(n), labels, rng.integers(0, queries, n), panoptic)


def panopticapi(truth: np.ndarray, infos: list[dict], found: np.ndarray, labels: list[int], totals: dict) -> list[int]:
    """`pq_compute_single_core` for one image: `totals` maps a class to [iou, tp, fp, fn]. Returns the segments found,
    from 0 on.
    """
    void, offset = 0, 256**3
    truth_of, found_of = {s["id"]: s for s in infos}, dict(enumerate(labels, 1))
    pairs, counts = np.unique(truth.astype(np.uint64) * offset + found.astype(np.uint64), return_counts=True)
    shared = {(int(p) // offset, int(p) % offset): int(n) for p, n in zip(pairs, counts)}
    area = {i: sum(n for (t, _), n in shared.items() if t == i) for i in truth_of}
    found_area = {j: sum(n for (_, f), n in shared.items() if f == j) for j in found_of}
    matched_truth, matched = set(), set()
    for (i, j), n in shared.items():
        if i in truth_of and j in found_of and not truth_of[i]["iscrowd"] and truth_of[i]["category_id"] == found_of[j]:
            iou = n / (found_area[j] + area[i] - n - shared.get((void, j), 0))
            if iou > 0.5:
                totals[found_of[j]][0] += iou
                totals[found_of[j]][1] += 1
                matched_truth.add(i)
                matched.add(j)
    crowds = {}
    for i, s in truth_of.items():
        if i not in matched_truth:
            if s["iscrowd"]:
                crowds[s["category_id"]] = i
            else:
                totals[s["category_id"]][3] += 1
    for j, label in found_of.items():
        if j not in matched:
            free = shared.get((void, j), 0) + (shared.get((crowds[label], j), 0) if label in crowds else 0)
            totals[label][2] += free / found_area[j] <= 0.5
    return [j - 1 for j in matched]


def test_pq_and_query_shares_match_panopticapi(small_root, real_data):
    info, records = read(small_root, "coco_2017_panoptic", "val", 30)
    data, image_ids, class_ids = subset(load(real_data, "coco", "panoptic", "val.json"), records, info)
    annotations = {a["image_id"]: a for a in data["annotations"]}
    rng, learnable = np.random.default_rng(2), 40
    evaluator, totals, queries = (
        PanopticEvaluator(info, learnable),
        {c: [0.0, 0, 0, 0] for c in class_ids},
        {True: [], False: []},
    )
    for record, image_id in zip(records, image_ids):
        answer = noisy_panoptic(record, info, rng, queries=100)
        evaluator.update(record, answer)
        annotation = annotations[image_id]
        png = np.array(Image.open(real_data / "coco" / "panoptic" / "val" / annotation["file_name"])).astype(np.int64)
        labels = [class_ids[k] for k in answer.prompt_ids]
        for k in panopticapi(png @ [1, 256, 65536], annotation["segments_info"], answer.panoptic, labels, totals):
            queries[info.classes[answer.prompt_ids[k]].is_region].append(answer.query_ids[k])
    assert sum(t[2] for t in totals.values()) > 20 and sum(t[3] for t in totals.values()) > 20

    def mean(kinds: tuple[bool, ...]) -> np.ndarray:
        of_kind = [c for c, known in zip(class_ids, info.classes) if known.is_region in kinds]
        rows = [totals[c] for c in of_kind if sum(totals[c][1:])]
        counted = [(iou, tp, tp + fp / 2 + fn / 2) for iou, tp, fp, fn in rows]
        return 100 * np.mean([(iou / all_, iou / max(tp, 1), tp / all_) for iou, tp, all_ in counted], 0)

    found = evaluator.result()
    for suffix, kinds in (("", (True, False)), ("_things", (False,)), ("_stuff", (True,))):
        want = mean(kinds)
        assert 20 < want[0] < 90
        np.testing.assert_allclose([found[k + suffix] for k in ("pq", "sq", "rq")], want, rtol=0, atol=1e-9)
    for is_region, name in ((False, "things"), (True, "stuff")):
        assert found[f"learnable_share_{name}"] == pytest.approx(
            100 * np.mean(np.array(queries[is_region]) < learnable), abs=1e-9
        )
    classes = evaluator.details()["classes"]
    assert {name: [c[k] for k in ("tp", "fp", "fn")] for name, c in classes.items()} == {
        known.name: totals[c][1:] for c, known in zip(class_ids, info.classes) if sum(totals[c][1:])
    }


def test_camvid_miou_matches_the_confusion_matrix(small_root, real_data):
    info, records = read(small_root, "camvid", "val", 20)
    rng, n = np.random.default_rng(3), len(info.classes)
    evaluator, confusion = SemanticEvaluator(info), np.zeros((n, n))
    for record in records:
        truth = np.array(Image.open(real_data / "camvid" / "valannot" / f"{record.key}.png")).astype(int)
        prediction = np.roll(np.minimum(truth, n - 1), rng.integers(-12, 13, 2), (0, 1))
        prediction[rng.random(truth.shape) < 0.1] = rng.integers(n)
        evaluator.update(record, prediction)
        np.add.at(confusion, (truth[truth < n], prediction[truth < n]), 1)
    hit, owned = np.diag(confusion), confusion.sum(1)
    union = owned + confusion.sum(0) - hit
    iou = (hit / np.maximum(union, 1))[union > 0]
    assert 0.4 < iou.mean() < 0.95
    want = {
        "miou": iou.mean(),
        "fwiou": (owned / owned.sum() * hit / np.maximum(union, 1)).sum(),
        "pixel_accuracy": hit.sum() / owned.sum(),
    }
    found, details = evaluator.result(), evaluator.details()
    assert found == pytest.approx({k: 100 * v for k, v in want.items()}, abs=1e-9)
    assert details["classes"][info.classes[0].name]["iou"] == pytest.approx(100 * hit[0] / union[0], abs=1e-9)
    assert len(details["worst_images"]) == 10


@pytest.fixture
def sod(published, monkeypatch):
    """py_sod_metrics.sod_metrics alone: the rest of the package would need scikit-learn."""
    package = types.ModuleType("py_sod_metrics")
    package.__path__ = [str(published("pysodmetrics") / "py_sod_metrics")]
    monkeypatch.setitem(sys.modules, "py_sod_metrics", package)
    return importlib.import_module("py_sod_metrics.sod_metrics")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of its own old F-measure
def test_foreground_metrics_match_py_sod_metrics(sod, small_root):
    records = read(small_root, "foreground", "train", 12)[1]
    rng, evaluator = np.random.default_rng(4), ForegroundEvaluator()
    mae, f, s, e = sod.MAE(), sod.Fmeasure(), sod.Smeasure(), sod.Emeasure()
    for record in records:
        mask = record.decode_mask(record.segments[0].mask)
        soft = cv2.GaussianBlur(noisy(mask, rng).astype(np.float32), (0, 0), 5) * 0.7 + rng.random(mask.shape) * 0.3
        prediction = np.round(soft * 255).astype(np.uint8) / 255  # as it would be read from a file
        evaluator.update(prediction, mask, record.key)
        for measure in (mae, f, s, e):
            measure.step(prediction, mask, normalize=False)
    curve = e.get_results()["em"]["curve"]
    want = {
        "mae": mae.get_results()["mae"],
        "max_f": f.get_results()["fm"]["curve"].max(),
        "s_measure": s.get_results()["sm"],
    }
    want |= {"mean_e": curve.mean(), "max_e": curve.max()}
    found = evaluator.result()
    assert all(0.02 < v < 0.98 for v in want.values())
    assert {k: found[k] for k in want} == pytest.approx({k: 100 * v for k, v in want.items()}, abs=1e-9)


def rhemann(prediction: np.ndarray, target: np.ndarray, where: np.ndarray) -> dict[str, float]:
    """The four errors as Rhemann's and Deep Image Matting's evaluation code has them, with SciPy and scikit-image; and
    MAD.
    """
    ndimage, measure = pytest.importorskip("scipy.ndimage"), pytest.importorskip("skimage.measure")
    sigma, epsilon = 1.4, 1e-2
    half = int(np.ceil(sigma * np.sqrt(-2 * np.log(np.sqrt(2 * np.pi) * sigma * epsilon))))
    gauss = lambda x: np.exp(-(x**2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
    u = np.arange(-half, half + 1)
    kernel = np.array([[gauss(i) * -j * gauss(j) / sigma**2 for j in u] for i in u])
    kernel /= np.sqrt((kernel**2).sum())
    length = lambda a: np.sqrt(sum(ndimage.convolve(a, k, mode="nearest") ** 2 for k in (kernel, kernel.T)))
    levels = -np.ones_like(target)
    for k in range(1, 11):
        pieces = measure.label((prediction >= k / 10) & (target >= k / 10), connectivity=1)
        sizes = np.bincount(pieces.ravel())[1:]
        omega = pieces == sizes.argmax() + 1 if len(sizes) else np.zeros_like(pieces, bool)
        levels[(levels == -1) & ~omega] = (k - 1) / 10
    levels[levels == -1] = 1
    phi = [1 - (a - levels) * (a - levels >= 0.15) for a in (prediction, target)]
    d = np.abs(prediction - target)[where]
    return {
        "sad": d.sum() / 1000,
        "mse": (d**2).mean() * 1000,
        "mad": d.mean() * 1000,
        "grad": ((length(prediction) - length(target)) ** 2)[where].sum() / 1000,
        "conn": np.abs(phi[0] - phi[1])[where].sum() / 1000,
    }


def test_matting_errors_match_an_independent_implementation(small_root):
    records = read(small_root, "mattes", "val")[1]
    rng, evaluator, want = np.random.default_rng(5), AlphaEvaluator(), []
    for record in records:
        (segment,) = record.segments
        alpha, trimap = record.decode_alpha(segment.alpha) / 255, record.decode_alpha(segment.trimap)
        soft = cv2.GaussianBlur(alpha, (0, 0), 4) * 0.9 + 0.1 * rng.random(alpha.shape)
        prediction = np.round(soft * 255) / 255
        evaluator.update(prediction, alpha, trimap, record.key)
        unknown = (trimap > 0) & (trimap < 255)
        inside = rhemann(prediction, alpha, unknown)
        want.append(rhemann(prediction, alpha, np.ones_like(unknown)) | {f"unknown_{k}": v for k, v in inside.items()})
    found = evaluator.result()
    assert found.keys() == want[0].keys() and found["unknown_sad"] < found["sad"] and min(found.values()) > 0.01
    for name, value in found.items():
        assert value == pytest.approx(np.mean([w[name] for w in want]), rel=1e-9), name
