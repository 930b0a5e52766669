"""The Batch: fixed shapes, one tree of arrays, all that a train step sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mqformer_jax.input.example import Example

PAD = 128  # grey of the padding right and below the image


@flax.struct.dataclass
class Batch:
    """B images on one canvas of H x W pixels, P prompts and N target rows an image, L tokens a prompt.

    Rows past `num_targets` and prompts that are not `prompt_valid` are padding. Masks travel as bits, eight pixels of a
    row in a byte (`np.packbits(mask, axis=-1)`), so W is a multiple of 8.

    tokens: ids, or already what a frozen text encoder says of them (`TextCache`).
    image: 0 to 255, padded right and below. size: height and width of the valid part, pixels.
    prompt_region / prompt_exhaustive: see `Prompt`. boxes: cx, cy, w, h as fractions of the canvas.
    positive: which prompts name which target. has_mask: the target's mask is known. masks: its bits.
    ignore: bits of the pixels where nothing is known (the padding is not among them: see `size`).
    source: index of the data set in the mixture, for metrics only.
    """

    image: UInt8[np.ndarray, "b h w 3"]
    size: Int[np.ndarray, "b 2"]
    tokens: Int[np.ndarray, "b p l"] | Float[np.ndarray, "b p e"]
    prompt_valid: Bool[np.ndarray, "b p"]
    prompt_region: Bool[np.ndarray, "b p"]
    prompt_exhaustive: Bool[np.ndarray, "b p"]
    num_targets: Int[np.ndarray, "b"]
    boxes: Float[np.ndarray, "b n 4"]
    positive: Bool[np.ndarray, "b n p"]
    has_mask: Bool[np.ndarray, "b n"]
    masks: UInt8[np.ndarray, "b n h w8"]
    ignore: UInt8[np.ndarray, "b h w8"]
    source: Int[np.ndarray, "b"]


def to_row(
    example: Example,
    texts: Sequence[str],
    indices: Int[np.ndarray, "p"],
    tokenizer: Callable[[Sequence[str]], Int[np.ndarray, "n l"]],
    canvas: tuple[int, int],
    max_targets: int,
    max_prompts: int,
    source: int,
    rng: np.random.Generator,
) -> Batch:
    """One example, no larger than the canvas (height, width), as a row of a Batch: its fields without the leading axis.

    texts, indices: what `choose_prompts` gave. Targets that no chosen prompt names are left out. If there are more
    targets than fit, a random subset stays, and the prompts of the others are no longer exhaustively labelled.
    """
    new = {int(old): i for i, old in enumerate(indices)}
    targets = [t for t in example.targets if any(p in new for p in t.prompts)]
    exhaustive = np.zeros(max_prompts, bool)
    exhaustive[: len(indices)] = [example.prompts[i].exhaustive for i in indices]
    if len(targets) > max_targets:
        order = rng.permutation(len(targets))
        for i in order[max_targets:]:
            exhaustive[[new[p] for p in targets[i].prompts if p in new]] = False
        targets = [targets[i] for i in sorted(order[:max_targets])]
    (h, w), (height, width) = example.image.shape[:2], canvas
    region, valid = np.zeros(max_prompts, bool), np.arange(max_prompts) < len(indices)
    region[: len(indices)] = [example.prompts[i].region for i in indices]
    image = np.full((height, width, 3), PAD, np.uint8)
    image[:h, :w] = example.image
    boxes = np.zeros((max_targets, 4), np.float32)
    positive, has_mask = np.zeros((max_targets, max_prompts), bool), np.zeros(max_targets, bool)
    masks = np.zeros((max_targets, height, width // 8), np.uint8)
    for i, target in enumerate(targets):
        x0, y0, x1, y1 = target.box
        boxes[i] = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
        positive[i, [new[p] for p in target.prompts if p in new]] = True
        if target.mask is not None:
            has_mask[i] = True
            masks[i, :h, : -(-w // 8)] = np.packbits(target.mask, axis=-1)
    ignore = np.zeros((height, width // 8), np.uint8)
    ignore[:h, : -(-w // 8)] = np.packbits(example.ignore, axis=-1)
    tokens = tokenizer(list(texts) or [""])
    tokens = np.pad(tokens[: len(texts)], ((0, max_prompts - len(texts)), (0, 0)))
    return Batch(
        image=image,
        size=np.array([h, w], np.int32),
        tokens=tokens.astype(np.int32),
        prompt_valid=valid,
        prompt_region=region,
        prompt_exhaustive=exhaustive,
        num_targets=np.array(len(targets), np.int32),
        boxes=boxes,
        positive=positive,
        has_mask=has_mask,
        masks=masks,
        ignore=ignore,
        source=np.array(source, np.int32),
    )


def collate(rows: Sequence[Batch]) -> Batch:
    """Rows of one shape, stacked into a Batch."""
    return Batch(**{f.name: np.stack([getattr(row, f.name) for row in rows]) for f in dataclasses.fields(Batch)})
