"""Image files as people have them: any format and mode, turned by EXIF, in folders, by patterns, from a pipe."""

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
MAX_PIXELS = 400_000_000  # a photo of 20,000 x 20,000; what claims more is damaged or a bomb
STDIN = "-"


def find_images(given: Sequence[str]) -> list[str]:
    """The image files that paths, folders, patterns and "-" (standard input: an image, or a path a line) name, each
    once, in order.

    Raises ValueError in one line for a path that is not there, a folder without images and a pattern that fits nothing.
    """
    found: list[str] = []
    for name in given:
        if name == STDIN:
            found += _piped()
        elif os.path.isdir(name):
            inside = sorted(
                os.path.join(d, f) for d, _, files in os.walk(name) for f in files if f.lower().endswith(ENDINGS)
            )
            found += inside or _nothing(name, f"the folder holds no image ({', '.join(ENDINGS)})")
        elif os.path.exists(name):
            found.append(name)
        elif glob.has_magic(name):
            found += sorted(glob.glob(name, recursive=True)) or _nothing(name, "nothing fits this pattern")
        else:
            _nothing(name, "there is no such file or folder")
    return list(dict.fromkeys(found))


def _nothing(name: str, why: str) -> list[str]:
    raise ValueError(f"--image={name}: {why}.")


def _piped() -> list[str]:
    """ "-" itself where standard input is an image, else the paths on its lines."""
    _keep_stdin()
    try:
        return [line.strip() for line in _stdin.decode().splitlines() if line.strip()] or _nothing(
            STDIN, "standard input is empty"
        )
    except UnicodeDecodeError:
        return [STDIN]


_stdin = b""


def _keep_stdin() -> None:
    global _stdin  # it can be read once only, and is looked at twice
    _stdin = _stdin or sys.stdin.buffer.read()


def read_image(path: str) -> UInt8[np.ndarray, "h w 3"]:
    """The picture as it is meant to be seen, RGB: turned as EXIF says, grey and palettes spread, transparency over
    white, 16 bits cut to 8, of an animation the first frame. Raises ValueError in one line for what is no image, or is
    cut short.
    """
    file = io.BytesIO(_stdin) if path == STDIN else path
    name = "standard input" if path == STDIN else path
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it, and refuses twice as much
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that Pillow can read.") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: more than {MAX_PIXELS:,} pixels.") from None
    except (OSError, SyntaxError, ValueError, EOFError) as e:  # Pillow's many ways to say that a file is damaged
        raise ValueError(
            f"{name}: cannot be decoded ({str(e).splitlines()[0] if str(e) else type(e).__name__})."
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
