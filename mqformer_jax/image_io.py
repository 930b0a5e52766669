"""Find image files in folders, by glob patterns and on standard input, and read them as RGB pixels."""

from __future__ import annotations

import glob
import io
import os
import sys
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# `mqformer predict` writes STEM.json and STEM with these endings
RESULTS = ("_overlay.png", "_panoptic.png", "_cutout.png")
MAX_PIXELS = 400_000_000  # 20,000 x 20,000; a larger image is a damaged file or a decompression bomb
STDIN = "-"


def find_images(given: Sequence[str]) -> list[str]:
    """Return the image files that paths, folders, glob patterns and "-" stand for, in order and without duplicates.

    "-" is standard input, which holds an image or one path per line. Raises ValueError if a path does not exist, a
    folder contains no images, a pattern has no matches or standard input is empty.
    """
    found: list[str] = []
    for name in given:
        if name == STDIN:
            found += _piped()
        elif os.path.isdir(name):
            inside = sorted(
                os.path.join(d, f)
                for d, _, files in os.walk(name)
                for f in files
                if f.lower().endswith(ENDINGS) and not _is_result(d, f)
            )
            found += inside or _nothing(name, f"the folder contains no images ({', '.join(ENDINGS)}); give another one")
        elif os.path.exists(name):
            found.append(name)
        elif glob.has_magic(name):
            found += sorted(glob.glob(name, recursive=True)) or _nothing(
                name, "no file matches this pattern; correct it"
            )
        else:
            _nothing(name, "no such file or folder; check the path")
    return list(dict.fromkeys(found))


def _is_result(folder: str, file: str) -> bool:
    """Return whether the file is an output of `mqformer predict`, which writes a JSON file beside each output."""
    stems = [os.path.join(folder, file.removesuffix(end)) for end in RESULTS if file.endswith(end)]
    if folder.endswith("_masks"):
        stems.append(folder.removesuffix("_masks"))
    return any(os.path.exists(f"{stem}.json") for stem in stems)


def _nothing(name: str, why: str) -> list[str]:
    raise ValueError(f"--image={name}: {why}.")


def _piped() -> list[str]:
    """Return ["-"] if standard input is an image, else the paths on its lines."""
    _keep_stdin()
    try:
        return [line.strip() for line in _stdin.decode().splitlines() if line.strip()] or _nothing(
            STDIN, "standard input is empty; pipe an image to it, or one path per line"
        )
    except UnicodeDecodeError:
        return [STDIN]


_stdin = b""


def _keep_stdin() -> None:
    global _stdin  # standard input can be read only once, but `_piped` and `read_image` both need it
    _stdin = _stdin or sys.stdin.buffer.read()


def read_image(path: str) -> UInt8[np.ndarray, "h w 3"]:
    """Return the RGB pixels of an image as viewers display it. path: of a file, or "-" for standard input.

    Applies EXIF rotation, expands gray and palette images, blends transparency with white, reduces 16 bits to 8, and
    takes the first frame of an animation. Raises ValueError if the file is truncated, too large or not an image.
    """
    file = io.BytesIO(_stdin) if path == STDIN else path
    name = "standard input" if path == STDIN else path
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this and fails above twice this
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that Pillow can read; convert it to JPEG or PNG.") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: the image has more than {MAX_PIXELS:,} pixels; make it smaller first.") from None
    except (OSError, SyntaxError, ValueError, EOFError) as e:  # Pillow's errors for damaged files
        raise ValueError(
            f"{name}: cannot be decoded ({str(e).splitlines()[0] if str(e) else type(e).__name__}); "
            "the file may be damaged: download or convert it again."
        ) from None


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        top = 65535 if image.mode.startswith("I") and values.max(initial=0) > 255 else 255
        return np.repeat(np.clip(values * 255 / top, 0, 255).round().astype(np.uint8)[..., None], 3, -1)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
