"""Predictor: a checkpoint, an image and words in; Segments out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mqformer_jax.checkpoint import load_weights
from mqformer_jax.input.transforms import fit_image
from mqformer_jax.models.heads import normalize
from mqformer_jax.models.tokenizer import Tokenizer, make_tokenizer
from mqformer_jax.parallel.rules import path_name
from mqformer_jax.segments import (
    CanvasMasks,
    Segments,
    instance_segments,
    panoptic_segments,
    region_segments,
    semantic_segments,
)
from mqformer_jax.train_step import build_model

TASKS = ("panoptic", "instance", "semantic", "referring", "foreground")


@flax.struct.dataclass
class Question:
    """What is asked of a batch of images: p prompts each, embedded; `valid` marks the real ones."""

    text: Float[Array, "b p e"]
    valid: Any


@flax.struct.dataclass
class Answer:
    """What the network says of one image, on the host: what every rule of `segments` reads."""

    class_probs: Float[np.ndarray, "q p"]
    boxes: Float[np.ndarray, "q 4"]
    masks: CanvasMasks


class IncompleteModel(ValueError):
    """Weights that are only a part of the model their config describes."""


class Predictor:
    """A trained model behind one call.

    >>> predictor = Predictor.from_checkpoint("runs/demo")
    >>> predictor(image, ["sky", "the red star"], regions=[True, True], task="referring")
    """

    def __init__(self, config: ConfigDict, params: Any, frozen: Any, tokenizer: Tokenizer):
        self.config, self.params, self.frozen, self.tokenizer = config, params, frozen, tokenizer
        self.canvas = tuple(config.data.canvas)
        holder = {}

        def graph(key):
            holder["graph"], *trees = build_model(config, key)
            return trees

        wanted = _paths(jax.eval_shape(graph, jax.random.key(0)))
        if missing := sorted(wanted - _paths([params, frozen])):
            raise IncompleteModel(f"{len(missing)} arrays are missing, {missing[0]} among them")
        merge = lambda params, frozen: nnx.merge(holder["graph"], params, frozen)
        self._encode = jax.jit(lambda p, f, tokens: merge(p, f).text_encoder(tokens).astype(jnp.float32))
        self._embed = jax.jit(lambda p, f, vectors, region: merge(p, f).embed_text(vectors, region))

        def forward(params, frozen, image, size, question):
            outputs = merge(params, frozen)(image, size, question.text, question.valid)
            last = jax.tree.map(lambda x: x[-1], outputs.matching)
            features = outputs.mask_features.astype(last.mask_embed.dtype)
            masks = jnp.einsum("bqd,bhwd->bqhw", last.mask_embed, features, preferred_element_type=jnp.float32)
            return jax.nn.sigmoid(last.class_logits), last.boxes, masks

        self._forward = jax.jit(forward)

    @classmethod
    def from_checkpoint(cls, path: str) -> "Predictor":
        """`path`: a workdir of `mqformer_jax.main`, or a whole model that `mqformer_jax.convert` wrote. The config is its own."""
        weights = load_weights(path)
        tokenizer = make_tokenizer(weights.config.model.text, path)
        try:
            return cls(weights.config, weights.params, weights.frozen, tokenizer)
        except IncompleteModel as e:
            raise ValueError(f"{path} is not a whole model ({e}): start a training from it with config.init_from.") from e

    def embed(self, texts: Sequence[str], regions: Sequence[bool], templates: Sequence[str] = ("{}",)) -> Float[Array, "p e"]:
        """Prompts as vectors; padded to a multiple of 8 inside, so that few lengths are ever compiled.

        templates: wordings around each text ("a photo of a {}."), whose directions are averaged (CLIP, OpenSeeD).
        """
        if not texts:
            raise ValueError("no prompts: give at least one text to look for.")
        padding = -len(texts) % 8
        wordings = [np.pad(self.tokenizer([t.format(text) for text in texts]), ((0, padding), (0, 0))) for t in templates]
        regions = np.pad(np.asarray(regions, bool), (0, padding))
        vectors = self._encode(self.params, self.frozen, wordings[0])
        if len(wordings) > 1:
            vectors = average([vectors, *(self._encode(self.params, self.frozen, tokens) for tokens in wordings[1:])])
        return self._embed(self.params, self.frozen, vectors, regions)[: len(texts)]

    def ask(self, images: Sequence[np.ndarray], prompts: Sequence[Float[Array, "p e"]], batch: int | None = None) -> list[Answer]:
        """The network's answers for uint8 RGB images of any sizes, each with its own embedded prompts.

        Images are padded to `batch` (default: their number) and prompts to a multiple of 8, so that few shapes are compiled.
        """
        count, batch = len(images), batch or len(images)
        fitted = [fit_image(image, self.canvas) for image in images]
        length = max(len(p) for p in prompts)
        length += -length % 8
        text = np.zeros((batch, length, prompts[0].shape[-1]), np.float32)
        valid = np.zeros((batch, length), bool)
        for i, p in enumerate(prompts):
            text[i, : len(p)], valid[i, : len(p)] = p, True
        pixels = np.zeros((batch, *self.canvas, 3), np.uint8)
        sizes = np.full((batch, 2), self.canvas, np.int32)
        for i, (padded, size) in enumerate(fitted):
            pixels[i], sizes[i] = padded, size
        probs, boxes, masks = jax.device_get(self._forward(self.params, self.frozen, pixels, sizes, Question(text, valid)))
        answers = []
        for i in range(count):
            output = images[i].shape[:2]
            answers.append(
                Answer(
                    np.asarray(probs[i, :, : len(prompts[i])], np.float32),
                    _to_pixels(boxes[i], self.canvas, fitted[i][1], output),
                    CanvasMasks(masks[i], self.canvas, fitted[i][1], output),
                )
            )
        return answers

    def __call__(
        self, image: np.ndarray, prompts: Sequence[str], task: str = "panoptic", regions: Sequence[bool] | None = None
    ) -> Segments:
        """Segments of one uint8 RGB image for the prompts.

        task: "panoptic" (no overlaps), "instance" (ranked, may overlap), "semantic" (every pixel to a prompt), "referring" or
            "foreground" (one region a prompt).
        regions: which prompts own one region (stuff) rather than several segments (things); default: none of them for
            panoptic and instance, all otherwise.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"the image is {image.dtype} {image.shape}: give uint8 RGB of shape (height, width, 3).")
        if regions is not None and len(regions) != len(prompts):
            raise ValueError(f"{len(regions)} regions for {len(prompts)} prompts: give one True or False a prompt.")
        if task not in TASKS:
            raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}.")
        regions = np.full(len(prompts), task not in ("panoptic", "instance")) if regions is None else np.asarray(regions, bool)
        classes = task in ("panoptic", "instance", "semantic")
        templates = self.config.data.templates if classes else ("{}",)
        answer = self.ask([image], [self.embed(prompts, regions, templates)])[0]
        return answer_segments(answer, list(prompts), regions, task, self.config.eval)


