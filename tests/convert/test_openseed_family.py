"""OpenSeeD's checkpoints: every tensor of the released layout has a place in our model and comes back from it."""

from __future__ import annotations

import re

import jax
import layouts
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees, build, load, state_dict

from mqformer_jax.convert.maskdino import PIXEL, PREDICTOR
from mqformer_jax.convert.openseed import FAMILIES, LANGUAGE, TOWER
from mqformer_jax.convert.rules import apply, invert, leaves
from mqformer_jax.models.mqformer import MQFormer
from mqformer_jax.models.text_encoder import make_text_encoder

WHOLE, TEXT = FAMILIES
DEEP = re.compile(r"(resblocks|encoder\.layers|decoder\.layers|bbox_embed)\.([2-9]|1\d)\.")


def checkpoint(learned: int = 0) -> dict[str, np.ndarray]:
    """Random tensors in the released layout, cut to two layers of each transformer and 64 words; with learned queries:
    decoupled.
    """
    random = layouts.random("openseed_swint")
    tensors = {key: random[key] for key in random if not DEEP.search(key) and "token_embedding" not in key}
    draw = np.random.default_rng(0).standard_normal
    tensors[f"{TOWER}token_embedding.weight"] = draw((64, 512)).astype(np.float32)
    if learned:
        tensors[f"{PREDICTOR}query_feat.weight"] = draw((learned, 256)).astype(np.float32)
        tensors[f"{PREDICTOR}query_embed.weight"] = draw((learned, 4)).astype(np.float32)
        weight = tensors.pop("criterion.empty_weight")
        tensors |= {"criterion_coco.empty_weight": weight, "criterion_o365.empty_weight": np.ones(366, np.float32)}
    return tensors


def shapes(tensors) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in tensors.items()}


def ours(config) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a model, without making it."""
    return leaves(nnx.to_pure_dict(jax.eval_shape(lambda: nnx.split(MQFormer(config.model, rngs=nnx.Rngs(0)))[1])))


@pytest.mark.parametrize("learned, queries", [(0, "conditional"), (100, "decoupled")])
def test_whole_checkpoint_is_mapped_and_round_trips_exactly(learned, queries):
    tensors = checkpoint(learned)
    plan = WHOLE.plan(shapes(tensors))
    values, report = apply(plan, tensors, ours(plan.config))

    assert report.complete, report.table()
    assert all(re.search(r"empty_weight|relative_position_index", line) for line in report.ignored)
    model = plan.config.model
    assert (model.queries, model.num_learnable, model.num_conditional, model.interaction) == (
        queries,
        learned,
        300,
        "joint",
    )
    assert (model.text.context, model.text.heads, model.text.norm_eps, model.strides) == (77, 8, 1e-12, (8, 16, 32, 64))
    back = invert(plan, values)
    assert set(tensors) - set(back) == {line.split(":")[0] for line in report.ignored}
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)


def test_training_checkpoint_names_with_model_prefix_are_accepted():
    released = shapes(checkpoint())
    trained = {f"model.{key}": shape for key, shape in released.items()}

    assert WHOLE.recognizes(released) and WHOLE.recognizes(trained)
    plan, other = WHOLE.plan(released), WHOLE.plan(trained)
    assert other.config.to_dict() == plan.config.to_dict()
    assert [entry.theirs for entry in other.entries] == [f"model.{entry.theirs}" for entry in plan.entries]


def test_stride_4_level_is_detected_from_its_input_projection():
    five = shapes(checkpoint(learned=100))
    five[f"{PIXEL}transformer.level_embed"] = (5, 256)
    five[f"{PIXEL}input_proj.4.0.weight"] = (256, 768, 3, 3)
    for i, channels in enumerate((96, 192, 384, 768)):
        five[f"{PIXEL}input_proj.{i}.0.weight"] = (256, channels, 1, 1)

    assert WHOLE.plan(five).config.model.strides == (4, 8, 16, 32, 64)


@pytest.mark.parity
def test_text_encoder_matches_clip_with_the_same_norm_epsilon():
    """Embeddings of 1e-3, so that an epsilon of 1e-5 would show; lang_proj is square, so that a wrong turn would
    too.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=40, max_position_embeddings=8, hidden_size=64, intermediate_size=256, num_attention_heads=1,
        num_hidden_layers=2, projection_dim=64, hidden_act="quick_gelu", layer_norm_eps=1e-12,
        bos_token_id=38, eos_token_id=39, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.CLIPTextModelWithProjection(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (1e-3 if "embedding" in name else 0.1))
    tensors = _language_names(state_dict(theirs))
    tokens = np.array([[38, 5, 7, 39, 0, 0, 0, 0], [38, 1, 2, 3, 4, 9, 30, 39]])

    assert TEXT.recognizes(shapes(tensors)) and not WHOLE.recognizes(shapes(tensors))
    plan = TEXT.plan(shapes(tensors))
    encoder = load(build(lambda rngs: make_text_encoder(plan.config.model.text, rngs, "float32")), plan, tensors)
    expected = theirs(input_ids=torch.tensor(tokens)).text_embeds.detach().numpy()
    assert_agrees(
        "OpenSeeD text (transformers)", "forward", nnx.jit(lambda m, x: m(x))(encoder, tokens), expected, 1e-5
    )


def test_incomplete_checkpoint_error_names_the_missing_tensor():
    tensors = shapes(checkpoint())

    for key in (f"{PIXEL}mask_features.weight", f"{TOWER}positional_embedding"):
        with pytest.raises(ValueError, match=re.escape(key)):
            WHOLE.plan({k: shape for k, shape in tensors.items() if k != key})


def _language_names(clip: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's tensors under OpenSeeD's names."""
    at = lambda name: clip[name if name in clip else f"text_model.{name}"]
    tensors = {
        f"{TOWER}token_embedding.weight": at("embeddings.token_embedding.weight"),
        f"{TOWER}positional_embedding": at("embeddings.position_embedding.weight"),
        f"{LANGUAGE}lang_proj": clip["text_projection.weight"].T,
        f"{LANGUAGE}logit_scale": np.float32(1),
    }
    for kind in ("weight", "bias"):
        tensors[f"{TOWER}ln_final.{kind}"] = at(f"final_layer_norm.{kind}")
        for i in range(2):
            old, new = f"encoder.layers.{i}.", f"{TOWER}resblocks.{i}."
            tensors[f"{new}attn.in_proj_{kind}"] = np.concatenate(
                [at(f"{old}self_attn.{name}_proj.{kind}") for name in "qkv"]
            )
            names = {
                "self_attn.out_proj": "attn.out_proj",
                "layer_norm1": "ln_1",
                "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            }
            tensors |= {f"{new}{theirs}.{kind}": at(f"{old}{name}.{kind}") for name, theirs in names.items()}
    return tensors
