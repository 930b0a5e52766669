"""`Segments`, the predicted segments of one image, and the functions that compute them from raw predictions.

The functions follow Mask DINO's inference. Their inputs for Q queries and P prompts (without padding) are:

    class_probs   [Q, P]      0 to 1, after the sigmoid
    boxes         [Q, 4]      x0, y0, x1, y1 in pixels of the image
    mask_logits   [Q, h, w]   at the image's resolution, or `LazyMasks`, which resize only the masks in use
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    from mqformer_jax.input.record import DatasetInfo, Record


@dataclasses.dataclass
class Segments:
    """n segments of one image of h x w pixels.

    texts: all prompts. prompt_ids: index into `texts` for each segment. scores: 0 to 1.
    boxes: x0, y0, x1, y1 in pixels. query_ids: the query of each segment (learnable queries come first).
    panoptic: segment index + 1 at each pixel, 0 for none; None if segments may overlap.
    alphas: the fraction of each pixel that a segment covers, 0 to 1, for the task "matting", otherwise None.
    """

    texts: list[str]
    masks: Bool[np.ndarray, "n h w"]
    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    prompt_ids: Int[np.ndarray, " n"]
    query_ids: Int[np.ndarray, " n"]
    panoptic: Int[np.ndarray, "h w"] | None = None
    alphas: Float[np.ndarray, "n h w"] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Segments:
        """Return the segments with a score above `score`, without the `panoptic` map."""
        k = self.scores > score
        alphas = None if self.alphas is None else self.alphas[k]
        return Segments(
            self.texts,
            self.masks[k],
            self.boxes[k],
            self.scores[k],
            self.prompt_ids[k],
            self.query_ids[k],
            alphas=alphas,
        )


class LazyMasks(abc.ABC):
    """Mask logits [q, h, w] of an image, which are computed only when they are indexed with query ids."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Return (q, h, w)."""

    @abc.abstractmethod
    def __getitem__(self, index: Any, /) -> np.ndarray:
        """Return the mask logits of the queries whose ids are `index`."""


@dataclasses.dataclass(frozen=True)
class CanvasMasks(LazyMasks):
    """Mask logits as the network predicts them. Indexing with query ids returns the masks of these queries, resized.

    logits: on the padded canvas, at any stride. canvas, valid, output: arguments of `restore`, which resizes the masks.
    """

    logits: Float[np.ndarray, "q hc wc"]
    canvas: tuple[int, int]
    valid: tuple[int, int]
    output: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.logits), *self.output

    def __getitem__(self, queries: Int[np.ndarray, " k"] | list[int | np.integer]) -> Float[np.ndarray, "k h0 w0"]:
        return restore(self.logits[queries], self.canvas, self.valid, self.output)

    def band(self, queries: Int[np.ndarray, " k"], rows: slice) -> Float[np.ndarray, "k r w0"]:
        """Return a range of rows of the resized masks. With all rows, the result equals `self[queries]`."""
        if rows == slice(0, self.output[0]):
            return self[queries]
        source = np.clip(
            (np.arange(rows.start, rows.stop) + 0.5) * (self.valid[0] / self.output[0]) - 0.5, 0, self.valid[0] - 1
        )
        first, last = int(source[0]), int(np.ceil(source[-1]))
        upper, share = source.astype(int) - first, (source % 1).astype(np.float32)[:, None]
        lower = np.minimum(upper + 1, last - first)
        out = np.empty((len(queries), len(source), self.output[1]), np.float32)
        for image, wanted in zip(restore(self.logits[queries], self.canvas, self.valid, self.valid), out):
            wide = cv2.resize(
                image[first : last + 1], (self.output[1], last + 1 - first), interpolation=cv2.INTER_LINEAR
            )
            wanted[...] = wide[upper] * (1 - share) + wide[lower] * share
        return out


Masks = Float[np.ndarray, "q h w"] | LazyMasks
CROP_MARGIN = 0.1  # of `crop_masks`, as a fraction of the box's width and height
BAND = 1 << 27  # largest number of scores (pixels x prompts) that `semantic_map` holds at once


