"""Image files as people have them, and what is none."""

import io
import types

import numpy as np
import pytest
from PIL import Image

from mqformer_jax import image_io
from mqformer_jax.image_io import find_images, read_image

RED = np.full((6, 9, 3), (250, 10, 20), np.uint8)


def saved(tmp_path, name, image, **options):
    path = str(tmp_path / name)
    image.save(path, **options)
    return path


def test_exif_orientation_is_applied(tmp_path):
    pixels = RED.copy()
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    read = read_image(saved(tmp_path, "a.png", Image.fromarray(pixels), exif=exif))
    assert read.shape == (9, 6, 3) and (read[0, -1] == 255).all()


@pytest.mark.parametrize("mode, expected", [("L", 82), ("P", None), ("1", None), ("CMYK", None)])
def test_every_mode_becomes_rgb(tmp_path, mode, expected):
    read = read_image(saved(tmp_path, "a.tif", Image.fromarray(RED).convert(mode)))
    assert read.shape == RED.shape and read.dtype == np.uint8
    if expected:
        assert np.abs(read.astype(int) - expected).max() <= 2


def test_16_bit_image_is_reduced_to_8_bits(tmp_path):
    read = read_image(saved(tmp_path, "a.png", Image.fromarray(np.full((4, 5), 32896, np.uint16))))
    assert read.shape == (4, 5, 3) and (read == 128).all()


def test_transparent_pixels_become_white(tmp_path):
    pixels = np.dstack([RED, np.zeros((6, 9), np.uint8)])
    assert (read_image(saved(tmp_path, "a.png", Image.fromarray(pixels))) == 255).all()


def test_animation_is_read_as_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 4), color) for color in ("blue", "red")]
    read = read_image(saved(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert (read == (0, 0, 255)).all()


def test_invalid_or_truncated_image_raises_one_line_error(tmp_path):
    (tmp_path / "notes.jpg").write_text("not a picture")
    whole = saved(
        tmp_path, "whole.jpg", Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    )
    (tmp_path / "half.jpg").write_bytes(open(whole, "rb").read()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("notes.jpg", "half.jpg", "empty.png"):
        with pytest.raises(ValueError, match=name) as error:
            read_image(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_image_with_too_many_pixels_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(image_io, "MAX_PIXELS", 40)
    with pytest.raises(ValueError, match="more than 40 pixels"):
        read_image(saved(tmp_path, "a.png", Image.fromarray(RED)))


def test_find_images_expands_folders_and_patterns_without_duplicates(tmp_path):
    (tmp_path / "deep").mkdir()
    a, b = saved(tmp_path, "a.png", Image.fromarray(RED)), saved(tmp_path / "deep", "b.jpg", Image.fromarray(RED))
    (tmp_path / "notes.txt").write_text("")
    assert find_images([str(tmp_path)]) == [a, b]
    assert find_images([a, str(tmp_path / "*.png"), str(tmp_path / "**" / "*.jpg")]) == [a, b]
    (tmp_path / "none").mkdir()
    for wrong, why in (("gone.jpg", "no such file"), ("*.webp", "no file matches"), ("none", "contains no images")):
        with pytest.raises(ValueError, match=why):
            find_images([str(tmp_path / wrong)])


def piped(monkeypatch, data):
    monkeypatch.setattr(image_io, "_stdin", b"")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    return find_images(["-"])


def test_standard_input_accepts_an_image_or_a_list_of_paths(monkeypatch):
    assert piped(monkeypatch, b"a.jpg\n\nb.jpg\n") == ["a.jpg", "b.jpg"]
    file = io.BytesIO()
    Image.fromarray(RED).save(file, "PNG")
    (path,) = piped(monkeypatch, file.getvalue())
    assert (read_image(path) == RED).all()
    with pytest.raises(ValueError, match="standard input is empty"):
        piped(monkeypatch, b"")
