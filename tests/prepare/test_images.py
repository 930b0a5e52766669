"""Image files of every kind: what a record keeps is decoded in training as PIL decodes the file."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from mqformer_jax.input.record import Record
from mqformer_jax.prepare.formats.images import Unusable, read_image, read_index

SMOOTH = cv2.resize(np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8), (30, 20))
RGB = Image.fromarray(SMOOTH)
OTHER = ImageOps.invert(RGB)
TURNED = Image.Exif()
TURNED[0x0112] = 6
WAYS = {
    "progressive.jpg": (RGB, {"progressive": True}),
    "gray.jpg": (RGB.convert("L"), {}),
    "cmyk.jpg": (RGB.convert("CMYK"), {}),
    "turned.jpg": (RGB, {"exif": TURNED}),
    "gray.png": (RGB.convert("L"), {}),
    "one_bit.png": (RGB.convert("1"), {}),
    "palette.png": (RGB.quantize(50), {"transparency": 3}),
    "rgba.png": (Image.fromarray(np.dstack([SMOOTH, SMOOTH[..., 0]])), {}),
    "animated.png": (RGB, {"save_all": True, "append_images": [OTHER]}),
    "turned.png": (RGB, {"exif": TURNED}),
    "animated.webp": (RGB, {"lossless": True, "save_all": True, "append_images": [OTHER]}),
    "turned.webp": (RGB, {"lossless": True, "exif": TURNED}),
    "pages.tif": (RGB, {"save_all": True, "append_images": [OTHER], "compression": "tiff_lzw"}),
    "cmyk.tif": (RGB.convert("CMYK"), {}),
    "turned.tif": (RGB, {"exif": TURNED}),
    "plain.bmp": (RGB, {}),
    "animated.gif": (RGB, {"save_all": True, "append_images": [OTHER]}),
}


def _decoded(path):
    image = read_image(str(path))
    assert image.data == path.read_bytes() or path.suffix not in (".jpg", ".png")
    return Record("x", *image).decode_image()


@pytest.mark.parametrize("name", WAYS)
def test_kept_image_decodes_the_same_as_with_pil(tmp_path, name):
    image, options = WAYS[name]
    image.save(tmp_path / name, **options)
    truth = np.array(ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB"))
    assert truth.shape[:2] == ((30, 20) if "turned" in name else (20, 30))
    np.testing.assert_allclose(_decoded(tmp_path / name).astype(int), truth, atol=1 if "cmyk" in name else 0)


def test_16_bit_images_keep_their_upper_8_bits(tmp_path):
    deep = SMOOTH.astype(np.uint16) * 256 + 99
    cv2.imwrite(str(tmp_path / "rgb.png"), deep[..., ::-1])
    Image.fromarray(np.ascontiguousarray(deep[..., 0])).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(_decoded(tmp_path / "rgb.png"), SMOOTH)
    np.testing.assert_array_equal(_decoded(tmp_path / "gray.png"), SMOOTH[..., :1].repeat(3, -1))


def test_image_12000_pixels_wide_is_read(tmp_path):
    Image.linear_gradient("L").resize((12_000, 40)).save(tmp_path / "wide.jpg")
    assert _decoded(tmp_path / "wide.jpg").shape == (40, 12_000, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_image_file_is_rejected(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(buffer, kind)
    for part in (0.0, 0.3, 0.99):
        (tmp_path / "cut").write_bytes(buffer.getvalue()[: int(part * buffer.tell())])
        with pytest.raises(Unusable, match="truncated|cannot be decoded"):
            read_image(str(tmp_path / "cut"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_image_header_with_too_many_pixels_is_rejected(tmp_path, kind):
    RGB.save(tmp_path / "bomb", kind)
    data = (tmp_path / "bomb").read_bytes()
    at = data.index(b"IHDR") + 4 if kind == "PNG" else data.index(b"\xff\xc0") + 5
    sides = struct.pack(">II" if kind == "PNG" else ">HH", 20_000, 20_000)
    data = data[:at] + sides + data[at + len(sides) :]
    if kind == "PNG":
        data = data[: at + 13] + struct.pack(">I", zlib.crc32(data[at - 4 : at + 13])) + data[at + 17 :]
    (tmp_path / "bomb").write_bytes(data)
    with pytest.raises(Unusable, match="image has more than 178,956,970 pixels"):
        read_image(str(tmp_path / "bomb"))


@pytest.mark.parametrize("read", [read_image, read_index])
def test_12_byte_png_is_rejected_as_truncated(tmp_path, read):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nIEND")
    with pytest.raises(Unusable, match="truncated"):
        read(str(tmp_path / "a.png"))
