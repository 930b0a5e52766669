"""What `mqformer predict` leaves of an image: a picture, COCO json, index and mask PNGs, cut-outs."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from mqformer_jax.input.record import encode_rle
from mqformer_jax.segments import Segments
from mqformer_jax.visualization.overlays import overlay

LARGEST = 2048  # pixels of an overlay's longer side: it is to be looked at, the masks keep the image's size
REGIONS = ("referring", "foreground", "matting")  # tasks whose answer can be cut out


def save(
    stem: str, image: UInt8[np.ndarray, "h w 3"], segments: Segments, task: str, source: str, masks: bool = False
) -> list[str]:
    """Writes STEM.json, STEM_overlay.png, and STEM_panoptic.png or STEM_cutout.png where the task has them; with
    `masks` a PNG each.

    Returns the paths. A file is there whole or not at all.
    """
    written = [_write(f"{stem}.json", json.dumps(to_json(segments, task, source, image.shape[:2]), indent=1).encode())]
    written.append(_png(f"{stem}_overlay.png", overlay(*_shrunk(image, segments))))
    if segments.panoptic is not None:
        kind = np.uint8 if len(segments) < 256 else np.uint16
        written.append(_png(f"{stem}_panoptic.png", segments.panoptic.astype(kind)))
    if task in REGIONS:
        written.append(_png(f"{stem}_cutout.png", cutout(image, segments)))
    if masks:
        os.makedirs(f"{stem}_masks", exist_ok=True)
        for i, prompt in enumerate(segments.prompt_ids):
            name = re.sub(r"\W+", "_", segments.texts[prompt]).strip("_")[:40]
            mask = segments.masks[i] if segments.alphas is None else segments.alphas[i]
            written.append(_png(f"{stem}_masks/{i + 1:03d}_{name}.png", (255 * mask).round().astype(np.uint8)))
    return written


def to_json(segments: Segments, task: str, source: str, size: tuple[int, int]) -> dict:
    """The segments in the words of COCO results: boxes x, y, width, height in pixels, masks as compressed run-length
    codes.

    `id` is the segment's value in the panoptic PNG.
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
    """What the prompts named on a transparent ground: by their mattes where there are any, else by their masks."""
    covered = segments.masks if segments.alphas is None else segments.alphas
    alpha: Float[np.ndarray, "h w"] = np.zeros(image.shape[:2], np.float32)
    for one in covered:
        np.maximum(alpha, one, out=alpha)
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


def _png(path: str, pixels: np.ndarray) -> str:
    with open(path + ".tmp", "wb") as f:
        Image.fromarray(pixels).save(f, format="PNG", compress_level=3)
    os.replace(path + ".tmp", path)
    return path


def _write(path: str, data: bytes) -> str:
    with open(path + ".tmp", "wb") as f:
        f.write(data)
    os.replace(path + ".tmp", path)
    return path
