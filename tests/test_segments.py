"""Post-processing against Mask DINO's own outputs, and each rule by itself on masks small enough to read."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from originals import assert_agrees

from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, Segment, encode_rle
from mqformer_jax.segments import (
    CanvasMasks,
    ground_truth_segments,
    instance_segments,
    panoptic_segments,
    region_segments,
    restore,
    semantic_map,
    soft_mask,
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@dataclasses.dataclass
class Recording:
    """What Mask DINO's post-processing made of its predictions for two images."""

    about: dict
    arrays: dict[str, np.ndarray]
    low: np.ndarray  # masks as the network returns them, [image, query, height, width]

    @property
    def texts(self) -> list[str]:
        return [f"class {i}" for i in range(self.about["num_classes"])]

    @property
    def things(self) -> np.ndarray:
        return np.isin(np.arange(self.about["num_classes"]), self.about["inference"]["thing_contiguous_ids"])

    def settings(self, name: str) -> dict:
        return self.about["inference"]["settings"][name]

    def inputs(self, image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        probs = sigmoid(self.arrays[f"input/mask_cls_{image}"])
        return probs, self.arrays[f"input/mask_box_{image}"], self.arrays[f"input/mask_pred_{image}"]


@pytest.fixture(scope="module")
def maskdino(fixtures):
    folder = fixtures / "maskdino"
    about = json.loads((folder / "inference_s0.json").read_text())
    file, last = about["predictions_from"].split()[0], about["predictions_from"].split()[1].removesuffix("*")
    return Recording(about, dict(np.load(folder / "inference_s0.npz")), np.load(folder / file)[f"{last}pred_masks"])


@pytest.mark.parametrize("image", [0, 1])
def test_restored_masks_match_mask_dino(maskdino, image):
    sizes = maskdino.about["inference"]
    canvas, valid, output = maskdino.about["padded_size"], sizes["image_sizes"][image], sizes["output_sizes"][image]
    got = restore(maskdino.low[image], tuple(canvas), tuple(valid), tuple(output))
    assert_agrees("Mask DINO post-processing (recorded)", "forward", got, maskdino.arrays[f"input/mask_pred_{image}"])


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("name", ["pano", "pano_mid", "pano_loose", "pano_none"])
def test_panoptic_map_matches_mask_dino(maskdino, name, image):
    arrays, s = maskdino.arrays, maskdino.settings(name)
    probs, _, logits = maskdino.inputs(image)
    temperature = s["pano_temp"] if s["transform_eval"] else None
    thresholds = s["object_mask_threshold"], s["overlap_threshold"]
    got = panoptic_segments(maskdino.texts, probs, logits, ~maskdino.things, *thresholds, temperature)
    np.testing.assert_array_equal(got.panoptic, arrays[f"{name}/panoptic_seg_{image}"])
    np.testing.assert_array_equal(got.prompt_ids, arrays[f"{name}/segments_{image}"][:, 1])
    np.testing.assert_array_equal(got.masks, got.panoptic == np.arange(1, len(got) + 1)[:, None, None])


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("name", ["inst", "inst_focus_on_box", "pano"])
def test_instances_match_mask_dino(maskdino, name, image):
    arrays, s = maskdino.arrays, maskdino.settings(name)
    probs, boxes, logits = maskdino.inputs(image)
    got = instance_segments(
        maskdino.texts, probs, boxes, logits, max_detections=s["test_topk_per_image"], rate_masks=not s["focus_on_box"]
    )
    if s["panoptic_on"]:  # Mask DINO takes the best 20 of all classes and then drops those that are not things
        keep = maskdino.things[got.prompt_ids]
        got = type(got)(
            maskdino.texts,
            got.masks[keep],
            got.boxes[keep],
            got.scores[keep],
            got.prompt_ids[keep],
            got.query_ids[keep],
        )
    order = np.lexsort((arrays[f"{name}/inst_classes_{image}"], -arrays[f"{name}/inst_scores_{image}"]))
    want = {k: arrays[f"{name}/inst_{k}_{image}"][order] for k in ("scores", "classes", "boxes", "masks")}
    mine = np.lexsort((got.prompt_ids, -got.scores))
    assert_agrees("Mask DINO post-processing (recorded)", "forward", got.scores[mine], want["scores"], 1e-5, "scores")
    np.testing.assert_array_equal(got.prompt_ids[mine], want["classes"])
    assert_agrees("Mask DINO post-processing (recorded)", "forward", got.boxes[mine], want["boxes"], 1e-5, "boxes")
    assert (got.masks[mine] != want["masks"]).sum() == 0


def test_crop_masks_clips_to_the_enlarged_box_and_scores_inside_it():
    logits = np.full((1, 20, 40), 4.0, np.float32)  # a mask of the whole image
    logits[0, :, 20:] = 0.1  # of which the right half is uncertain
    boxes = np.array([[5, 5, 15, 15]], np.float32)
    whole, cropped = (
        instance_segments(["cat"], np.ones((1, 1), np.float32), boxes, logits, crop_masks=crop)
        for crop in (False, True)
    )
    want = np.zeros((20, 40), bool)
    want[4:16, 4:16] = True  # 10 % more on each side
    np.testing.assert_array_equal(cropped.masks[0], want)
    assert whole.masks.all() and whole.scores[0] < 0.8 < cropped.scores[0]
    np.testing.assert_array_equal(cropped.boxes, boxes)


@pytest.mark.parametrize("image", [0, 1])
def test_semantic_map_matches_mask_dino(maskdino, image):
    probs, _, logits = maskdino.inputs(image)
    got = semantic_map(probs, logits, temperature=maskdino.settings("pano")["pano_temp"])
    np.testing.assert_array_equal(got, maskdino.arrays[f"pano/sem_seg_{image}"].argmax(0))


def block(h: int, w: int, rows: slice, cols: slice, inside: float = 4.0) -> np.ndarray:
    out = np.full((h, w), -4.0, np.float32)
    out[rows, cols] = inside
    return out


ALL = slice(None)


def test_queries_are_merged_for_region_prompts_but_not_for_thing_prompts():
    logits = np.stack([block(4, 8, ALL, slice(0, 4)), block(4, 8, ALL, slice(4, 8))])
    probs = np.array([[0.9], [0.8]], np.float32)
    merged = panoptic_segments(["sky"], probs, logits, np.array([True]))
    assert len(merged) == 1 and merged.masks[0].all() and merged.scores[0] == np.float32(0.9)
    np.testing.assert_array_equal(merged.boxes, [[0, 0, 8, 4]])
    apart = panoptic_segments(["cat"], probs, logits, np.array([False]))
    np.testing.assert_array_equal(apart.panoptic[0], [1, 1, 1, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(apart.boxes, [[0, 0, 4, 4], [4, 0, 8, 4]])


def test_a_segment_mostly_hidden_by_a_better_one_is_dropped():
    logits = np.stack([block(4, 8, ALL, slice(0, 6)), block(4, 8, ALL, slice(2, 8))])
    got = panoptic_segments(["cat"], np.array([[0.9], [0.5]], np.float32), logits, np.array([False]))
    assert got.query_ids.tolist() == [0]
    both = panoptic_segments(
        ["cat"], np.array([[0.9], [0.5]], np.float32), logits, np.array([False]), overlap_threshold=0.3
    )
    assert both.query_ids.tolist() == [0, 1]


def test_no_query_above_the_threshold_gives_empty_panoptic_segments():
    got = panoptic_segments(["cat"], np.array([[0.1]], np.float32), block(4, 8, ALL, ALL)[None], np.array([False]))
    assert len(got) == 0 and got.masks.shape == (0, 4, 8) and not got.panoptic.any()


def test_instances_are_sorted_by_score_and_limited_to_wanted_prompts():
    logits = np.stack([block(4, 8, ALL, slice(0, 4)), block(4, 8, ALL, slice(4, 8), inside=0.1)])
    probs = np.array([[0.5, 0.9], [0.6, 0.2]], np.float32)
    got = instance_segments(["cat", "sky"], probs, np.zeros((2, 4)), logits, wanted=np.array([True, False]))
    assert got.query_ids.tolist() == [0, 1] and got.prompt_ids.tolist() == [0, 0]
    np.testing.assert_allclose(got.scores, [0.5 * sigmoid(4.0), 0.6 * sigmoid(0.1)], rtol=1e-4)
    assert len(instance_segments(["cat", "sky"], probs, np.zeros((2, 4)), logits, wanted=np.zeros(2, bool))) == 0
    assert len(got.above(0.4)) == 1


def test_each_region_prompt_gets_its_best_query_or_an_empty_mask():
    logits = np.stack([block(4, 8, ALL, slice(0, 4)), block(4, 8, ALL, slice(4, 8))])
    probs = np.array([[0.1, 0.7, 0.05], [0.9, 0.2, 0.04]], np.float32)
    boxes = np.array([[0, 0, 4, 4], [4, 0, 8, 4]], np.float32)
    got = region_segments(["right", "left", "nothing"], probs, boxes, logits, no_target_threshold=0.3)
    assert got.query_ids[:2].tolist() == [1, 0]
    np.testing.assert_array_equal(got.masks.sum((1, 2)), [16, 16, 0])
    np.testing.assert_array_equal(got.boxes, [[4, 0, 8, 4], [0, 0, 4, 4], [0, 0, 0, 0]])
    np.testing.assert_allclose(soft_mask(probs, logits, 1), sigmoid(logits[0]), rtol=1e-5)


def test_lazily_restored_masks_give_the_same_segments():
    rng = np.random.default_rng(0)
    low = rng.normal(size=(6, 12, 12)).astype(np.float32) * 4
    frame = ((48, 48), (40, 44), (80, 88))
    probs, boxes = rng.random((6, 3)).astype(np.float32), np.zeros((6, 4), np.float32)
    lazy, full = CanvasMasks(low, *frame), restore(low, *frame)
    assert lazy.shape == full.shape
    is_region = np.array([True, False, False])
    a, b = (panoptic_segments(["sky", "cat", "dog"], probs, m, is_region, overlap_threshold=0.1) for m in (lazy, full))
    assert len(a) and np.array_equal(a.panoptic, b.panoptic)
    a, b = (instance_segments(["sky", "cat", "dog"], probs, boxes, m) for m in (lazy, full))
    assert np.array_equal(a.masks, b.masks)
    assert np.array_equal(semantic_map(probs, lazy), semantic_map(probs, full))


def test_semantic_map_computed_in_bands_matches_the_whole_image(monkeypatch):
    rng = np.random.default_rng(1)
    low, probs = rng.normal(size=(6, 12, 12)).astype(np.float32) * 4, rng.random((6, 3)).astype(np.float32)
    for frame in (((48, 48), (40, 44), (83, 88)), ((48, 48), (40, 44), (21, 30)), ((48, 48), (48, 48), (48, 48))):
        masks = CanvasMasks(low, *frame)
        whole, ids = masks[np.arange(6)], np.arange(6)
        np.testing.assert_allclose(masks.band(ids, slice(5, 9)), whole[:, 5:9], atol=2e-5)
        expected = semantic_map(probs, masks)
        monkeypatch.setattr("mqformer_jax.segments.BAND", 64 * frame[2][1] * 4)
        assert (semantic_map(probs, masks) == expected).mean() > 0.999  # a tie may fall the other way
        monkeypatch.undo()


def test_semantic_map_sums_the_queries_of_a_prompt():
    logits = np.stack([block(1, 2, ALL, ALL)] * 3)
    assert semantic_map(np.array([[0.5, 0], [0, 0.3], [0, 0.3]], np.float32), logits).tolist() == [[1, 1]]
    assert semantic_map(
        np.array([[0.5, 0], [0, 0.3], [0, 0.3]], np.float32), logits, object_mask_threshold=0.4
    ).tolist() == [[0, 0]]


def test_ground_truth_merges_stuff_and_leaves_crowds_out():
    info = DatasetInfo("toy", (ClassInfo(("cat",)), ClassInfo(("sky",), is_region=True)), {})
    left, right = np.zeros((4, 8), bool), np.zeros((4, 8), bool)
    left[:, :2], right[:, 6:] = True, True
    segments = [
        Segment(k, mask=encode_rle(m), crowd=c) for k, m, c in [(1, left, False), (1, right, False), (0, ~left, True)]
    ]
    got = ground_truth_segments(Record("a", b"", 4, 8, tuple(segments)), info)
    assert got.texts == ["cat", "sky"] and got.prompt_ids.tolist() == [1]
    np.testing.assert_array_equal(got.panoptic, left | right)
