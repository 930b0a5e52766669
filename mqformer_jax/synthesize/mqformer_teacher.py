"""Teachers that use a checkpoint of this project: one predicts masks from boxes, the other scores captions.

To predict a mask, a box becomes a denoising query (`DenoisingQueries`), like a noised target in training: the query
starts from the box and the prompt of its class, and the decoder predicts the object's mask. So the checkpoint must have
been trained with denoising queries that restore masks, as in Mask DINO's recipe. This module does not need torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mqformer_jax.arrays import Array
from mqformer_jax.checkpoint import latest_step
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.input.record import box_iou
from mqformer_jax.input.transforms import fit_image
from mqformer_jax.models.queries import DenoisingQueries
from mqformer_jax.segments import CanvasMasks
from mqformer_jax.synthesize.teachers import BoxMasks, Picture

NAMELESS = "object"  # the prompt of boxes that have neither a class nor expressions
MIN_IOU = 0.5  # a caption fits a box if the best detection for the caption has at least this IoU with the box


class MqformerMasks:
    """A `MaskTeacher` that uses a checkpoint of this project.

    where: workdir of the training run. Raises ValueError if the model was not trained to restore masks from boxes.
    """

    def __init__(self, where: str):
        predictor = Predictor.from_checkpoint(where)
        denoising = predictor.config.denoising
        if not (denoising.num_queries and denoising.masks):
            raise ValueError(
                f"{where} cannot predict masks from boxes: "
                "train it with denoising.num_queries > 0 and denoising.masks = True."
            )
        self.name = teacher_name(where)
        self._predictor, self._canvas = predictor, predictor.canvas

        def forward(
            params: Any, frozen: Any, image: Array, size: Array, text: Array, valid: Array, denoising: DenoisingQueries
        ) -> tuple[Array, Array]:
            outputs = predictor.model(params, frozen)(image, size, text, valid, denoising)
            embed = outputs.denoising.mask_embed[-1]
            masks = jnp.einsum(
                "bqd,bhwd->bqhw", embed, outputs.mask_features.astype(embed.dtype), preferred_element_type=jnp.float32
            )
            # The score is Mask DINO's: the mean probability inside the mask.
            inside = masks > 0
            return masks, (jax.nn.sigmoid(masks) * inside).sum((2, 3)) / jnp.maximum(inside.sum((2, 3)), 1)

        self._forward = jax.jit(forward)

    def __call__(self, pictures: Sequence[Picture], boxes: Sequence[Float[np.ndarray, "_k 4"]]) -> list[BoxMasks]:
        """Return the masks for the boxes of each image (see `MaskTeacher`)."""
        prompts = [[_prompt(p, i) for i in p.segments] for p in pictures]
        texts = [list(dict.fromkeys(some)) for some in prompts]
        embedded = [self._predictor.embed([t for t, _ in some], [region for _, region in some]) for some in texts]
        b, p, d = (_power_of_two(n) for n in (len(pictures), max(8, *map(len, texts)), max(16, *map(len, boxes))))
        height, width = self._canvas
        image, size = np.zeros((b, height, width, 3), np.uint8), np.zeros((b, 2), np.int32)
        text, valid = np.zeros((b, p, embedded[0].shape[-1]), np.float32), np.zeros((b, p), bool)
        prompt, corners, real = np.zeros((b, d), np.int32), np.full((b, d, 4), 0.5, np.float32), np.zeros((b, d), bool)
        for i, picture in enumerate(pictures):
            image[i], size[i] = fit_image(picture.image, self._canvas)
            text[i, : len(texts[i])], valid[i, : len(texts[i])] = embedded[i], True
            n, k = len(picture.boxes), len(boxes[i])
            prompt[i, :k] = [texts[i].index(prompts[i][j % n]) for j in range(k)]
            corners[i, :k], real[i, :k] = _on_canvas(boxes[i], picture.image.shape[:2], size[i], self._canvas), True
        # Each query is a group of its own, so that the queries do not attend to each other.
        denoising = DenoisingQueries(prompt, corners, np.broadcast_to(np.arange(d, dtype=np.int32), (b, d)), real)
        params, frozen = self._predictor.params, self._predictor.frozen
        masks, scores = jax.device_get(self._forward(params, frozen, image, size, text, valid, denoising))
        return [
            BoxMasks(
                CanvasMasks(masks[i, : len(k)], self._canvas, tuple(size[i].tolist()), p.image.shape[:2]),
                scores[i, : len(k)],
            )
            for i, (p, k) in enumerate(zip(pictures, boxes))
        ]


class MqformerScorer:
    """A `CaptionScorer` that uses a checkpoint of this project.

    A caption's score for a box is the IoU of the box with the best detection for the caption, or 0 below `MIN_IOU`.
    where: workdir of the training run.
    """

    def __init__(self, where: str):
        self._predictor, self.name = Predictor.from_checkpoint(where), teacher_name(where)

    def __call__(
        self, pictures: Sequence[Picture], captions: Sequence[Sequence[Sequence[str]]]
    ) -> list[list[Float[np.ndarray, "_c _n"]]]:
        """Find the best detection for each caption. Return its IoU with each box of the image, or 0 below `MIN_IOU`.

        The shapes are those of `CaptionScorer.__call__`.
        """
        found = []
        for picture, boxes in zip(pictures, captions):
            texts = list(dict.fromkeys(text for some in boxes for text in some))
            if not texts:
                found.append([np.zeros((0, len(picture.boxes)), np.float32) for _ in boxes])
                continue
            (answer,) = self._predictor.predict_raw(
                [picture.image], [self._predictor.embed(texts, [True] * len(texts))]
            )
            fits = box_iou(answer.boxes[answer.class_probs.argmax(0)][:, None], picture.boxes[None])
            fits = dict(zip(texts, np.where(fits >= MIN_IOU, fits, 0).astype(np.float32)))
            found.append(
                [
                    np.stack([fits[t] for t in some]) if some else np.zeros((0, len(picture.boxes)), np.float32)
                    for some in boxes
                ]
            )
        return found


def teacher_name(where: str) -> str:
    """Return the name under which records store a checkpoint: its folder and step, e.g. "ours:demo, step 1300"."""
    return f"ours:{os.path.basename(os.path.abspath(where))}, step {latest_step(where)}"


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n. Padding to it limits the number of compiled shapes."""
    return 1 << (n - 1).bit_length()


def _prompt(picture: Picture, index: int) -> tuple[str, bool]:
    """Return the prompt of a segment, and whether it owns one region."""
    segment = picture.record.segments[index]
    if segment.class_id is not None:
        info = picture.info.classes[segment.class_id]
        return info.name, info.is_region
    return ("foreground", True) if segment.foreground else ((*segment.expressions, NAMELESS)[0], True)


def _on_canvas(
    boxes: Float[np.ndarray, "k 4"], image: tuple[int, int], valid: np.ndarray, canvas: tuple[int, int]
) -> Float[np.ndarray, "k 4"]:
    """Convert x0, y0, x1, y1 in pixels of the image to cx, cy, w, h as fractions of the canvas.

    image, valid, canvas: (height, width) of the original image, of the image on the canvas, and of the canvas.
    """
    scaled = boxes * np.tile(valid[::-1] / np.array(image[::-1]) / np.array(canvas[::-1]), 2)
    return np.concatenate([(scaled[:, :2] + scaled[:, 2:]) / 2, scaled[:, 2:] - scaled[:, :2]], 1).astype(np.float32)
