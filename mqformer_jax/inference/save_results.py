"""Write the results of `mqformer predict`: an overlay, a COCO JSON file, a panoptic PNG, a cut-out and mask PNGs."""

from __future__ import annotations

import colorsys
import dataclasses
import os
import re

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from mqformer_jax.files import atomic_write, write_json
from mqformer_jax.input.record import encode_rle
from mqformer_jax.segments import Segments
from mqformer_jax.tasks import TASKS
from mqformer_jax.visualization.overlays import overlay

LARGEST = 2048  # longest side of an overlay, pixels; masks keep the image's size


def save(
    stem: str, image: UInt8[np.ndarray, "h w 3"], segments: Segments, task: str, source: str, masks: bool = False
) -> list[str]:
    """Write the results of an image and return the paths of the files. Each file is written atomically.

    The files are STEM.json, STEM_overlay.png and, depending on the task, STEM_panoptic.png or STEM_cutout.png. stem:
    path without extension. source: path of the image, for the JSON file. masks: also write a PNG file for each mask.
    """
    written = [f"{stem}.json"]
    write_json(written[0], to_json(segments, task, source, image.shape[:2]))
    written.append(_png(f"{stem}_overlay.png", overlay(*_shrunk(image, segments))))
    if segments.panoptic is not None:
        written.append(_png(f"{stem}_panoptic.png", panoptic_image(segments.panoptic, len(segments))))
    if TASKS[task].soft:
        written.append(_png(f"{stem}_cutout.png", cutout(image, segments)))
    if masks:
        os.makedirs(f"{stem}_masks", exist_ok=True)
        for i, prompt in enumerate(segments.prompt_ids):
            name = re.sub(r"\W+", "_", segments.texts[prompt]).strip("_")[:40]
            mask = segments.masks[i] if segments.alphas is None else segments.alphas[i]
            written.append(_png(f"{stem}_masks/{i + 1:03d}_{name}.png", (255 * mask).round().astype(np.uint8)))
    return written


def to_json(segments: Segments, task: str, source: str, size: tuple[int, int]) -> dict:
    """Return the contents of the JSON file: the image, the task, the prompts, and the segments in COCO's result format.

    Boxes are x, y, width, height in pixels, masks are compressed run-length codes, and `id` is the segment's value in
    the panoptic PNG. source: path of the image. size: height and width.
    """
    found = []
    for i, prompt in enumerate(segments.prompt_ids):
        x0, y0, x1, y1 = map(float, segments.boxes[i])
        rle = {"size": list(size), "counts": encode_rle(segments.masks[i]).decode()}
        found.append(
            {
                "id": i + 1,
                "text": segments.texts[prompt],
                "prompt": int(prompt),
                "score": round(float(segments.scores[i]), 4),
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                "area": int(np.count_nonzero(segments.masks[i])),
                "segmentation": rle,
                "query": int(segments.query_ids[i]),
            }
        )
    return {
        "image": source,
        "height": size[0],
        "width": size[1],
        "task": task,
        "prompts": segments.texts,
        "segments": found,
    }


def cutout(image: UInt8[np.ndarray, "h w 3"], segments: Segments) -> UInt8[np.ndarray, "h w 4"]:
    """Return the image as RGBA with the segments on a transparent background.

    The alpha channel is the maximum of the mattes if there are any, else of the masks.
    """
    alpha: Float[np.ndarray, "h w"] = np.zeros(image.shape[:2], np.float32)
    for mask in segments.masks if segments.alphas is None else segments.alphas:
        np.maximum(alpha, mask, out=alpha)
    return np.dstack([image, (255 * alpha).round().astype(np.uint8)])


def _shrunk(image: np.ndarray, segments: Segments) -> tuple[np.ndarray, Segments]:
    scale = LARGEST / max(image.shape[:2])
    if scale >= 1:
        return image, segments
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    masks = np.zeros((len(segments), size[1], size[0]), bool)
    for small, mask in zip(masks, segments.masks):
        small[...] = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST).view(bool)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), dataclasses.replace(
        segments, masks=masks, boxes=segments.boxes * scale
    )


def panoptic_image(ids: Int[np.ndarray, "h w"], count: int) -> Image.Image:
    """Return a PNG image whose pixel values are segment ids; pixels without a segment are 0 (black).

    With up to 255 segments (`count`), the image has a palette, so that viewers show colors. With more segments, it is
    16-bit gray.
    """
    if count > 255:
        return Image.fromarray(ids.astype(np.uint16))
    image = Image.fromarray(ids.astype(np.uint8), mode="P")
    # Steps of the golden angle around the color circle give successive ids different hues.
    colors = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, 0.95) for i in range(count)]
    image.putpalette([0, 0, 0, *(round(255 * channel) for color in colors for channel in color)])
    return image


def _png(path: str, pixels: np.ndarray | Image.Image) -> str:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", compress_level=3)
    return path
