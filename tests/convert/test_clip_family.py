"""CLIP's text tower by two names: the same leaves, every tensor placed, and the exact way back."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from flax import nnx

from mqformer_jax.convert.clip_text import FAMILIES
from mqformer_jax.convert.rules import Plan, apply, invert, leaves
from mqformer_jax.models.text_encoder import make_text_encoder

families = {family.name: family for family in FAMILIES}
SIZES = {"ViT-B/32": (512, 12, 512), "ViT-B/16": (512, 12, 512), "ViT-L/14": (768, 12, 768)}  # width, layers, embed_dim
TINY = (128, 2, 24)


def openai(
    width: int, layers: int, embed_dim: int, vocab_size: int = 49408, context: int = 77
) -> dict[str, tuple[int, ...]]:
    """OpenAI's names and shapes, with a piece of the image tower."""
    shapes = {
        "positional_embedding": (context, width),
        "text_projection": (width, embed_dim),
        "logit_scale": (),
        "visual.proj": (768, embed_dim),
        "visual.transformer.resblocks.0.attn.in_proj_weight": (3 * 768, 768),
        "token_embedding.weight": (vocab_size, width),
        **vectors("ln_final", width),
    }
    for i in range(layers):
        at = f"transformer.resblocks.{i}"
        shapes |= {f"{at}.attn.in_proj_weight": (3 * width, width), f"{at}.attn.in_proj_bias": (3 * width,)}
        for name, rows, columns in (("attn.out_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
            shapes |= {f"{at}.{name}.weight": (rows * width, columns * width), f"{at}.{name}.bias": (rows * width,)}
        shapes |= vectors(f"{at}.ln_1", width) | vectors(f"{at}.ln_2", width)
    return shapes


def vectors(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def hugging_face(
    width: int, layers: int, embed_dim: int, name: str = "CLIPTextModelWithProjection"
) -> dict[str, tuple[int, ...]]:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=embed_dim,
    )
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def renamed(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """OpenAI's tensors as Hugging Face's conversion script names them."""
    theirs = {
        "text_model.embeddings.token_embedding.weight": tensors["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": tensors["positional_embedding"],
        "text_projection.weight": tensors["text_projection"].T,
        "logit_scale": tensors["logit_scale"],
        "text_model.embeddings.position_ids": np.arange(77)[None],
        "visual_projection.weight": tensors["visual.proj"].T,
        "vision_model.embeddings.class_embedding": np.zeros(768, np.float32),
    }
    names = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names |= {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    for part in ("weight", "bias"):
        theirs[f"text_model.final_layer_norm.{part}"] = tensors[f"ln_final.{part}"]
        for i in range(layers):
            to, source = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
            theirs |= {f"{to}{theirs_}.{part}": tensors[f"{source}{name}.{part}"] for name, theirs_ in names.items()}
            for letter, third in zip("qkv", np.split(tensors[f"{source}attn.in_proj_{part}"], 3)):
                theirs[f"{to}self_attn.{letter}_proj.{part}"] = third
    return theirs


def text_encoder(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    _, state = jax.eval_shape(lambda: nnx.split(make_text_encoder(plan.config.model.text, nnx.Rngs(0), np.float32)))
    return leaves({"text_encoder": nnx.to_pure_dict(state)})


def shapes_of(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in tensors.items()}


def test_openai_and_hugging_face_weights_convert_alike_and_round_trip():
    rng = np.random.default_rng(0)
    original = {
        key: np.asarray(rng.standard_normal(shape, np.float32)) for key, shape in openai(*TINY, vocab_size=50).items()
    }
    found = []
    for name, tensors in (("clip_text", original), ("hf_clip_text", renamed(original, TINY[1]))):
        assert [n for n, family in families.items() if family.recognizes(shapes_of(tensors))] == [name]
        plan = families[name].plan(shapes_of(tensors))
        values, report = apply(plan, tensors, text_encoder(plan))
        assert report.complete, report.table()
        assert {line.split(".")[0].split(":")[0] for line in report.ignored} <= {
            "logit_scale", "visual", "visual_projection", "vision_model", "text_model"
        }  # fmt: skip
        for key, value in invert(plan, values).items():
            np.testing.assert_array_equal(value, tensors[key])
        found.append(values)
    assert found[0].keys() == found[1].keys()
    for path, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][path])


@pytest.mark.parity
@pytest.mark.parametrize("layout, family", [(openai, "clip_text"), (hugging_face, "hf_clip_text")])
@pytest.mark.parametrize("size", SIZES)
def test_published_model_sizes_are_inferred_from_tensor_shapes(layout, family, size):
    width, layers, embed_dim = SIZES[size]
    shapes = layout(width, layers, embed_dim)
    plan = families[family].plan(shapes)
    text = plan.config.model.text
    assert (text.name, text.tokenizer, text.vocab_size, text.context) == ("clip", "clip", 49408, 77)
    assert (text.width, text.heads, text.layers, text.embed_dim) == (width, width // 64, layers, embed_dim)
    filled = dict.fromkeys(text_encoder(plan), 0)
    for entry in plan.entries:
        filled[entry.ours] += math.prod(shapes[entry.theirs])
    assert filled == {path: leaf.size for path, leaf in text_encoder(plan).items()}


@pytest.mark.parity
def test_a_tower_without_projection_is_refused():
    shapes = hugging_face(*TINY, "CLIPTextModel")
    assert families["hf_clip_text"].recognizes(shapes)
    with pytest.raises(ValueError, match="text_projection.weight is missing: save a CLIPModel"):
        families["hf_clip_text"].plan(shapes)


@pytest.mark.parametrize("key", ["positional_embedding", "text_projection"])
def test_incomplete_checkpoint_error_names_the_missing_tensor(key):
    shapes = openai(*TINY)
    del shapes[key]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        families["clip_text"].plan(shapes)
