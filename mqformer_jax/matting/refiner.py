"""Turn masks of an image into alpha mattes with a trained matting refiner (`Refiner`)."""

from __future__ import annotations

import os
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, UInt8
from ml_collections import ConfigDict

from mqformer_jax.checkpoint import has_checkpoint, load_weights
from mqformer_jax.matting.data import cut, fitted, window_around
from mqformer_jax.matting.model import MattingRefiner
from mqformer_jax.parallel.rules import filled, flatten_paths

FOLDER = "refiner"  # folder of the refiner in a workdir


def build_refiner(matting: ConfigDict, dtype: DTypeLike, seed: int | None) -> tuple[nnx.GraphDef, Any, Any]:
    """Return a new refiner as (graph, trainable parameters, frozen constants).

    matting: `config.matting`. dtype: `config.model.dtype`. If `seed` is None, the leaves are shapes without values.
    """
    make = lambda key: nnx.split(MattingRefiner(matting, rngs=nnx.Rngs(key), dtype=dtype), nnx.Param, ...)
    key = jax.random.key(seed or 0)
    graph, params, frozen = jax.eval_shape(make, key) if seed is None else jax.jit(make)(key)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


class Refiner:
    """A matting refiner trained by `mqformer train-matting`.

    >>> refiner = Refiner.load("runs/lite")
    >>> alphas = refiner(image, segments.masks)
    """

    def __init__(self, matting: ConfigDict, graph: nnx.GraphDef, params: Any, frozen: Any):
        self.matting, self.params, self.frozen = matting, params, frozen
        self._forward = jax.jit(
            lambda p, f, image, guidance: nnx.merge(graph, p, f)(image.astype(jnp.float32), guidance)[1]
        )

    @classmethod
    def load(cls, workdir: str) -> Refiner | None:
        """Load the refiner of a workdir, or return None if it has none. Raises ValueError if its files are damaged."""
        path = os.path.join(workdir, FOLDER)
        if not has_checkpoint(path):
            return None
        weights = load_weights(path)
        matting, loaded = weights.config.matting, flatten_paths((weights.params, weights.frozen))
        graph, *shapes = build_refiner(matting, weights.config.model.dtype, seed=None)
        return cls(matting, graph, *filled(tuple(shapes), loaded))

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], masks: Float[np.ndarray, "n h w"] | Bool[np.ndarray, "n h w"]
    ) -> Float[np.ndarray, "n h w"]:
        """Return the alpha, 0 to 1, of each mask (0 to 1, soft or hard) of an RGB image of any size.

        Each alpha is predicted on a crop around the mask's pixels above 0.5. Outside the crop, and for masks without
        such pixels, alpha is 0.
        """
        if masks.shape[1:] != image.shape[:2]:
            raise ValueError(
                f"the masks have height and width {masks.shape[1:]}, but the image has {image.shape[:2]}: "
                "give masks of the image's size."
            )
        alphas = np.zeros(masks.shape, np.float32)
        for mask, alpha in zip(masks, alphas):
            mask = mask.astype(np.float32)
            window = window_around(mask, self.matting.margin)
            if window is not None:
                top, left, height, width = window
                alpha[top : top + height, left : left + width] = self._refine(image, mask, window)
        return alphas

    def _refine(
        self, image: np.ndarray, mask: np.ndarray, window: tuple[int, int, int, int]
    ) -> Float[np.ndarray, "h2 w2"]:
        canvas = self.matting.canvas
        pixels, guidance = cut(image, window, canvas), cut(mask, window, canvas)
        alpha = np.asarray(self._forward(self.params, self.frozen, pixels[None], guidance[None])[0])
        height, width = fitted(window, canvas)
        alpha = cv2.resize(alpha[:height, :width], (window[3], window[2]), interpolation=cv2.INTER_LINEAR)
        return np.clip(alpha, 0, 1)