def restore(
    mask_logits: Float[np.ndarray, "q hc wc"], canvas: tuple[int, int], valid: tuple[int, int], output: tuple[int, int]
) -> Float[np.ndarray, "q h0 w0"]:
    """Resize masks to the canvas, crop them to the image on the canvas, and resize them to the user's image.

    canvas, valid, output: (height, width) in pixels of the padded input, the image on it, and the user's image.
    Interpolation is bilinear with pixel centers at halves and no antialiasing, as torch's
    `interpolate(align_corners=False)`.
    """
    out = np.empty((len(mask_logits), *output), np.float32)
    for low, full in zip(np.asarray(mask_logits, np.float32), out):
        padded = low if low.shape == tuple(canvas) else cv2.resize(low, canvas[::-1], interpolation=cv2.INTER_LINEAR)
        image = padded[: valid[0], : valid[1]]
        full[...] = image if valid == output else cv2.resize(image, output[::-1], interpolation=cv2.INTER_LINEAR)
    return out


def panoptic_segments(
    texts: Sequence[str],
    class_probs: Float[np.ndarray, "q p"],
    mask_logits: Masks,
    is_region: Bool[np.ndarray, " p"],
    object_mask_threshold: float = 0.25,
    overlap_threshold: float = 0.8,
    temperature: float | None = None,
) -> Segments:
    """Return segments that do not overlap (Mask DINO, `panoptic_inference`).

    A query takes part if its best prompt scores above `object_mask_threshold`. Each pixel goes to the query with the
    highest score x mask probability. A query that gets less than `overlap_threshold` of the area of its own mask is
    dropped. All queries of an `is_region` prompt are merged into one segment. With a `temperature`, pixels are assigned
    by softmax(class_probs / temperature) over the prompts instead of by scores. Mask DINO uses 0.06 for COCO's long
    list of classes; use None for a few prompts.
    """
    _, h, w = mask_logits.shape
    queries = np.flatnonzero(class_probs.max(1, initial=0) > object_mask_threshold)
    if not len(queries):
        return _segments(
            texts,
            np.zeros((0, h, w), bool),
            np.zeros(0),
            np.zeros(0, int),
            np.zeros(0, int),
            np.zeros((h, w), np.int32),
        )
    ranks = _sharpen(class_probs[queries], temperature)
    labels = ranks.argmax(1)
    winner, own, own_area = _contest(mask_logits, queries, ranks.max(1))
    visible = np.bincount(winner.ravel(), minlength=len(queries))

    panoptic = np.zeros((h, w), np.int32)
    found: list[int] = []  # index into `queries` of each segment
    region_segment: dict[int, int] = {}
    for k, label in enumerate(labels):
        mask = (winner == k) & own
        if visible[k] / max(own_area[k], 1) < overlap_threshold or not mask.any():
            continue
        if label in region_segment:
            panoptic[mask] = region_segment[label]
            continue
        found.append(k)
        panoptic[mask] = len(found)
        if is_region[label]:
            region_segment[label] = len(found)
    masks = panoptic == np.arange(1, len(found) + 1, dtype=np.int32)[:, None, None]
    scores = class_probs[queries[found], labels[found]]
    return _segments(texts, masks, scores, labels[found], queries[found], panoptic)


