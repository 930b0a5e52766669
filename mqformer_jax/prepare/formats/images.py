"""Reading image and mask files so that nothing half-read gets into a record."""

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
# .heic: to be counted, OpenCV reads none
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
_CHROMA = 32  # a grey JPEG's channels differ by less
MOST_PIXELS = 178_956_970  # the limit of Pillow: a small file may unpack to any size

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong is counted, with the name of the file
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)


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


def read_index(path: str, colours: Mapping[int, int] | None = None) -> np.ndarray:
    """An index mask as int [h, w]: grey, palette (the index, not the colour), or grey saved as RGB.

    With `colours` (red << 16 | green << 8 | blue to mask value) a mask of three channels is read by them; a colour that
    is not among them becomes its own negative less one.
    """
    data = _read_exact(path)
    depth = 8
    if data.startswith(_PNG) and data[25] == 3:
        data, depth = _palette_to_grey(data), data[24]
    elif data.startswith(_PNG) and data[24] == 1:
        depth = 1  # PIL reads 0 and 1 of it, OpenCV 0 and 255
    mask = _decode(data, cv2.IMREAD_UNCHANGED)
    if mask.ndim == 3 and mask.shape[2] == 4 and (mask[..., 3] == 255).all():
        mask = mask[..., :3]
    if colours and mask.shape[2:] == (3,) and mask.dtype == np.uint8:
        return _by_colour(mask, colours)
    if mask.ndim == 3:
        if mask.shape[2] > 3 or (mask != mask[..., :1]).any():
            mend = "" if colours else "; a class list with colours can read it"
            raise Unusable(f"mask is a colour picture, not an index PNG{mend}")
        mask = mask[..., 0]
    return mask // (255 // (2**depth - 1)) if depth < 8 else mask


def read_grey(path: str, kind: str = "mask") -> np.ndarray:
    """A matte or a black and white mask as uint8 [h, w], 0 to 255: the alpha channel if it says anything, else the grey
    value.
    """
    data = _read(path, kind)
    # UNCHANGED keeps the alpha channel, and leaves an image as EXIF would not: a JPEG has no alpha, but may have EXIF.
    pixels = _decode(data, cv2.IMREAD_COLOR if data.startswith(_JPEG) else cv2.IMREAD_UNCHANGED, kind)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise Unusable(f"{kind} cannot be decoded")
    if pixels.ndim == 2:
        return pixels
    blue, green, red, *alpha = cv2.split(pixels)
    if alpha and alpha[0].min() < alpha[0].max():
        return alpha[0]
    if max(cv2.absdiff(blue, green).max(), cv2.absdiff(green, red).max()) > _CHROMA:
        raise Unusable(f"{kind} is a colour picture, not black and white")
    return cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2GRAY)


def read_ids(path: str) -> np.ndarray:
    """The segment ids of a COCO panoptic PNG as int32 [h, w]: R + 256 G + 65536 B."""
    bgr = _decode(_read_exact(path), cv2.IMREAD_COLOR).astype(np.int32)
    return bgr[..., 2] + 256 * bgr[..., 1] + 65536 * bgr[..., 0]


def read_channels(path: str, count: int) -> np.ndarray:
    """A PNG of `count` (3 or 4) channels of 8 bit as uint8 [h, w, count]: R, G, B, A."""
    pixels = _decode(_read_exact(path), cv2.IMREAD_UNCHANGED)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != count:
        raise Unusable(f"mask has not {count} channels of 8 bit")
    return pixels[..., [2, 1, 0, 3][:count]]


def same_size(mask: np.ndarray, image: Image, kind: str = "mask") -> np.ndarray:
    """The mask itself. Raises Unusable where its size is not the image's."""
    if mask.shape != (image.height, image.width):
        turned = " (turned by EXIF)" if mask.shape == (image.width, image.height) else ""
        raise Unusable(f"{kind} has another size than its image{turned}")
    return mask


def _read(path: str, kind: str) -> bytes:
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError:
        raise Unusable(f"{kind} file is missing") from None
    # OpenCV fills what is missing of a cut file with grey. No end marker can occur inside a JPEG scan or before its
    # start.
    cut_jpeg = data.startswith(_JPEG) and data.find(b"\xff\xd9", max(data.rfind(b"\xff\xda"), 0)) < 0
    if not data or cut_jpeg or (data.startswith(_PNG) and data.find(b"IEND", max(33, len(data) - 64)) < 0):
        raise Unusable(f"{kind} file is cut short")
    return data


def _read_exact(path: str) -> bytes:
    """A mask whose pixels are numbers."""
    data = _read(path, "mask")
    if data.startswith(_JPEG):
        raise Unusable("mask is a JPEG, whose values are not exact")
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
    """How many pixels a file's head promises; 0 where Pillow does not know the format."""
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return image.width * image.height
    except PIL.Image.DecompressionBombError:
        return MOST_PIXELS + 1
    except Exception:  # whatever a damaged head leads to: OpenCV is to judge it
        return 0


def _palette_to_grey(data: bytes) -> bytes:
    """A palette PNG declared to be grey: OpenCV would turn indices into colours. IHDR loses its colour type, PLTE
    goes.
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


def _by_colour(bgr: np.ndarray, colours: Mapping[int, int]) -> np.ndarray:
    """Mask values int32 [h, w] of a colour picture, as `read_index` says."""
    packed = bgr.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
    known = np.array(sorted(colours), np.int32)
    at = np.searchsorted(known, packed).clip(max=len(known) - 1)
    return np.where(known[at] == packed, np.array([colours[c] for c in known.tolist()], np.int32)[at], -1 - packed)


def files_by_stem(folder: str, extensions: Sequence[str] = EXTENSIONS) -> dict[str, str]:
    """Image files of a folder and its sub-folders, sorted: path within the folder without extension to full path."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, str] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = os.path.join(os.path.realpath(parent), "")  # a link to a folder around it would never end
        folders[:] = sorted(
            f for f in folders if not here.startswith(os.path.join(os.path.realpath(os.path.join(parent, f)), ""))
        )
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in extensions or name.startswith("."):  # macOS packs a "._a.jpg" beside each file
                continue
            key = os.path.relpath(os.path.join(parent, stem), folder).replace(os.sep, "/")
            if key in found:
                other = os.path.basename(found[key])
                raise ValueError(
                    f"{os.path.join(parent, name)}: {other} has the same name; "
                    "remove one, or keep masks in their own folder"
                )
            found[key] = os.path.join(parent, name)
    return dict(sorted(found.items()))
