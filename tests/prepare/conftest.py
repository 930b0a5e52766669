"""Fixtures of the tests of data preparation."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from preparation import H, W


@pytest.fixture
def folder(tmp_path):
    """Images a.jpg, b.png, c.webp and d.jpg, each 60 x 40, in `images`."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png", "c.webp", "d.jpg"):
        Image.fromarray(rng.integers(0, 255, (H, W, 3), np.uint8)).save(tmp_path / "images" / name)
    return tmp_path
