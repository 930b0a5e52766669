"""`mqformer predict`, from files to files."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from mqformer_jax.config import base
from mqformer_jax.image_io import find_images
from mqformer_jax.inference.predict import change_settings, literal, output_stems, parse_prompts, predict_files
from mqformer_jax.inference.save_results import cutout, save
from mqformer_jax.input.record import decode_rle
from mqformer_jax.segments import Segments


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture
def segments():
    masks = np.zeros((2, 40, 60), bool)
    masks[0, :10], masks[1, 20:, 30:] = True, True
    panoptic = (masks * np.array([1, 2])[:, None, None]).sum(0).astype(np.int32)
    boxes = np.array([[0, 0, 60, 10], [30, 20, 60, 40]], np.float32)
    return Segments(
        ["sky", "a/b"], masks, boxes, np.array([0.9, 0.4], np.float32), np.array([0, 1]), np.array([3, 0]), panoptic
    )


def test_prompts_are_split_at_semicolons_and_star_marks_a_region(tmp_path):
    assert parse_prompts(" sky* ; the red car;;", "panoptic") == (["sky", "the red car"], [True, False])
    assert parse_prompts("sky*; car", "semantic") == (["sky", "car"], None)
    assert parse_prompts(None, "foreground") == (["foreground"], None)
    (tmp_path / "names.txt").write_text("sky*\ncar\n")
    assert parse_prompts(f"@{tmp_path}/names.txt", "panoptic") == (["sky", "car"], [True, False])
    for nothing in (None, "", " ; *;"):
        with pytest.raises(ValueError, match="--prompts"):
            parse_prompts(nothing, "panoptic")


def test_images_with_the_same_name_get_different_output_names():
    assert output_stems(["a/x.jpg", "b/x.png", "b/x_2.png", "-"], "out") == [
        "out/x",
        "out/x_2",
        "out/x_2_2",
        "out/stdin",
    ]


def test_setting_values_are_parsed_as_python_literals():
    assert [literal(t) for t in ("0.5", "(1, 2)", "True", "instance")] == [0.5, (1, 2), True, "instance"]


@pytest.mark.parametrize(
    "setting, message",
    [
        ("model.width=64", "--set model.width: only data.templates and the fields of eval"),
        ("eval.overlap=0.5", "--set eval.overlap: there is no such field"),
        ("eval.overlap_threshold=7", "config.eval.overlap_threshold = 7.0: must be at least 0 and at most 1"),
    ],
)
def test_invalid_settings_are_rejected(setting, message):
    config = base()
    change_settings(config, ["eval.overlap_threshold=0.5", "data.templates=('a {}',)"])
    assert config.eval.overlap_threshold == 0.5 and config.data.templates == ("a {}",)
    with pytest.raises(ValueError, match=message):
        change_settings(config, [setting])


def test_saved_files_match_the_segments(tmp_path, image, segments):
    written = save(str(tmp_path / "x"), image, segments, "panoptic", "photos/x.jpg", masks=True)
    answer = json.loads((tmp_path / "x.json").read_text())
    assert answer["prompts"] == ["sky", "a/b"] and [s["text"] for s in answer["segments"]] == ["sky", "a/b"]
    second = answer["segments"][1]
    assert second["bbox"] == [30, 20, 30, 20] and second["area"] == 600
    np.testing.assert_array_equal(decode_rle(second["segmentation"]["counts"].encode(), 40, 60), segments.masks[1])
    ids = Image.open(tmp_path / "x_panoptic.png")
    np.testing.assert_array_equal(np.array(ids), segments.panoptic)
    assert len(set(ids.convert("RGB").getdata())) == len(np.unique(segments.panoptic)), "one visible color a segment"
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "x_masks/002_a_b.png"), 0) > 0, segments.masks[1])
    assert len(written) == 5 and not list(tmp_path.glob("**/*.tmp"))


def test_previous_results_are_not_used_as_input_images(tmp_path, image, segments):
    """The second of two runs whose output lies in the folder of the photographs."""
    for task in ("panoptic", "referring"):
        save(str(tmp_path / f"x_{task}"), image, segments, task, "photos/x.jpg", masks=True)
    Image.fromarray(image).save(tmp_path / "x.png")
    Image.fromarray(image).save(tmp_path / "y_overlay.png")  # nobody's result: there is no y.json
    assert find_images([str(tmp_path)]) == [str(tmp_path / "x.png"), str(tmp_path / "y_overlay.png")]


def test_cutout_alpha_comes_from_the_matte_or_the_mask(image, segments):
    np.testing.assert_array_equal(cutout(image, segments)[..., 3], 255 * segments.masks.any(0))
    segments.alphas = segments.masks * np.float32(0.4)
    assert set(np.unique(cutout(image, segments)[..., 3])) == {0, 102}
    np.testing.assert_array_equal(cutout(image, segments)[..., :3], image)


def test_overlay_of_a_huge_photo_is_downscaled(tmp_path):
    photo = np.zeros((30, 5000, 3), np.uint8)
    found = Segments(
        ["sky"],
        np.ones((1, 30, 5000), bool),
        np.array([[0, 0, 5000, 30.0]]),
        np.ones(1),
        np.zeros(1, int),
        np.zeros(1, int),
    )
    save(str(tmp_path / "x"), photo, found, "instance", "x.jpg")
    assert Image.open(tmp_path / "x_overlay.png").size == (2048, 12)
    assert json.loads((tmp_path / "x.json").read_text())["segments"][0]["area"] == 150_000


def test_unreadable_image_is_reported_and_the_others_are_predicted(tmp_path, image, segments, capsys):
    Image.fromarray(image).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    bad = predict_files(
        lambda _: segments,
        [str(tmp_path / n) for n in ("bad.png", "good.png")],
        "panoptic",
        str(tmp_path / "out"),
        False,
    )
    assert bad == 1 and (tmp_path / "out/good.json").exists() and not (tmp_path / "out/bad.json").exists()
    assert "bad.png: not an image" in capsys.readouterr().out


def test_command_predicts_a_photo_and_reports_invalid_options(tiny_checkpoint, tmp_path, image):
    Image.fromarray(image).save(tmp_path / "photo.png")

    def run(*options):
        command = [
            sys.executable,
            "-m",
            "mqformer_jax",
            "predict",
            f"--checkpoint={tiny_checkpoint}",
            f"--output={tmp_path}/out",
            *options,
        ]
        return subprocess.run(command, capture_output=True, text=True)

    photo = f"--image={tmp_path}/photo.png"
    done = run(photo, "--prompts=the red star; sky", "--task=referring", "--set", "eval.no_target_threshold=0.0")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"photo.json", "photo_overlay.png", "photo_cutout.png"}
    wrong = run(photo, "--prompts=sky", "--score=37")
    assert (wrong.returncode, wrong.stderr) == (1, "mqformer predict: flag --score=37.0: give a number from 0 to 1.\n")
    wrong = run(photo, "--prompts=sky", "--task=matting")
    assert wrong.returncode == 1 and "no refiner" in wrong.stderr and "Traceback" not in wrong.stderr
