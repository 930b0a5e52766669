"""The `Batch`: a tree of arrays with fixed shapes, the input of a train step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import flax.struct
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mqformer_jax.arrays import Array
from mqformer_jax.input.example import Example

PAD = 128  # gray value of the padding, which is to the right of and below an image
SAME_OBJECT = 0.5  # if their boxes share more than this fraction of the smaller one, two targets may be one object


# Shapes are not checked: under jax.vmap and jax.tree.map, fields lose an axis or are not arrays.
@no_type_check
@flax.struct.dataclass
class Batch:
    """B images on a canvas of H x W pixels, each with P prompts of L tokens and N targets.

    Targets with an index of `num_targets` or more, and prompts that are not `prompt_valid`, are padding.

    image: 0 to 255, padded to the right and below. size: height and width of the image without padding, in pixels.
    tokens: token ids or, if the text encoder is frozen, the embeddings of the prompts (`TextCache`).
    is_region, prompt_exhaustive: see `Prompt`. boxes: cx, cy, w, h as fractions of the canvas.
    positive: whether the prompt fits the target. negative: whether a prompt that is not exhaustive is known not to fit
        the target. If a target is neither positive nor negative for such a prompt, it is unknown whether they fit.
    has_mask: whether the target's mask is known.
    offset: position of the lattice (`losses.lattice`), which has one pixel of each cell of `data.lattice_stride` x
        `data.lattice_stride` pixels: the row and column of this pixel in its cell. The loss reads no other pixels.
    masks: masks of the targets on the lattice, eight pixels of a row per byte, as in `np.packbits`.
    ignore: unlabeled pixels on the lattice, packed like `masks`. The padding is not marked (see `size`).
    source: index of the data set in the mixture, for metrics only.
    """

    image: UInt8[Array, "b h w 3"]
    size: Int[Array, "b 2"]
    tokens: Int[Array, "b p l"] | Float[Array, "b p e"]
    prompt_valid: Bool[Array, "b p"]
    is_region: Bool[Array, "b p"]
    prompt_exhaustive: Bool[Array, "b p"]
    num_targets: Int[Array, " b"]
    boxes: Float[Array, "b n 4"]
    positive: Bool[Array, "b n p"]
    negative: Bool[Array, "b n p"]
    has_mask: Bool[Array, "b n"]
    offset: Int[Array, "b 2"]
    masks: UInt8[Array, "b n h2 w8"]
    ignore: UInt8[Array, "b h2 w8"]
    source: Int[Array, " b"]


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The fixed sizes of a Batch: the canvas (height, width), prompts, targets, and the lattice's stride in pixels."""

    canvas: tuple[int, int]
    prompts: int
    targets: int
    lattice_stride: int = 4

    @classmethod
    def of(cls, data: Any) -> BatchSpec:
        """Return the sizes set in `config.data`."""
        height, width = data.canvas
        return cls((height, width), data.max_prompts, data.max_targets, data.lattice_stride)

    @property
    def bits(self) -> tuple[int, int]:
        """Return the shape of a mask that is packed to bits: the number of rows, and the number of bytes per row.

        Masks have one pixel for each square of `lattice_stride` x `lattice_stride` pixels of the canvas.
        """
        height, width = (side // self.lattice_stride for side in self.canvas)
        return height, -(-width // 8)


@dataclasses.dataclass
class PackedExample:
    """One example in the format of a Batch, before padding: p prompts, n targets, an image of h x w pixels."""

    image: UInt8[np.ndarray, "h w 3"]
    tokens: Int[np.ndarray, "p l"]
    is_region: Bool[np.ndarray, " p"]
    exhaustive: Bool[np.ndarray, " p"]
    boxes: Float[np.ndarray, "n 4"]
    positive: Bool[np.ndarray, "n p"]
    negative: Bool[np.ndarray, "n p"]
    has_mask: Bool[np.ndarray, " n"]
    offset: Int[np.ndarray, " 2"]
    masks: UInt8[np.ndarray, "n h2 w8"]
    ignore: UInt8[np.ndarray, "h2 w8"] | None
    source: int


def pack_example(
    example: Example,
    texts: Sequence[str],
    indices: Int[np.ndarray, " p"],
    tokenizer: Callable[[Sequence[str]], Int[np.ndarray, "n l"]],
    spec: BatchSpec,
    source: int,
    rng: np.random.Generator,
) -> PackedExample:
    """Convert an example that is no larger than the canvas to the format of a Batch.

    texts, indices: the result of `choose_prompts`. source: index of the data set in the mixture. Targets without a
    chosen prompt are left out. If there are more targets than `spec.targets`, a random subset is kept, and the prompts
    of the other targets are no longer exhaustive.
    """
    column = {int(old): new for new, old in enumerate(indices)}
    prompts = [example.prompts[i] for i in indices]
    exhaustive = np.array([p.exhaustive for p in prompts], bool)
    targets = [t for t in example.targets if any(p in column for p in t.prompts)]
    positive = np.zeros((len(targets), len(prompts)), bool)
    for i, target in enumerate(targets):
        positive[i, [column[p] for p in target.prompts if p in column]] = True
    kept = np.sort(rng.permutation(len(targets))[: spec.targets])
    dropped = np.ones(len(targets), bool)
    dropped[kept] = False
    exhaustive &= ~positive[dropped].any(0)
    corners = np.array([t.box for t in targets], np.float32).reshape(-1, 4)
    offset = rng.integers(0, spec.lattice_stride, 2)
    masks = np.zeros((len(kept), *spec.bits), np.uint8)
    for i, k in enumerate(kept):
        _pack(targets[k].mask, targets[k].at, offset, spec.lattice_stride, masks[i])
    ignore = None
    if example.ignore.any():
        ignore = np.zeros(spec.bits, np.uint8)
        _pack(example.ignore, (0, 0), offset, spec.lattice_stride, ignore)
    return PackedExample(
        image=example.image,
        tokens=tokenizer(list(texts) or [""])[: len(texts)],
        is_region=np.array([p.is_region for p in prompts], bool),
        exhaustive=exhaustive,
        boxes=_fractions(corners[kept], spec.canvas),
        positive=positive[kept],
        negative=_known_negatives(positive, corners, exhaustive)[kept],
        has_mask=np.array([targets[k].mask is not None for k in kept], bool),
        offset=offset,
        masks=masks,
        ignore=ignore,
        source=source,
    )


def collate(examples: Sequence[PackedExample], spec: BatchSpec) -> Batch:
    """Pad the examples to the sizes of `spec` and stack them to a Batch."""
    b, (height, width) = len(examples), spec.canvas

    def zeros(dtype: type, *shape: int) -> np.ndarray:
        return np.zeros((b, *shape), dtype)

    batch = Batch(
        image=np.empty((b, height, width, 3), np.uint8),
        size=zeros(np.int32, 2),
        tokens=zeros(np.int32, spec.prompts, examples[0].tokens.shape[1]),
        prompt_valid=zeros(bool, spec.prompts),
        is_region=zeros(bool, spec.prompts),
        prompt_exhaustive=zeros(bool, spec.prompts),
        num_targets=zeros(np.int32),
        boxes=zeros(np.float32, spec.targets, 4),
        positive=zeros(bool, spec.targets, spec.prompts),
        negative=zeros(bool, spec.targets, spec.prompts),
        has_mask=zeros(bool, spec.targets),
        offset=zeros(np.int32, 2),
        masks=zeros(np.uint8, spec.targets, *spec.bits),
        ignore=zeros(np.uint8, *spec.bits),
        source=zeros(np.int32),
    )
    for i, example in enumerate(examples):
        (h, w), p, n = example.image.shape[:2], len(example.tokens), len(example.masks)
        image = batch.image[i]
        image[:h, :w], image[:h, w:], image[h:] = example.image, PAD, PAD
        batch.size[i] = h, w
        batch.tokens[i, :p], batch.prompt_valid[i, :p] = example.tokens, True
        batch.is_region[i, :p], batch.prompt_exhaustive[i, :p] = example.is_region, example.exhaustive
        batch.num_targets[i], batch.source[i] = n, example.source
        batch.boxes[i, :n], batch.positive[i, :n, :p], batch.negative[i, :n, :p] = (
            example.boxes,
            example.positive,
            example.negative,
        )
        batch.offset[i], batch.has_mask[i, :n], batch.masks[i, :n] = example.offset, example.has_mask, example.masks
        if example.ignore is not None:
            batch.ignore[i] = example.ignore
    return batch


def unpack(bits: UInt8[np.ndarray, "*n h2 w8"], canvas: tuple[int, int]) -> Bool[np.ndarray, "*n h w"]:
    """Return packed masks (or ignored pixels) as images of the canvas for visualization. Each pixel fills its cell."""
    stride = canvas[0] // bits.shape[-2]
    pixels = np.unpackbits(bits, axis=-1, count=canvas[1] // stride).view(bool)
    return pixels.repeat(stride, -2).repeat(stride, -1)


def _pack(
    mask: Bool[np.ndarray, "_h _w"] | None,
    at: tuple[int, int],
    offset: Int[np.ndarray, " 2"],
    stride: int,
    bits: UInt8[np.ndarray, "h2 w8"],
) -> None:
    """Write the pixels of a mask that are on the lattice into `bits`. If `mask` is None, do nothing.

    at: top and left of the mask on the canvas. offset: see `Batch`.
    """
    if mask is None:
        return
    top, left = (-((first - o) // -stride) for o, first in zip(offset.tolist(), at))  # the first cells, rounded up
    y, x = (stride * cell + o - first for cell, o, first in zip((top, left), offset.tolist(), at))
    pixels = mask[y::stride, x::stride]
    row = np.zeros((len(pixels), 8 * bits.shape[1]), bool)
    row[:, left : left + pixels.shape[1]] = pixels
    bits[top : top + len(pixels)] = np.packbits(row, axis=-1)


def _known_negatives(
    positive: Bool[np.ndarray, "n p"], corners: Float[np.ndarray, "n 4"], exhaustive: Bool[np.ndarray, " p"]
) -> Bool[np.ndarray, "n p"]:
    """Return for each target and prompt whether the prompt is not exhaustive but known not to fit the target.

    This rule is not in the paper: a prompt of one labeled object is assumed not to fit the other labeled objects of the
    image, unless their boxes mostly overlap, because they may then be the same object ("a man", "the man in a hat").
    Without this rule, a data set that is never exhaustive (Visual Genome) would have no negatives.
    """
    uncertain = ~exhaustive
    if not uncertain.any() or not len(corners):
        return np.zeros_like(positive)
    low = np.maximum(corners[:, None, :2], corners[None, :, :2])
    high = np.minimum(corners[:, None, 2:], corners[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0), -1)
    area = np.prod(corners[:, 2:] - corners[:, :2], -1)
    same = common > SAME_OBJECT * np.minimum(area[:, None], area[None])
    return uncertain & positive.any(0) & ~positive & ~(same.astype(np.float32) @ positive > 0)


def _fractions(corners: Float[np.ndarray, "n 4"], canvas: tuple[int, int]) -> Float[np.ndarray, "n 4"]:
    """Convert x0, y0, x1, y1 in pixels to cx, cy, w, h in fractions of the canvas (height, width)."""
    low, high = corners[:, :2], corners[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], 1) / np.array([canvas[1], canvas[0]] * 2, np.float32)