def _contest(
    mask_logits: Masks, queries: Int[np.ndarray, " k"], scores: Float[np.ndarray, " k"]
) -> tuple[Int[np.ndarray, "h w"], Bool[np.ndarray, "h w"], Int[np.ndarray, " k"]]:
    """Return the index of the query with the largest score x mask probability at each pixel (on a tie, the first one).

    Also return whether the pixel is inside that query's mask, and the area of each query's mask. Masks are processed
    one by one to limit the memory for large images.
    """
    shape = mask_logits.shape[1:]
    best, winner, own = np.full(shape, -1, np.float32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    area = np.zeros(len(queries), int)
    for k, query in enumerate(queries):
        (probs,) = _sigmoid(mask_logits[[query]])
        inside = probs >= 0.5
        area[k] = np.count_nonzero(inside)
        probs *= scores[k]
        better = probs > best
        np.copyto(best, probs, where=better)
        np.copyto(own, inside, where=better)
        winner[better] = k
    return winner, own, area


def instance_segments(
    texts: Sequence[str],
    class_probs: Float[np.ndarray, "q p"],
    boxes: Float[np.ndarray, "q 4"],
    mask_logits: Masks,
    wanted: Bool[np.ndarray, " p"] | None = None,
    max_detections: int = 100,
    rate_masks: bool = True,
    score_threshold: float = -1.0,
    crop_masks: bool = False,
) -> Segments:
    """Return the `max_detections` best (query, prompt) pairs as segments, best first. Segments may overlap.

    Source: Mask DINO, `instance_inference`.

    The score of a pair is the class score x the mean mask probability inside the mask. With `rate_masks=False`, it is
    the class score alone, for models that were trained with boxes only (Mask DINO's `focus_on_box`). `wanted` selects
    the prompts to use. Pairs that do not score above `score_threshold` are left out. With `crop_masks`, a mask ends at
    the query's box, enlarged by `CROP_MARGIN` (YOLACT, Bolya et al., ICCV 2019). This helps a model that was trained
    for a short time: its boxes tell nearby objects of a class apart before its masks do.
    """
    candidates = class_probs if wanted is None else np.where(wanted, class_probs, -1.0)
    count = min(max_detections, class_probs.size if wanted is None else len(class_probs) * int(np.sum(wanted)))
    flat = candidates.ravel()
    best = np.argpartition(-flat, count - 1)[:count] if count else np.zeros(0, int)
    best = best[flat[best] > score_threshold]  # before the masks, which are slow to compute and can only lower a score
    queries, prompts = np.divmod(best, class_probs.shape[1])
    used, row = np.unique(queries, return_inverse=True)
    masks, scores, inside = (
        np.empty((len(used), *mask_logits.shape[1:]), bool),
        flat[best],
        np.ones(len(used), np.float32),
    )
    for i, query in enumerate(used):
        (logits,) = mask_logits[[query]]
        np.greater(logits, 0, out=masks[i])
        if crop_masks:
            masks[i] &= _inside(boxes[query], logits.shape)
        if rate_masks:
            inside[i] = _sigmoid(logits)[masks[i]].sum() / (np.count_nonzero(masks[i]) + 1e-6)
    scores = scores * inside[row]
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > score_threshold]
    return Segments(
        list(texts),
        masks[row[order]],
        boxes[queries[order]],
        scores[order].astype(np.float32),
        prompts[order],
        queries[order],
    )