def _paths(trees: Sequence[Any]) -> set[str]:
    return {path_name(path) for tree in trees for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def average(vectors: Sequence[Float[Array, "p e"]]) -> Float[Array, "p e"]:
    """The mean direction of several wordings' vectors, as long as they are in the mean."""
    length = sum(jnp.linalg.norm(v, axis=-1, keepdims=True) for v in vectors) / len(vectors)
    return normalize(sum(normalize(v) for v in vectors)) * length


def answer_segments(answer: Answer, texts: Sequence[str], regions: np.ndarray, task: str, thresholds: ConfigDict) -> Segments:
    """The rule of a task with the thresholds of a config (`config.eval`): the one way from answers to segments."""
    if task == "panoptic":
        return panoptic_segments(texts, answer.class_probs, answer.masks, regions, thresholds.keep, thresholds.overlap)
    if task == "instance":
        return instance_segments(texts, answer.class_probs, answer.boxes, answer.masks, ~regions, thresholds.top)
    if task == "semantic":
        return semantic_segments(texts, answer.class_probs, answer.masks)
    return region_segments(texts, answer.class_probs, answer.boxes, answer.masks, thresholds.absent)


def _to_pixels(boxes: Float[np.ndarray, "q 4"], canvas, valid, output) -> Float[np.ndarray, "q 4"]:
    """cx, cy, w, h as fractions of the canvas to x0, y0, x1, y1 in pixels of the user's image, cut at its borders."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    xyxy = np.concatenate([centre - half, centre + half], 1) * np.tile(canvas[::-1], 2)
    xyxy *= np.tile(np.asarray(output[::-1]) / np.asarray(valid[::-1]), 2)
    return np.clip(xyxy, 0, np.tile(output[::-1], 2)).astype(np.float32)
