"""Ragged masks."""

import cv2
import numpy as np


def blobs(seed: int, shape: tuple[int, int] = (60, 80)) -> np.ndarray:
    """bool: some large parts and many small ones, with holes."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return cv2.GaussianBlur(noise, (0, 0), 2.5) > 0.03
