"""Reading image and mask files so that nothing half-read gets into a record."""

from __future__ import annotations

import os
import struct
import zlib
from typing import NamedTuple

import cv2
import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"


class Unusable(ValueError):
    """A file or an annotation that cannot be used; the message is the reason alone, so that reasons can be counted."""


class Image(NamedTuple):
    """Bytes of a JPEG or PNG file; height and width in pixels as decoded, after EXIF rotation."""

    data: bytes
    height: int
    width: int


def read_image(path: str) -> Image:
    """The image of a file, its bytes untouched if JPEG or PNG, else as PNG. Raises Unusable if missing or not whole."""
    data = _read(path, "image")
    pixels = _decode(data, cv2.IMREAD_COLOR, "image")
    if not data.startswith((_JPEG, _PNG)):
        data = cv2.imencode(".png", pixels)[1].tobytes()
    return Image(data, *pixels.shape[:2])


def read_index(path: str) -> np.ndarray:
    """An index mask as uint8 or uint16 [h, w]: grey, palette (the index, not the colour), or grey saved as RGB."""
    data = _read(path, "mask")
    depth = 8
    if data.startswith(_PNG) and data[25] == 3:
        data, depth = _palette_to_grey(data), data[24]
    mask = _decode(data, cv2.IMREAD_UNCHANGED)
    if mask.ndim == 3:
        if mask.shape[2] > 3 or (mask != mask[..., :1]).any():
            raise Unusable("mask is a colour picture, not an index PNG")
        mask = mask[..., 0]
    return mask // (255 // (2**depth - 1)) if depth < 8 else mask


def read_grey(path: str) -> np.ndarray:
    """A matte or a black and white mask as uint8 [h, w], 0 to 255."""
    return _decode(_read(path, "mask"), cv2.IMREAD_GRAYSCALE)


def read_ids(path: str) -> np.ndarray:
    """The segment ids of a COCO panoptic PNG as int32 [h, w]: R + 256 G + 65536 B."""
    bgr = _decode(_read(path, "mask"), cv2.IMREAD_COLOR).astype(np.int32)
    return bgr[..., 2] + 256 * bgr[..., 1] + 65536 * bgr[..., 0]


def same_size(mask: np.ndarray, image: Image) -> np.ndarray:
    """The mask itself. Raises Unusable where its size is not the image's."""
    if mask.shape != (image.height, image.width):
        raise Unusable("mask has another size than its image")
    return mask


def _read(path: str, kind: str) -> bytes:
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError:
        raise Unusable(f"{kind} file is missing") from None
    # OpenCV fills what is missing of a cut file with grey. No end marker can occur inside a JPEG scan or before its start.
    cut_jpeg = data.startswith(_JPEG) and data.find(b"\xff\xd9", max(data.rfind(b"\xff\xda"), 0)) < 0
    if not data or cut_jpeg or (data.startswith(_PNG) and b"IEND" not in data[-64:]):
        raise Unusable(f"{kind} file is cut short")
    return data


def _decode(data: bytes, mode: int, kind: str = "mask") -> np.ndarray:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise Unusable(f"{kind} cannot be decoded")
    return pixels


def _palette_to_grey(data: bytes) -> bytes:
    """A palette PNG declared to be grey: OpenCV would turn indices into colours. IHDR loses its colour type, PLTE goes."""
    out, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + struct.unpack(">I", data[at : at + 4])[0]
        name, body = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if name == b"IHDR":
            body = body[:9] + b"\0" + body[10:]
        if name not in (b"PLTE", b"tRNS", b"bKGD", b"hIST"):
            out.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
        at = end
    return b"".join(out)


def files_by_stem(folder: str) -> dict[str, str]:
    """Image files of a folder and its sub-folders, sorted: path within the folder without extension to full path."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, str] = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in EXTENSIONS:
                continue
            key = os.path.relpath(os.path.join(parent, stem), folder).replace(os.sep, "/")
            if key in found:
                raise ValueError(f"{os.path.join(parent, name)}: {os.path.basename(found[key])} has the same name; remove one of them")
            found[key] = os.path.join(parent, name)
    return dict(sorted(found.items()))
