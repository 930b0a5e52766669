import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file

from mqformer_jax.inference import export as exporting
from mqformer_jax.inference.predictor import Predictor

SERVE = pathlib.Path(__file__).parents[2] / "docs" / "serve.py"
# A None in sys.modules is a package that cannot be imported.
ALONE = "import runpy, sys; sys.modules.update(dict.fromkeys(['mqformer_jax', 'flax', 'orbax', 'cv2', 'PIL'])); "
ALONE += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
TEXTS = ["sky", "the red star", "ball"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor.from_checkpoint(str(checkpoint))


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "tiny"
    given = [f"--checkpoint={checkpoint}", f"--output={out}", "--prompts=8"]
    exporting.main(exporting.arguments().parse_args(given))
    return out


@pytest.mark.slow
def test_exported_model_matches_the_predictor_without_the_package(predictor, exported, tmp_path):
    """The image fills the canvas' width, so that nothing is resized: docs/serve.py resizes without OpenCV."""
    image = np.random.default_rng(0).integers(0, 256, (50, 64, 3), np.uint8)
    prompts = np.asarray(predictor.embed(TEXTS, [True, True, False]))
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "prompts.npy", prompts)
    command = [sys.executable, "-c", ALONE, str(SERVE), str(exported), "image.npy", "prompts.npy", "predictions.npz"]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wanted,), found = predictor.predict_raw([image], [prompts]), np.load(tmp_path / "predictions.npz")
    boxes = found["boxes"] * 64  # of a square canvas of 64 pixels, whose scale is the image's
    xyxy = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    np.testing.assert_allclose(found["class_probs"], wanted.class_probs, atol=1e-5)
    np.testing.assert_allclose(np.clip(xyxy, 0, [64, 50, 64, 50]), wanted.boxes, atol=64e-5)
    np.testing.assert_allclose(found["masks"], wanted.masks.logits, atol=1e-5 * np.abs(found["masks"]).max())


def test_exported_text_encoder_matches_the_predictor_embeddings(predictor, exported):
    encode = jax.export.deserialize((exported / "encode.stablehlo").read_bytes())
    tokens, is_region = np.zeros((8, predictor.config.model.text.context), np.int32), np.arange(8) < 2
    tokens[:3] = predictor.tokenizer(TEXTS)
    (found,) = encode.call(load_file(exported / "weights.safetensors"), tokens, is_region)
    np.testing.assert_allclose(found[:3], predictor.embed(TEXTS, is_region[:3]), atol=1e-5)


@pytest.mark.parametrize("name", ["encode", "segment"])
def test_export_json_matches_the_input_and_output_shapes(exported, name):
    said = json.loads((exported / "export.json").read_text())
    function = jax.export.deserialize((exported / said["functions"][name]["file"]).read_bytes())
    shapes = lambda rows: [(tuple(row["shape"]), row["dtype"]) for row in rows.values()]
    avals = lambda found: [(x.shape, str(x.dtype)) for x in found]
    inputs, outputs = said["functions"][name]["inputs"], said["functions"][name]["outputs"]
    assert shapes(inputs) == avals(function.in_avals[-len(inputs) :]) and shapes(outputs) == avals(function.out_avals)
    assert len(function.in_avals) == len(inputs) + len(load_file(exported / said["weights"]))
    assert said["text"]["file"] == "tokenizer.json" and (exported / "tokenizer.json").read_text() == "{}"


def test_exported_file_supports_cpu_gpu_tpu_and_has_no_weights(exported):
    function = jax.export.deserialize((exported / "segment.stablehlo").read_bytes())
    assert function.platforms == ("cpu", "cuda", "tpu")
    largest = max(x.size for x in load_file(exported / "weights.safetensors").values())
    constants = [line for line in function.mlir_module().splitlines() if 'stablehlo.constant dense<"' in line]
    assert all(len(line) < 8 * largest for line in constants)


def test_failed_export_leaves_no_files(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(exporting, "write_safetensors", full)
    monkeypatch.setattr(exporting, "_exported", lambda *_: iter(()))
    with pytest.raises(OSError, match="no space left"):
        exporting.export(str(checkpoint), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_existing_export_is_not_overwritten(checkpoint, exported):
    with pytest.raises(FileExistsError, match="already exists; remove it"):
        exporting.export(str(checkpoint), str(exported))
    assert (exported / "export.json").exists()


def test_export_with_zero_prompts_is_rejected(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="--prompts=0"):
        exporting.export(str(checkpoint), str(tmp_path / "out"), prompts=0)
