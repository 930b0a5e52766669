"""`Predictor`: segment images by text prompts with a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.checkpoint import load_weights
from mqformer_jax.input.transforms import fit_image
from mqformer_jax.matting.refiner import Refiner
from mqformer_jax.models.build import abstract_model
from mqformer_jax.models.heads import normalize
from mqformer_jax.models.mqformer import query_counts
from mqformer_jax.models.tokenizer import Tokenizer, make_tokenizer
from mqformer_jax.parallel.mesh import BATCH, make_mesh, replicated, shard_map_batch
from mqformer_jax.parallel.rules import filled, flatten_paths
from mqformer_jax.segments import (
    CanvasMasks,
    Masks,
    Segments,
    instance_segments,
    panoptic_segments,
    region_segments,
    semantic_segments,
    soft_mask,
)
from mqformer_jax.tasks import PREDICTED, TASKS

ENCODED_AT_ONCE = 256  # texts per call of the text encoder
MAX_CACHED_TEXTS = 100_000


@no_type_check  # see `input.batch.Batch`
@flax.struct.dataclass
class PromptBatch:
    """The embedded prompts of a batch of images, p per image. `valid` is False for padding."""

    prompt_embeddings: Float[Array, "b p e"]
    valid: Bool[Array, "b p"]


@flax.struct.dataclass
class RawPredictions:
    """The predictions of the network for one image, on the host, before postprocessing.

    class_probs: 0 to 1, for each query and prompt. boxes: x0, y0, x1, y1 in pixels of the image. masks: logits at the
    image's size.
    """

    class_probs: Float[np.ndarray, "q p"]
    boxes: Float[np.ndarray, "q 4"]
    masks: Masks


class IncompleteModel(ValueError):
    """The error that is raised if weights lack some arrays of the model that their config describes."""


class Predictor:
    """A trained model that segments images by text prompts.

    predictor = Predictor.from_checkpoint("runs/demo")
    segments = predictor(image, ["sky", "the red star"], task="referring")
    """

    def __init__(
        self,
        config: ConfigDict,
        params: Any,
        frozen: Any,
        tokenizer: Tokenizer,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Build the model from its parameters.

        devices: devices of this host among which the images of a batch are divided, each with a copy of the model;
        default: the device of `params`. Raises IncompleteModel if `params` and `frozen` lack arrays of the model.
        """
        self.config, self.tokenizer = config, tokenizer
        self.canvas = tuple(config.data.canvas)
        self.refiner: Refiner | None = None
        self._cache: dict[str, np.ndarray] = {}
        graph, *shapes = abstract_model(config.model)
        given = flatten_paths(params) | flatten_paths(frozen)
        if missing := sorted({name for tree in shapes for name in flatten_paths(tree)} - given.keys()):
            raise IncompleteModel(f"{len(missing)} arrays are missing, e.g. {missing[0]}")
        self.params, self.frozen = (filled(tree, given) for tree in shapes)
        self.shares = len(devices or [None])
        self.model = lambda params, frozen: nnx.merge(graph, params, frozen)
        # Compiled functions of (params, frozen, ...). `export` exports them too.
        self.encode_tokens = jax.jit(lambda p, f, tokens: self.model(p, f).text_encoder(tokens).astype(jnp.float32))
        self.embed_vectors = jax.jit(lambda p, f, vectors, is_region: self.model(p, f).embed_text(vectors, is_region))

        def forward(params, frozen, image, size, prompts):
            outputs = self.model(params, frozen)(image, size, prompts.prompt_embeddings, prompts.valid)
            last = jax.tree.map(lambda x: x[-1], outputs.matching)
            features = outputs.mask_features.astype(last.mask_embed.dtype)
            masks = jnp.einsum("bqd,bhwd->bqhw", last.mask_embed, features, preferred_element_type=jnp.float32)
            return jax.nn.sigmoid(last.class_logits), last.boxes, masks

        if self.shares > 1:
            mesh = make_mesh((-1, 1, 1), devices)
            self.params, self.frozen = jax.device_put((self.params, self.frozen), replicated(mesh))
            forward = shard_map_batch(forward, mesh, (P(), P(), BATCH, BATCH, BATCH), BATCH)
        self.forward = jax.jit(forward)

    @classmethod
    def from_checkpoint(cls, path: str, devices: Sequence[jax.Device] | None = None) -> Predictor:
        """Load a model with its config.

        path: workdir of a training run, or folder of a converted model. devices: see `Predictor`. Raises ValueError if
        the checkpoint lacks arrays of the model.
        """
        weights = load_weights(path)
        tokenizer = make_tokenizer(weights.config.model.text, path)
        try:
            predictor = cls(weights.config, weights.params, weights.frozen, tokenizer, devices)
        except IncompleteModel as e:
            raise ValueError(
                f"{path} is not a complete model ({e}): it can only be used in config.init_from, to start training."
            ) from e
        predictor.refiner = Refiner.load(path)
        return predictor

    def embed(
        self, texts: Sequence[str], regions: Sequence[bool] | Bool[np.ndarray, " p"], templates: Sequence[str] = ("{}",)
    ) -> Float[Array, "p e"]:
        """Return the embeddings of prompts. The outputs of the text encoder are cached.

        regions: True for each prompt that owns one region (stuff, expressions) rather than several instances.
        templates: sentences into which each text is inserted, such as "a photo of a {}."; the normalized embeddings of
        the sentences are averaged, as in CLIP and OpenSeeD. Raises ValueError if `texts` is empty.
        """
        if not texts:
            raise ValueError("no prompts: give at least one text to look for.")
        vectors = [self._vectors([template.format(text) for text in texts]) for template in templates]
        vectors = average(vectors) if len(vectors) > 1 else vectors[0]
        padding = padded_length(len(texts)) - len(texts)
        padded = np.pad(vectors, ((0, padding), (0, 0))), np.pad(np.asarray(regions, bool), (0, padding))
        return self.embed_vectors(self.params, self.frozen, *padded)[: len(texts)]

    def _vectors(self, texts: Sequence[str]) -> Float[np.ndarray, "p e"]:
        """Encode texts, using cached results where available.

        Long lists are encoded in parts, which limits memory and the number of compiled shapes.
        """
        if len(self._cache) > MAX_CACHED_TEXTS:
            self._cache.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        for start in range(0, len(new), ENCODED_AT_ONCE):
            some = new[start : start + ENCODED_AT_ONCE]
            tokens = np.pad(self.tokenizer(some), ((0, padded_length(len(some)) - len(some)), (0, 0)))
            self._cache.update(zip(some, np.asarray(self.encode_tokens(self.params, self.frozen, tokens))))
        return np.stack([self._cache[text] for text in texts])

    def predict_raw(
        self,
        images: Sequence[np.ndarray],
        prompts: Sequence[Float[Array, "_p e"]],
        batch: int | None = None,
        canvas: tuple[int, int] | None = None,
    ) -> list[RawPredictions]:
        """Return the network's predictions for uint8 RGB images of any sizes, each with its own embedded prompts.

        The network runs once. The input is padded to `batch` images (default: `len(images)`) with `padded_length`
        prompts each, so that few shapes are compiled. canvas: height and width into which the images are fitted;
        default: the config's.
        """
        count, batch, canvas = len(images), batch or len(images), canvas or self.canvas
        batch += -batch % self.shares
        fitted = [fit_image(image, canvas) for image in images]
        length = padded_length(max(len(p) for p in prompts))
        embeddings = np.zeros((batch, length, prompts[0].shape[-1]), np.float32)
        valid = np.zeros((batch, length), bool)
        for i, p in enumerate(prompts):
            embeddings[i, : len(p)], valid[i, : len(p)] = p, True
        pixels = np.zeros((batch, *canvas, 3), np.uint8)
        sizes = np.full((batch, 2), canvas, np.int32)
        for i, (padded, size) in enumerate(fitted):
            pixels[i], sizes[i] = padded, size
        probs, boxes, masks = jax.device_get(
            self.forward(self.params, self.frozen, pixels, sizes, PromptBatch(embeddings, valid))
        )
        found = []
        for i in range(count):
            output = images[i].shape[:2]
            found.append(
                RawPredictions(
                    np.asarray(probs[i, :, : len(prompts[i])], np.float32),
                    _to_pixels(boxes[i], canvas, fitted[i][1], output),
                    CanvasMasks(masks[i], canvas, fitted[i][1], output),
                )
            )
        return found

    def __call__(
        self,
        image: np.ndarray | Sequence[np.ndarray],
        prompts: Sequence[str],
        task: str = "panoptic",
        regions: Sequence[bool] | Bool[np.ndarray, " p"] | None = None,
        queries: str = "all",
        score: float | None = None,
    ) -> Segments | list[Segments]:
        """Return the segments of a uint8 RGB image for the prompts, or a list of them for a list of images.

        task: "panoptic" (no overlaps), "instance" (ranked, may overlap), "semantic" (every pixel to a prompt),
            "referring" or "foreground" (one region per prompt), "matting" (one region per prompt, with `alphas`; the
            checkpoint needs a refiner).
        regions: True for each prompt that owns one region (stuff) rather than several instances (things); default:
            False for panoptic and instance, else True.
        queries: the queries to use: "all", "learnable" or "conditional".
        score: the lowest score of a segment. Replaces the recipe's `eval.object_mask_threshold` (panoptic),
            `eval.score_threshold` (instance) and `eval.no_target_threshold` (one region per prompt).

        Raises ValueError if an argument is invalid, or if the model has no such queries or no refiner.
        """
        images = [image] if isinstance(image, np.ndarray) else list(image)
        for i in images:
            if not isinstance(i, np.ndarray) or i.dtype != np.uint8 or i.ndim != 3 or i.shape[2] != 3 or not i.size:
                raise ValueError(f"the image is {_describe(i)}: give uint8 RGB of shape (height, width, 3).")
        if regions is not None and len(regions) != len(prompts):
            raise ValueError(f"regions has {len(regions)} values for {len(prompts)} prompts: give one bool per prompt.")
        if task not in PREDICTED:
            raise ValueError(f"task={task!r} is not supported; give one of {', '.join(PREDICTED)}.")
        if task == "matting" and self.refiner is None:
            raise ValueError("task='matting': this checkpoint has no refiner; train one with `mqformer train-matting`.")
        regions = (
            np.full(len(prompts), not TASKS[task].chooses_regions) if regions is None else np.asarray(regions, bool)
        )
        templates = self.config.data.templates if TASKS[task].by_class else ("{}",)
        embedded = self.embed(prompts, regions, templates)
        selected, thresholds = self._select_queries(queries), with_score(self.config.eval, score)
        if queries != "all":
            # Queries that are not selected get a score of 0. A threshold of at least 0 removes them.
            thresholds = ConfigDict({**thresholds, "score_threshold": max(0.0, thresholds.score_threshold)})
        found = []
        for start in range(0, len(images), self.config.eval.batch_size):
            some = images[start : start + self.config.eval.batch_size]
            batch = min(1 << (len(some) - 1).bit_length(), self.config.eval.batch_size)
            for single, raw in zip(some, self.predict_raw(some, [embedded] * len(some), batch)):
                raw = dataclasses.replace(raw, class_probs=np.where(selected, raw.class_probs, 0))
                segments = postprocess(raw, list(prompts), regions, task, thresholds)
                if task == "matting":
                    guides = np.stack([soft_mask(raw.class_probs, raw.masks, p) for p in range(len(prompts))])
                    has_target = segments.masks.any((1, 2))[:, None, None]
                    segments.alphas = self.refiner(single, guides) * has_target
                found.append(segments)
        return found[0] if isinstance(image, np.ndarray) else found

    def _select_queries(self, queries: str) -> Bool[np.ndarray, "q 1"]:
        """Return for each query whether it is used. Learnable queries come first. queries: see `__call__`."""
        learnable, conditional = query_counts(self.config.model)
        counts = {"all": (1, 1), "learnable": (1, 0), "conditional": (0, 1)}
        if queries not in counts:
            raise ValueError(f"queries={queries!r} is not supported; give one of {', '.join(counts)}.")
        selected = np.repeat(np.array(counts[queries], bool), [learnable, conditional])
        if not selected.any():
            raise ValueError(
                f"queries={queries!r}: this model has no such queries "
                f"(config.model.queries = {self.config.model.queries!r}); give 'all'."
            )
        return selected[:, None]


