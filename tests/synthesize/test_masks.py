"""Quality control: which masks of a teacher are taken, and what is done to them before."""

import numpy as np
import pytest
from scipy import ndimage
from sets import CLASSES, Ellipses, record, two_boxes
from shapes import blobs

from mqformer_jax.input.record import DatasetInfo, Segment, decode_rle
from mqformer_jax.segments import CanvasMasks
from mqformer_jax.synthesize.annotations import usable_box
from mqformer_jax.synthesize.masks import Masks, Quality, cleaned, clipped, stability
from mqformer_jax.synthesize.teachers import BoxMasks, Picture

INFO = DatasetInfo("toy", CLASSES, {})


def picture_of(made) -> Picture:
    wanted = tuple(range(len(made.segments)))
    return Picture(made, INFO, made.decode_image(), wanted, np.stack([usable_box(made, i) for i in wanted]))


class Draws:
    """Logits of one mask that is drawn in every box."""

    name = "draws"

    def __init__(self, *masks, score=1.0):
        self.masks, self.score = masks, score

    def __call__(self, pictures, boxes):
        h, w = pictures[0].image.shape[:2]
        logits = [np.where(self.masks[j % len(self.masks)], 9.0, -9.0) for j in range(len(boxes[0]))]
        return [
            BoxMasks(
                CanvasMasks(np.array(logits, np.float32), (h, w), (h, w), (h, w)), np.full(len(boxes[0]), self.score)
            )
        ]


def rectangle(x0, y0, x1, y1):
    mask = np.zeros((48, 64), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def annotation(*masks, box=(10.0, 10.0, 40.0, 40.0), score=1.0, **quality):
    made = record(0, Segment(0, box=box))
    ((found,),) = Masks(Draws(*masks, score=score), Quality(**quality))([picture_of(made)])
    return found


def test_each_quality_check_rejects_bad_masks_and_keeps_them_for_review():
    good = rectangle(11, 10, 40, 39)
    assert annotation(good).reason == ""
    assert annotation(rectangle(10, 10, 25, 25)).reason == "low IoU with its box"
    assert annotation(rectangle(5, 5, 64, 48)).reason == "low IoU with its box"
    assert annotation(good, rectangle(10, 10, 20, 40)).reason == "unstable under box jitter"
    assert annotation(good, score=0.4).reason == "low score of the teacher"
    frame = good & ~rectangle(11, 11, 39, 38)
    assert annotation(frame, min_box_area=0.2, min_component_area=0.0).reason == "covers too little of its box"
    assert annotation(np.zeros_like(good)).reason == annotation(rectangle(50, 0, 60, 5)).reason == "no mask in the box"
    refused = annotation(good, score=0.4)
    assert (decode_rle(refused.mask, 48, 64) == good).all() and refused.score == 0.4


def test_mask_is_clipped_to_its_box():
    found = annotation(rectangle(8, 8, 43, 43), min_box_iou=0.5)
    np.testing.assert_array_equal(decode_rle(found.mask, 48, 64), rectangle(10, 10, 40, 40))
    np.testing.assert_array_equal(
        clipped(rectangle(0, 0, 64, 48), np.array([9.6, 10, 40.2, 39.9])), rectangle(9, 10, 41, 40)
    )


def test_box_jitter_is_reproducible_and_stays_within_the_image():
    seen = []

    class Sees(Ellipses):
        def __call__(self, pictures, boxes):
            seen.append(dict(zip((p.record.key for p in pictures), boxes)))
            return super().__call__(pictures, boxes)

    pictures = [picture_of(made) for made in two_boxes(3)]
    masks = Masks(Sees(), Quality(box_jitter=0.3, num_jittered_boxes=4))
    masks(pictures), masks(pictures[1:2])
    np.testing.assert_array_equal(seen[0]["image 001"], seen[1]["image 001"])
    for picture in pictures:
        boxes = seen[0][picture.record.key].reshape(5, 2, 4)
        np.testing.assert_array_equal(boxes[0], picture.boxes)
        sides = np.tile(picture.boxes[:, 2:] - picture.boxes[:, :2], 2)
        moved = np.abs(boxes[1:] - picture.boxes) / sides
        assert 0.15 < moved.max() <= 0.3 + 1e-6 and (moved.reshape(-1) > 0).mean() > 0.9
        assert (boxes >= 0).all() and (boxes <= [64, 48, 64, 48]).all()


def test_stability_measures_agreement_between_masks():
    a, b = rectangle(0, 0, 20, 20), rectangle(0, 0, 20, 10)
    assert stability(np.stack([a, a, a])) == 1 and stability(np.stack([a])) == 1
    assert stability(np.stack([a, a, b])) == pytest.approx(0.75) and stability(np.stack([a, ~a])) == 0


@pytest.mark.parametrize("seed", range(4))
def test_small_holes_and_islands_are_removed_as_with_scipy(seed):
    mask, share = blobs(seed), 0.03
    found = cleaned(mask, share)
    everywhere = np.ones((3, 3))

    def without_small(m, least):
        labels, n = ndimage.label(m, everywhere)
        areas = ndimage.sum_labels(m, labels, range(1, n + 1))
        return np.isin(labels, 1 + np.flatnonzero((areas >= least) | (areas == areas.max())))

    least = share * mask.sum()
    expected = ~without_small(~without_small(mask, least), least)
    np.testing.assert_array_equal(found, expected)
    assert (found != mask).any() and (cleaned(mask, 0.0) == mask).all() and not cleaned(np.zeros_like(mask), 0.5).any()


def test_masks_are_not_requested_for_crowds_or_segments_with_masks():
    made = record(
        0,
        Segment(0, box=(0.0, 0.0, 9.0, 9.0), crowd=True),
        Segment(1, box=(0.0, 0.0, 9.0, 9.0), mask=b"1"),
        Segment(1, box=(0.0, 0.0, 9.0, 9.0)),
    )
    assert Masks(Ellipses(), Quality()).wanted(made, INFO) == [2]
