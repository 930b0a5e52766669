"""Read and check image and mask files, so that no truncated file gets into a record."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image

JPEG = (".jpg", ".jpeg")
# OpenCV cannot read .heic files. They are listed so that they are counted as dropped.
EXTENSIONS = (
    *JPEG,
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".heic",
)
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_CHROMA = 32  # the channels of a gray image differ by at most this after JPEG compression
MOST_PIXELS = 178_956_970  # Pillow's limit: without one, a small file may unpack to any size

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the report lists damaged files by name
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


class Unusable(ValueError):
    """Raised for a file or an annotation that cannot be used.

    The message gives the reason without the name of the file, so that equal reasons can be counted together.
    """


class Image(NamedTuple):
    """Bytes of a JPEG or PNG file; height and width in pixels as decoded, after EXIF rotation."""

    data: bytes
    height: int
    width: int


def read_image(path: str) -> Image:
    """Read an image file. The bytes of a JPEG or PNG file stay unchanged; other formats are converted to PNG.

    Raises Unusable if the file is missing, truncated or damaged.
    """
    data = _read(path, "image")
    pixels = _decode(data, cv2.IMREAD_COLOR, "image")
    if not data.startswith((_JPEG, _PNG)):
        data = cv2.imencode(".png", pixels)[1].tobytes()
    return Image(data, *pixels.shape[:2])


def read_index(path: str, colors: Mapping[int, int] | None = None) -> np.ndarray:
    """Read a mask whose pixel values stand for classes, as integers [h, w].

    The file may be gray, gray saved as RGB, or have a palette, whose indices are then the values. colors: {color: mask
    value} for color masks, where a color is red << 16 | green << 8 | blue; a color c that is not listed becomes -1 - c.
    Raises Unusable if the file is missing or damaged, if it is a JPEG, or if it is a color image and `colors` is empty.
    """
    data = _read_exact(path)
    depth = 8
    if data.startswith(_PNG) and data[25] == 3:
        data, depth = _palette_to_gray(data), data[24]
    elif data.startswith(_PNG) and data[24] == 1:
        depth = 1  # one bit per pixel: PIL reads 0 and 1, OpenCV 0 and 255
    mask = _decode(data, cv2.IMREAD_UNCHANGED)
    if mask.ndim == 3 and mask.shape[2] == 4 and (mask[..., 3] == 255).all():
        mask = mask[..., :3]
    if colors and mask.shape[2:] == (3,) and mask.dtype == np.uint8:
        return _by_color(mask, colors)
    if mask.ndim == 3:
        if mask.shape[2] > 3 or (mask != mask[..., :1]).any():
            mend = "" if colors else "; give a class list with colors"
            raise Unusable(f"mask is a color image, not an index PNG{mend}")
        mask = mask[..., 0]
    return mask // (255 // (2**depth - 1)) if depth < 8 else mask


def read_gray(path: str, kind: str = "mask") -> np.ndarray:
    """Read a matte or a black and white mask as uint8 [h, w]: the alpha channel if it is not constant, else gray.

    Raises Unusable if the file is missing or damaged, or if it is a color image.
    """
    data = _read(path, kind)
    # UNCHANGED keeps the alpha channel but ignores EXIF. A JPEG has no alpha channel, but may have EXIF.
    pixels = _decode(data, cv2.IMREAD_COLOR if data.startswith(_JPEG) else cv2.IMREAD_UNCHANGED, kind)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise Unusable(f"{kind} has {pixels.dtype} pixels; save it with 8 or 16 bits per channel")
    if pixels.ndim == 2:
        return pixels
    blue, green, red, *alpha = cv2.split(pixels)
    if alpha and alpha[0].min() < alpha[0].max():
        return alpha[0]
    if max(cv2.absdiff(blue, green).max(), cv2.absdiff(green, red).max()) > _CHROMA:
        raise Unusable(f"{kind} is a color image, not black and white")
    return cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2GRAY)


def read_ids(path: str) -> np.ndarray:
    """Read the segment ids of a COCO panoptic PNG as int32 [h, w]: R + 256 G + 65536 B.

    Raises Unusable if the file is missing or damaged, or if it is a JPEG.
    """
    bgr = _decode(_read_exact(path), cv2.IMREAD_COLOR).astype(np.int32)
    return bgr[..., 2] + 256 * bgr[..., 1] + 65536 * bgr[..., 0]


def read_channels(path: str, count: int) -> np.ndarray:
    """Read a PNG of `count` (3 or 4) 8-bit channels as uint8 [h, w, count]: R, G, B, A.

    Raises Unusable if the file is missing or damaged, or if it has other channels.
    """
    pixels = _decode(_read_exact(path), cv2.IMREAD_UNCHANGED)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != count:
        raise Unusable(f"mask does not have {count} 8-bit channels")
    return pixels[..., [2, 1, 0, 3][:count]]


def same_size(mask: np.ndarray, image: Image, kind: str = "mask") -> np.ndarray:
    """Return the mask unchanged. Raises Unusable if its size differs from the image's."""
    if mask.shape != (image.height, image.width):
        turned = " (rotated by EXIF)" if mask.shape == (image.width, image.height) else ""
        raise Unusable(f"{kind} size differs from its image{turned}")
    return mask


