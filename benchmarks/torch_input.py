"""A typical torch DataLoader for COCO panoptic and referring expressions, for comparison in benchmarks/input.py.

The panoptic part takes the steps of Mask2Former's mapper for COCO panoptic with detectron2's transforms. Pillow decodes
the files, and flips are views. The full image and the full PNG of segment ids are resized, then cropped or padded to
the canvas. Each mask is computed by comparing the ids with the id of a segment, and boxes are computed from the masks.

The referring part decodes polygons and run-length codes with pycocotools and scales the full image to the canvas. Both
parts tokenize their prompts. The examples of a batch stay a list, as in detectron2, so images are padded to the canvas,
but the numbers of masks and prompts are not padded. detectron2's deep copies of annotations and its second copy of each
mask are left out.

With `tuned`, the loader is optimized: it uses OpenCV instead of Pillow, crops before it resizes, and stores ids in one
byte.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as rle_codec

PAD, VOID = 128, 255
OTHER_SIDE = {"left": "right", "right": "left"}

Size = tuple[int, int]  # height, width
Tokenizer = Callable[[Sequence[str]], np.ndarray]
Example = dict[str, torch.Tensor]


def loader(
    datasets: Sequence[Any], order: Iterable[tuple[int, int]], batch_size: int, workers: int
) -> Iterable[list[Example]]:
    """Return an iterable over batches of a mixture.

    order: the indices of the data set and of the image of each example. workers: number of worker processes.
    """
    cv2.setNumThreads(0)  # as usual with worker processes
    return torch.utils.data.DataLoader(Mixed(datasets), batch_size, sampler=order, collate_fn=list, num_workers=workers)


class Mixed(torch.utils.data.Dataset):
    """Several data sets as one. Its indices are pairs: the index of the data set, and the index of the image in it."""

    def __init__(self, datasets: Sequence[Any]):
        self._datasets = datasets

    def __getitem__(self, place: tuple[int, int]) -> Example:
        return self._datasets[place[0]][place[1]]


class Images:
    """Base class of both data sets.

    folder: the folder "coco". names: file names of the images. data: `config.data` of a recipe. tuned: see the module.
    """

    def __init__(self, folder: str, names: Sequence[str], data: Mapping[str, Any], tokenizer: Tokenizer, tuned: bool):
        self._paths = [os.path.join(folder, "images", name) for name in names]
        self._canvas: Size = tuple(data["canvas"])
        self._data, self._tokenizer, self._tuned = data, tokenizer, tuned
        self._read, self._resize, self._boxes = (
            (cv2_read, cv2_resize, cv2_boxes) if tuned else (pil_read, pil_resize, torch_boxes)
        )

    def __len__(self) -> int:
        return len(self._paths)


class Panoptic(Images):
    """COCO panoptic with large-scale jitter and flips."""

    def __init__(self, folder: str, names: Sequence[str], *rest: Any):
        super().__init__(folder, names, *rest)
        content = _json(os.path.join(folder, "panoptic", "train.json"))
        of_image = {a["image_id"]: a for a in content["annotations"]}
        ids = {entry["file_name"]: entry["id"] for entry in content["images"]}
        self._pngs = [os.path.join(folder, "panoptic", "train", of_image[ids[name]]["file_name"]) for name in names]
        self._segments = [[s for s in of_image[ids[name]]["segments_info"] if not s["iscrowd"]] for name in names]
        self._classes = {c["id"]: c["name"].replace("-", " ") for c in content["categories"]}

    def __getitem__(self, index: int) -> Example:
        image, rgb, segments = self._read(self._paths[index]), self._read(self._pngs[index]), self._segments[index]
        if np.random.random() < self._data["flip"]:
            image, rgb = image[:, ::-1], rgb[:, ::-1]
        scale = np.random.uniform(*self._data["scale_range"])
        if self._tuned:
            (top, left, height, width), size = _window(image, self._canvas, scale)
            image, rgb = image[top : top + height, left : left + width], rgb[top : top + height, left : left + width]
            numbers = _padded(self._resize(_numbered(_ids(rgb), segments), size, False), self._canvas, VOID)
            masks = numbers == np.arange(len(segments), dtype=np.uint8)[:, None, None]
            image = _padded(self._resize(image, size, True), self._canvas, PAD)
        else:
            size = _fitted(image, self._canvas, scale)
            corner = [int(np.random.random() * max(0, side - room)) for side, room in zip(size, self._canvas)]
            cut = tuple(slice(start, start + room) for start, room in zip(corner, self._canvas))
            image = _padded(self._resize(image, size, True)[cut], self._canvas, PAD)
            ids = _ids(_padded(self._resize(rgb, size, False)[cut], self._canvas, VOID))
            masks = np.stack([ids == s["id"] for s in segments]) if segments else np.zeros((0, *self._canvas), bool)
        masks = torch.from_numpy(masks)
        prompts = np.random.permutation(list(self._classes)).tolist()
        return dict(
            image=_channels_first(image),
            masks=masks,
            boxes=self._boxes(masks),
            prompts=torch.tensor([prompts.index(s["category_id"]) for s in segments]),
            tokens=torch.from_numpy(self._tokenizer(self._worded(prompts))),
        )

    def _worded(self, classes: Sequence[int]) -> list[str]:
        templates = self._data["templates"]
        return [
            templates[t].format(self._classes[c])
            for c, t in zip(classes, np.random.randint(len(templates), size=len(classes)))
        ]


class Referring(Images):
    """Referring expressions on full images. Each target has a box and, if it is labeled, a mask."""

    def __init__(self, folder: str, names: Sequence[str], *rest: Any):
        super().__init__(folder, names, *rest)
        content = _json(os.path.join(folder, "referring.json"))
        ids = {entry["file_name"]: entry["id"] for entry in content["images"]}
        self._refs = [
            [r for r in content["refs"] if r["image_id"] == ids[name] and not r.get("uncertain")] for name in names
        ]

    def __getitem__(self, index: int) -> Example:
        image, refs = self._read(self._paths[index]), self._refs[index]
        texts = [ref["sentences"][np.random.randint(len(ref["sentences"]))] for ref in refs]
        (height, width), size = image.shape[:2], _fitted(image, self._canvas, 1.0)
        found = [ref for ref in refs if not ref["no_target"]]
        masks = [decode(ref["segmentation"], height, width) for ref in found if ref.get("segmentation")]
        boxes = torch.tensor([ref["bbox"] for ref in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if np.random.random() < self._data["flip"]:
            image, masks, texts = image[:, ::-1], [mask[:, ::-1] for mask in masks], [mirrored(text) for text in texts]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        stack = torch.zeros((len(masks), *self._canvas), dtype=torch.bool)
        for into, mask in zip(stack.numpy(), masks):
            into[: size[0], : size[1]] = self._resize(mask, size, False)
        return dict(
            image=_channels_first(_padded(self._resize(image, size, True), self._canvas, PAD)),
            masks=stack,
            boxes=boxes * torch.tensor([size[1] / width, size[0] / height] * 2),
            prompts=torch.tensor([i for i, ref in enumerate(refs) if not ref["no_target"]]),
            tokens=torch.from_numpy(self._tokenizer(texts)),
        )


def mirrored(text: str) -> str:
    """Swap "left" and "right" in a text."""
    return re.sub(r"\b(left|right)", lambda side: OTHER_SIDE[side[0]], text)


# ---------------------------------------------------------------- reading, resizing and boxes, typical and tuned


def pil_read(path: str) -> np.ndarray:
    """Read an image file as uint8 [h, w, 3] with Pillow."""
    with open(path, "rb") as f:
        return np.asarray(ImageOps.exif_transpose(Image.open(f)).convert("RGB"))


def cv2_read(path: str) -> np.ndarray:
    """Read an image file as uint8 [h, w, 3] with OpenCV."""
    return cv2.imread(path, cv2.IMREAD_COLOR_RGB)


def pil_resize(pixels: np.ndarray, size: Size, smooth: bool) -> np.ndarray:
    """Resize uint8 [h, w] or [h, w, 3] with Pillow. smooth: bilinear instead of nearest-neighbor interpolation."""
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], how))


def cv2_resize(pixels: np.ndarray, size: Size, smooth: bool) -> np.ndarray:
    """Return the same as `pil_resize`, with OpenCV."""
    how = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST_EXACT  # INTER_NEAREST shifts by half a pixel
    return cv2.resize(np.ascontiguousarray(pixels), size[::-1], interpolation=how)


def torch_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the tight boxes (x0, y0, x1, y1) of masks bool [n, h, w], or zeros for empty masks."""
    boxes = torch.zeros(len(masks), 4)
    for box, columns, rows in zip(boxes, masks.any(1), masks.any(2)):
        x, y = columns.nonzero(), rows.nonzero()
        if len(x):
            box[:] = torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1])
    return boxes


