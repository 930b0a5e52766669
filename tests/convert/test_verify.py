"""The side-by-side command on random weights, and that it sees a difference."""

import numpy as np
import pytest

from mqformer_jax.convert.verify import verify

transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=256, num_attention_heads=1, num_hidden_layers=2, projection_dim=48,
        max_position_embeddings=16, bos_token_id=97, eos_token_id=98, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


def test_a_text_encoder_agrees_and_a_changed_one_does_not(clip_folder, monkeypatch):
    ((stage, difference, largest),) = verify(str(clip_folder))
    assert stage == "text" and difference < 1e-4 * largest
    monkeypatch.setattr("mqformer_jax.models.text_encoder.jax.nn.sigmoid", lambda x: 0.5 * x)
    ((_, changed, _),) = verify(str(clip_folder))
    assert changed > 100 * difference


def test_mask2former_agrees_at_every_stage_of_backbone_and_pixel_decoder(tmp_path):
    torch.manual_seed(0)
    swin = transformers.SwinConfig(drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, hidden_dim=32, mask_feature_size=16, encoder_feedforward_dim=48, dim_feedforward=64,
        encoder_layers=2, decoder_layers=3, num_attention_heads=2, num_queries=5,
    )  # fmt: skip
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    rows = verify(str(tmp_path), image=np.random.default_rng(0).integers(0, 256, (100, 90, 3), np.uint8))
    assert [stage for stage, _, _ in rows] == [
        *(f"stride {s}" for s in (4, 8, 16, 32)), *(f"memory at stride {s}" for s in (32, 16, 8)), "mask features",
    ]  # fmt: skip
    for stage, difference, largest in rows:
        assert difference < 1e-4 * largest, stage


def test_an_original_that_no_package_holds_is_one_line(tmp_path):
    import layouts

    from mqformer_jax.convert.files import write_safetensors

    shapes = {key: shape for key, (shape, _) in layouts.load("maskdino_r50_instance").items()}
    path = str(tmp_path / "maskdino.safetensors")
    write_safetensors(path, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    with pytest.raises(ValueError, match="in no package; families that can be verified are"):
        verify(path)
