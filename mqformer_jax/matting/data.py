"""Training data of the matting refiner: crops of images with mattes, and imperfect masks as guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import cv2
import grain
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.input.transforms import resize_image

SEARCHED = 100  # of this many first records of a data set, at least one must have a matte
UNKNOWN = 2.0  # additional loss weight of partly covered pixels and of pixels near them
Window = tuple[int, int, int, int]  # top, left, height, width in pixels of the image


@dataclasses.dataclass(frozen=True)
class Matte:
    """An image and the alpha (0 to 1) of one object in it.

    index: index of the record in its data set. foreground: whether the object is the salient foreground of the image.
    trimap: the decoded trimap (see `Segment`), or None.
    """

    image: UInt8[np.ndarray, "h w 3"]
    alpha: Float[np.ndarray, "h w"]
    index: int
    foreground: bool
    trimap: UInt8[np.ndarray, "h w"] | None = None


def open_mattes(root: str, entries: Sequence[dict], field: str) -> list[ShardSource]:
    """Open the data sets of `config.matting.mixture` or `config.matting.sets`.

    field: "mixture" or "sets", for error messages. Raises ValueError if there are no entries, or if a data set has no
    matte in its first `SEARCHED` records.
    """
    if not entries:
        raise ValueError(
            f"config.matting.{field} is empty: list data sets with mattes, e.g. dict(name='mattes', split='train')."
        )
    sources = [ShardSource(root, entry["name"], entry["split"]) for entry in entries]
    for source in sources:
        if not any(mattes_of(Record.from_bytes(source[i]), i) for i in range(min(SEARCHED, len(source)))):
            raise ValueError(
                f"config.matting.{field}: the first records of '{source.name}' split '{source.split}' have no matte: "
                "remove this data set from the config, or prepare it with mattes."
            )
    return sources


def find(source: ShardSource, start: int) -> list[Matte]:
    """Return the mattes of the first record that has mattes. Search from index `start` and wrap around at the end."""
    candidates = (
        mattes_of(Record.from_bytes(source[i]), i) for i in ((start + k) % len(source) for k in range(len(source)))
    )
    return next(mattes for mattes in candidates if mattes)


def mattes_of(record: Record, index: int) -> list[Matte]:
    segments = [s for s in record.segments if s.alpha is not None]
    image = record.decode_image() if segments else None
    trimap = lambda s: None if s.trimap is None else record.decode_alpha(s.trimap)
    return [
        Matte(image, record.decode_alpha(s.alpha).astype(np.float32) / 255, index, s.foreground, trimap(s))
        for s in segments
    ]


# ---- Geometry, shared by training and inference --------------------------------------------------------------------


def window_around(mask: Float[np.ndarray, "h w"], margin: float) -> Window | None:
    """Return a window around the pixels of a mask above 0.5, or None if there are no such pixels.

    The window is the bounding box of these pixels with a margin (a fraction of the longer side) on each side. It is
    square if the image is large enough.
    """
    left, top, width, height = cv2.boundingRect((mask > 0.5).astype(np.uint8))
    if not width:
        return None
    side = round(max(width, height) * (1 + 2 * margin))
    spans = [_span(start, length, side, room) for start, length, room in zip((top, left), (height, width), mask.shape)]
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def _span(start: int, length: int, wanted: int, room: int) -> tuple[int, int]:
    """Return the start and length of a span of `wanted` pixels around the center of a given span.

    start, length: the given span. The result is shortened and moved to lie inside 0 ... `room`.
    """
    wanted = min(wanted, room)
    return int(np.clip(start + (length - wanted) // 2, 0, room - wanted)), wanted


def part_of(window: Window, rng: np.random.Generator, share: float) -> Window:
    """Return a random part of a window.

    Its sides are the window's sides times `share` and a random factor of 0.7 to 1.4, but at most the window's sides.
    """
    share = min(1.0, share * 2 ** rng.uniform(-0.5, 0.5))
    height, width = (max(1, round(share * side)) for side in window[2:])
    return (
        window[0] + int(rng.integers(window[2] - height + 1)),
        window[1] + int(rng.integers(window[3] - width + 1)),
        height,
        width,
    )


def fitted(window: Window, canvas: int) -> tuple[int, int]:
    """Return the height and width of a window that is resized to a square canvas and keeps its aspect ratio."""
    ratio = canvas / max(window[2:])
    return max(1, round(window[2] * ratio)), max(1, round(window[3] * ratio))


def cut(pixels: np.ndarray, window: Window, canvas: int) -> np.ndarray:
    """Return a window of an image or mask [h, w, ...], resized into the upper left corner of a square canvas.

    The rest of the canvas repeats the edge of the window, so that no artificial outline appears.
    """
    top, left, height, width = window
    size = fitted(window, canvas)
    resized = resize_image(pixels[top : top + height, left : left + width], size)
    return cv2.copyMakeBorder(resized, 0, canvas - size[0], 0, canvas - size[1], cv2.BORDER_REPLICATE)


# ---- Guidance ------------------------------------------------------------------------------------------------------


def rough_mask(alpha: Float[np.ndarray, "h w"], threshold: float, grow: int) -> Float[np.ndarray, "h w"]:
    """Threshold a matte and return the hard mask, grown by `grow` pixels, or shrunk if `grow` is negative."""
    mask = (alpha > threshold).astype(np.float32)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(grow) + 1,) * 2)
    return cv2.dilate(mask, disc) if grow > 0 else cv2.erode(mask, disc)


def perturb(alpha: Float[np.ndarray, "h w"], rng: np.random.Generator) -> Float[np.ndarray, "h w"]:
    """Return a mask made from the matte, with random errors like those of a segmentation model.

    The matte is thresholded, then grown or shrunk. Sometimes the mask is also reduced in resolution or blurred, or a
    patch of it is copied to another place. Source: MGMatting.
    """
    reach = max(2, max(alpha.shape) // 20)
    mask = rough_mask(alpha, rng.uniform(0.05, 0.95), int(rng.integers(-reach, reach + 1)))
    if rng.random() < 0.5:
        mask = rough_mask(mask, 0.5, int(rng.integers(-reach, reach + 1)))
    if rng.random() < 0.5:
        small = cv2.resize(mask, None, fx=(share := 1 / rng.uniform(2, 10)), fy=share, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(small, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.3:
        mask = cv2.GaussianBlur(mask, (0, 0), rng.uniform(0.5, reach / 3))
    if rng.random() < 0.25:
        (h, w), side = mask.shape, int(rng.integers(reach, 4 * reach))
        (y, x), (v, u) = (rng.integers((max(1, h - side), max(1, w - side))) for _ in range(2))
        patch = mask[v : v + side, u : u + side].copy()
        mask[y : y + side, x : x + side] = patch
    return np.clip(mask, 0, 1)  # the blur has rounding errors


# ---- Batches -------------------------------------------------------------------------------------------------------


def make_batches(
    config: ConfigDict, sources: Sequence[ShardSource], own: Sequence[dict[int, UInt8[np.ndarray, "_ _"]]]
) -> Iterator[dict[str, np.ndarray]]:
    """Return an iterator over all batches of a training run, prefetched by threads.

    A batch holds `image` as uint8 [b, c, c, 3], and `guidance`, `alpha` and `weight` (of each pixel in the loss) as
    float32 [b, c, c], where c is `config.matting.crop`. Batches depend only on the seed. own: the result of
    `train_matting.own_masks` for each source.
    """
    matting = config.matting
    shares = np.sqrt([len(source) for source in sources])

    def example(i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((config.seed, i))
        k = int(rng.choice(len(sources), p=shares / shares.sum()))
        found = find(sources[k], int(rng.integers(len(sources[k]))))
        matte = found[rng.integers(len(found))]
        own_mask = own[k].get(matte.index) if matte.foreground and rng.random() < matting.own else None
        return make_example(matte, own_mask, matting, rng, config.data.flip)

    stream = grain.MapDataset.range(matting.steps * matting.batch_size).map(example).batch(matting.batch_size)
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=4)))


def make_example(
    matte: Matte, own: UInt8[np.ndarray, "_ _"] | None, matting: ConfigDict, rng: np.random.Generator, flip: float
) -> dict[str, np.ndarray]:
    """Return image, guidance, alpha and weight (see `make_batches`) of a random crop of the object.

    The crop is mirrored with probability `flip`. own: a mask of the whole image to use as guidance, 0 to 255, of any
    size. If it is None, the guidance is a perturbed matte.
    """
    h, w = matte.alpha.shape
    crop = matting.crop
    window = part_of(window_around(matte.alpha, matting.margin) or (0, 0, h, w), rng, crop / matting.canvas)
    size = fitted(window, crop)
    inside = np.s_[: size[0], : size[1]]
    image, alpha = cut(matte.image, window, crop), cut(matte.alpha, window, crop)
    if own is None:
        guidance = cut(perturb(np.ascontiguousarray(alpha[inside]), rng), (0, 0, *size), crop)
    else:
        guidance = cut(cv2.resize(own.astype(np.float32) / 255, (w, h), interpolation=cv2.INTER_LINEAR), window, crop)
    weight = np.zeros_like(alpha)
    weight[inside] = 1 + UNKNOWN * near_soft(alpha[inside])
    example = {"image": image, "guidance": guidance, "alpha": alpha, "weight": weight}
    if rng.random() < flip:
        for values in example.values():
            values[:, : size[1]] = values[:, : size[1]][:, ::-1].copy()
    return example


def near_soft(alpha: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Return a map that is 1 at partly covered pixels and at pixels close to them, and 0 elsewhere."""
    reach = max(alpha.shape) // 40
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2)
    return cv2.dilate(((alpha > 0.02) & (alpha < 0.98)).astype(np.uint8), disc)