def padded_length(count: int) -> int:
    """Round a number of prompts up, so that the model is compiled for few lengths.

    Lengths up to 64 are multiples of 8. Longer ones are multiples of an eighth of the next power of two.
    """
    step = max(8, 1 << max((count - 1).bit_length() - 3, 0))
    return -(-count // step) * step


def with_score(thresholds: ConfigDict, score: float | None) -> ConfigDict:
    """Return `config.eval` with `score` as the score threshold of all tasks, or unchanged if `score` is None."""
    if score is None:
        return thresholds
    names = ("object_mask_threshold", "no_target_threshold", "score_threshold")
    return ConfigDict({**thresholds, **dict.fromkeys(names, score)})


def _describe(image: object) -> str:
    return f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__


def average(vectors: Sequence[Float[np.ndarray, "p e"]]) -> Float[Array, "p e"]:
    """Return for each text the average of its vectors: their mean direction, scaled to their mean length.

    vectors: one array for each template, with one vector for each text.
    """
    length = sum(jnp.linalg.norm(v, axis=-1, keepdims=True) for v in vectors) / len(vectors)
    return normalize(sum(normalize(v) for v in vectors)) * length


def postprocess(
    raw: RawPredictions, texts: Sequence[str], regions: np.ndarray, task: str, thresholds: ConfigDict
) -> Segments:
    """Return the segments of a task. thresholds: `config.eval`."""
    kind = TASKS[task].segments
    if kind == "panoptic":
        limits = thresholds.object_mask_threshold, thresholds.overlap_threshold
        return panoptic_segments(texts, raw.class_probs, raw.masks, regions, *limits)
    if kind == "instance":
        options = {name: thresholds[name] for name in ("max_detections", "score_threshold", "crop_masks")}
        return instance_segments(texts, raw.class_probs, raw.boxes, raw.masks, ~regions, **options)
    if kind == "semantic":
        return semantic_segments(texts, raw.class_probs, raw.masks)
    return region_segments(texts, raw.class_probs, raw.boxes, raw.masks, thresholds.no_target_threshold)


def _to_pixels(boxes: Float[np.ndarray, "q 4"], canvas, valid, output) -> Float[np.ndarray, "q 4"]:
    """Convert cx, cy, w, h in fractions of the canvas to x0, y0, x1, y1 in pixels, clipped to the user's image.

    canvas, valid, output: see `segments.restore`.
    """
    center, half = boxes[:, :2], boxes[:, 2:] / 2
    xyxy = np.concatenate([center - half, center + half], 1) * np.tile(canvas[::-1], 2)
    xyxy *= np.tile(np.asarray(output[::-1]) / np.asarray(valid[::-1]), 2)
    return np.clip(xyxy, 0, np.tile(output[::-1], 2)).astype(np.float32)