def _inside(box: Float[np.ndarray, " 4"], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Return the pixels whose center is in a box that is enlarged by `CROP_MARGIN` on each side."""
    margin = CROP_MARGIN * np.tile(box[2:] - box[:2], 2)
    x0, y0, x1, y1 = box + margin * (-1, -1, 1, 1)
    y, x = np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5
    return np.logical_and.outer((y >= y0) & (y <= y1), (x >= x0) & (x <= x1))


def semantic_map(
    class_probs: Float[np.ndarray, "q p"],
    mask_logits: Masks,
    object_mask_threshold: float = 0.0,
    temperature: float | None = None,
) -> Int[np.ndarray, "h w"]:
    """Return the best prompt of each pixel: argmax over prompts of the sum over queries of score x mask probability.

    `object_mask_threshold` leaves out queries whose best prompt scores less, for speed. `temperature`: see
    `panoptic_segments`. Source: MaskFormer's semantic inference, as in Mask DINO, `semantic_inference`.
    """
    _, h, w = mask_logits.shape
    queries = np.flatnonzero(class_probs.max(1) >= object_mask_threshold)
    weights = _sharpen(class_probs, temperature).astype(np.float32)[queries]
    labels = np.empty((h, w), np.int64)
    rows = max(1, BAND // (w * max(64, weights.shape[1])))
    for top in range(0, h, rows):  # limits the memory for the scores of many prompts and the masks of many queries
        band = slice(top, min(top + rows, h))
        total = np.zeros((weights.shape[1], (band.stop - top) * w), np.float32)
        for part in np.array_split(np.arange(len(queries)), max(1, len(queries) // 64)):
            logits = (
                mask_logits.band(queries[part], band)
                if isinstance(mask_logits, CanvasMasks)
                else mask_logits[queries[part], band]
            )
            total += weights[part].T @ _sigmoid(logits).reshape(len(part), -1)
        labels[band] = total.argmax(0).reshape(-1, w)
    return labels


def semantic_segments(texts: Sequence[str], class_probs: Float[np.ndarray, "q p"], mask_logits: Masks) -> Segments:
    """Return `semantic_map` as Segments: one for each prompt that has a pixel.

    The score of a segment is the highest class score of its prompt.
    """
    labels = semantic_map(class_probs, mask_logits)
    present = np.unique(labels)
    masks = labels == present[:, None, None]
    panoptic = np.searchsorted(present, labels).astype(np.int32) + 1
    return _segments(texts, masks, class_probs.max(0)[present], present, class_probs.argmax(0)[present], panoptic)


def region_segments(
    texts: Sequence[str],
    class_probs: Float[np.ndarray, "q p"],
    boxes: Float[np.ndarray, "q 4"],
    mask_logits: Masks,
    no_target_threshold: float = 0.0,
) -> Segments:
    """Return one segment per prompt, in order: the mask and box of its best query (referring, foreground).

    A prompt whose best score is below `no_target_threshold` has no target: its mask is empty and its box is zero. Its
    score is still returned.
    """
    queries = class_probs.argmax(0)
    scores = class_probs.max(0)
    has_target = scores >= no_target_threshold
    used, row = np.unique(queries, return_inverse=True)
    masks = np.zeros((len(texts), *mask_logits.shape[1:]), bool)
    for i, query in enumerate(used):
        masks[(row == i) & has_target] = mask_logits[[query]][0] > 0
    prompts = np.arange(len(texts))
    return Segments(list(texts), masks, np.where(has_target[:, None], boxes[queries], 0), scores, prompts, queries)


def soft_mask(class_probs: Float[np.ndarray, "q p"], mask_logits: Masks, prompt: int) -> Float[np.ndarray, "h w"]:
    """Return the mask probability of the best query of a prompt. The metrics of foregrounds evaluate this soft mask."""
    return _sigmoid(mask_logits[class_probs[:, prompt].argmax(keepdims=True)])[0]


def ground_truth_segments(record: Record, info: DatasetInfo) -> Segments:
    """Return the labeled masks of a record as Segments. The prompts are the classes of `info`.

    Crowds are left out, and the segments of a stuff class are merged into one. In `panoptic`, a pixel that several
    masks cover belongs to the smallest of them.
    """
    masks: list[np.ndarray] = []
    labels: list[int] = []
    for segment in record.segments:
        if segment.class_id is None or segment.mask is None or segment.crowd:
            continue
        mask = record.decode_mask(segment.mask)
        if info.classes[segment.class_id].is_region and segment.class_id in labels:
            masks[labels.index(segment.class_id)] |= mask
        else:
            masks.append(mask)
            labels.append(segment.class_id)
    stack = np.stack(masks) if masks else np.zeros((0, record.height, record.width), bool)
    panoptic = np.zeros((record.height, record.width), np.int32)
    for i in np.argsort(-stack.sum((1, 2)), kind="stable"):
        panoptic[stack[i]] = i + 1
    ids = np.full(len(labels), -1)
    return _segments(
        [c.name for c in info.classes], stack, np.ones(len(labels)), np.asarray(labels, int), ids, panoptic
    )


def _segments(texts, masks, scores, prompt_ids, query_ids, panoptic) -> Segments:
    """Return Segments whose boxes are computed from the masks."""
    return Segments(list(texts), masks, _boxes_of(masks), scores.astype(np.float32), prompt_ids, query_ids, panoptic)


def _boxes_of(masks: Bool[np.ndarray, "n h w"]) -> Float[np.ndarray, "n 4"]:
    """Return the tight box of each mask: x0, y0, x1, y1 (right and lower edges exclusive), or zeros if it is empty."""
    cols, rows = masks.any(1), masks.any(2)
    if not masks.size:
        return np.zeros((len(masks), 4), np.float32)
    x0, y0 = cols.argmax(1), rows.argmax(1)
    x1, y1 = cols.shape[1] - cols[:, ::-1].argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1)
    return np.stack([x0, y0, x1, y1], 1).astype(np.float32) * cols.any(1)[:, None]


def _sharpen(class_probs: np.ndarray, temperature: float | None) -> np.ndarray:
    if temperature is None:
        return class_probs
    e = np.exp((class_probs - class_probs.max(1, keepdims=True)) / temperature)
    return e / e.sum(1, keepdims=True)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the sigmoid as float32. All steps write into one array, because masks are large."""
    out = np.negative(logits, dtype=np.float32)
    with np.errstate(over="ignore"):  # exp(100) is inf, and 1 / inf is the correct 0
        np.exp(out, out=out)
    out += 1
    return np.reciprocal(out, out=out)
