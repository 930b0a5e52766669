import numpy as np
import pytest

from mqformer_jax.input.record import box_iou


def test_box_iou_of_known_boxes():
    a = np.array([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert box_iou(a, np.array([1.0, 1, 3, 3])).tolist() == pytest.approx([1 / 7, 0, 0])
    assert box_iou(a[2], a[2]) == 0