def cv2_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the same as `torch_boxes`, with OpenCV."""
    boxes = torch.tensor(
        [cv2.boundingRect(mask.view(np.uint8)) for mask in masks.numpy()], dtype=torch.float32
    ).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decode a COCO segmentation to uint8 [height, width]: polygons, or run-length codes, compressed or not."""
    if isinstance(segmentation, list):
        return rle_codec.decode(rle_codec.merge(rle_codec.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        segmentation = rle_codec.frPyObjects(segmentation, height, width)
    return rle_codec.decode(segmentation)


# ---------------------------------------------------------------- segment ids, sizes and windows


def _ids(rgb: np.ndarray) -> np.ndarray:
    """Return the segment id of each pixel of a panoptic PNG."""
    rgb = rgb.astype(np.int32)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def _numbered(ids: np.ndarray, segments: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the index of the segment of each pixel, uint8, and VOID for pixels without a segment."""
    numbers = np.full(ids.shape, VOID, np.uint8)
    for number, segment in enumerate(segments):
        numbers[ids == segment["id"]] = number
    return numbers


def _fitted(image: np.ndarray, canvas: Size, scale: float) -> Size:
    """Return the size of an image after it is resized. With `scale` 1, it fits the canvas."""
    height, width = image.shape[:2]
    ratio = scale * min(canvas[0] / height, canvas[1] / width)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def _window(image: np.ndarray, canvas: Size, scale: float) -> tuple[tuple[int, int, int, int], Size]:
    """Return a random window of an image (top, left, height, width), and the window's size after resizing.

    scale: see `_fitted`.
    """
    full = _fitted(image, canvas, scale)
    size = tuple(min(side, room) for side, room in zip(full, canvas))
    sides = [max(1, round(side * seen / whole)) for side, seen, whole in zip(image.shape, size, full)]
    corner = [np.random.randint(side - part + 1) for side, part in zip(image.shape, sides)]
    return (*corner, *sides), size


def _padded(pixels: np.ndarray, canvas: Size, value: int) -> np.ndarray:
    """Pad the pixels to the canvas, to the right and below. value: of the padding."""
    short = [(0, room - side) for room, side in zip(canvas, pixels.shape)]
    return (
        np.pad(pixels, short + [(0, 0)] * (pixels.ndim - 2), constant_values=value) if any(map(any, short)) else pixels
    )


def _channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


@functools.cache
def _json(path: str) -> Any:
    with open(path) as f:
        return json.load(f)