def _read(path: str, kind: str) -> bytes:
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError:
        raise Unusable(f"{kind} file is missing") from None
    # OpenCV fills the missing part of a truncated file with gray. A complete JPEG has an end marker after
    # the start of its last scan. The data of a scan cannot contain one; an earlier end marker belongs to a thumbnail.
    cut_jpeg = data.startswith(_JPEG) and data.find(b"\xff\xd9", max(data.rfind(b"\xff\xda"), 0)) < 0
    if not data or cut_jpeg or (data.startswith(_PNG) and data.find(b"IEND", max(33, len(data) - 64)) < 0):
        raise Unusable(f"{kind} file is truncated")
    return data


def _read_exact(path: str) -> bytes:
    """Return the bytes of a mask file whose pixel values must be exact. Raises Unusable if it is a JPEG."""
    data = _read(path, "mask")
    if data.startswith(_JPEG):
        raise Unusable("mask is a JPEG, whose values are not exact; save masks as PNG")
    return data


def _decode(data: bytes, mode: int, kind: str = "mask") -> np.ndarray:
    if _pixels(data) > MOST_PIXELS:
        raise Unusable(f"{kind} has more than {MOST_PIXELS:,} pixels")
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise Unusable(f"{kind} cannot be decoded")
    return pixels


def _pixels(data: bytes) -> int:
    """Return the number of pixels that a file's header declares, or 0 if Pillow cannot read it."""
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return image.width * image.height
    except PIL.Image.DecompressionBombError:
        return MOST_PIXELS + 1
    except Exception:  # a damaged header or an unknown format; `_decode` lets OpenCV try
        return 0


def _palette_to_gray(data: bytes) -> bytes:
    """Convert the bytes of a palette PNG to a gray PNG, whose gray values are the palette indices.

    OpenCV can then read the indices instead of the colors. Only the color type in the header changes, and the palette
    is removed.
    """
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


def _by_color(bgr: np.ndarray, colors: Mapping[int, int]) -> np.ndarray:
    """Return the mask values of a color mask, BGR uint8 [h, w, 3], as int32 [h, w]; see `read_index`."""
    packed = bgr.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
    known = np.array(sorted(colors), np.int32)
    at = np.searchsorted(known, packed).clip(max=len(known) - 1)
    return np.where(known[at] == packed, np.array([colors[c] for c in known.tolist()], np.int32)[at], -1 - packed)


def files_by_stem(folder: str, extensions: Sequence[str] = EXTENSIONS) -> dict[str, str]:
    """Return the image files in a folder and its subfolders: {relative path without extension: full path}, sorted.

    Raises FileNotFoundError if there is no such folder, ValueError if two files differ only in their extensions.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder; check the path")
    found: dict[str, str] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = os.path.join(os.path.realpath(parent), "")  # links to a parent folder are skipped
        folders[:] = sorted(
            f for f in folders if not here.startswith(os.path.join(os.path.realpath(os.path.join(parent, f)), ""))
        )
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in extensions or name.startswith("."):  # macOS archives add "._a.jpg" files
                continue
            key = os.path.relpath(os.path.join(parent, stem), folder).replace(os.sep, "/")
            if key in found:
                other = os.path.basename(found[key])
                raise ValueError(
                    f"{os.path.join(parent, name)}: its name differs from {other} only in the extension; "
                    "remove one of the two files, or move masks to their own folder"
                )
            found[key] = os.path.join(parent, name)
    return dict(sorted(found.items()))
