"""The text tower of CLIP, as OpenAI and as Hugging Face name it. The image tower is left out."""

from __future__ import annotations

import re

from mqformer_jax import config as recipe
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, linear, norm, packing

HEAD_WIDTH = 64  # of every CLIP; weights do not show it
IGNORED = {
    r"^logit_scale$": "it belongs to the heads, which learn their own",
    r"^(visual|vision_model|visual_projection)\.": "the image tower",
    r"position_ids$": "row numbers",
    r"^(input_resolution|context_length|vocab_size)$": "a size",
}
OURS = "text_encoder"


def _openai(shapes: Shapes) -> Plan:
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.ln_1\.weight")
    entries = [
        Entry(f"{OURS}/tokens", "token_embedding.weight"),
        Entry(f"{OURS}/positions", "positional_embedding"),
        Entry(f"{OURS}/projection/kernel", "text_projection"),
        *norm(f"{OURS}/norm", "ln_final"),
    ]
    for i in range(layers):
        ours, theirs = f"{OURS}/blocks", f"transformer.resblocks.{i}"
        entries += norm(f"{ours}/norm1", f"{theirs}.ln_1", i) + norm(f"{ours}/norm2", f"{theirs}.ln_2", i)
        entries.append(Entry(f"{ours}/qkv/kernel", f"{theirs}.attn.in_proj_weight", "linear", i))
        entries.append(Entry(f"{ours}/qkv/bias", f"{theirs}.attn.in_proj_bias", "same", i))
        entries += linear(f"{ours}/out", f"{theirs}.attn.out_proj", i)
        entries += linear(f"{ours}/fc1", f"{theirs}.mlp.c_fc", i) + linear(f"{ours}/fc2", f"{theirs}.mlp.c_proj", i)
    embed_dim = _shape(shapes, "text_projection")[1]
    return Plan(_config(shapes, "token_embedding.weight", "positional_embedding", layers, embed_dim), OURS, entries, ignored=IGNORED)


def _hugging_face(shapes: Shapes) -> Plan:
    if "text_projection.weight" not in shapes:
        raise ValueError("text_projection.weight is missing: save a CLIPModel or a CLIPTextModelWithProjection, not a CLIPTextModel.")
    layers = _count(shapes, r"text_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight")
    tokens, positions = (f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position"))
    entries = [
        Entry(f"{OURS}/tokens", tokens),
        Entry(f"{OURS}/positions", positions),
        *linear(f"{OURS}/projection", "text_projection", bias=False),
        *norm(f"{OURS}/norm", "text_model.final_layer_norm"),
    ]
    width = _shape(shapes, tokens)[1]
    for i in range(layers):
        ours, theirs = f"{OURS}/blocks", f"text_model.encoder.layers.{i}"
        entries += norm(f"{ours}/norm1", f"{theirs}.layer_norm1", i) + norm(f"{ours}/norm2", f"{theirs}.layer_norm2", i)
        entries += packing(f"{ours}/qkv", [f"{theirs}.self_attn.{name}_proj" for name in "qkv"], width, i)
        entries += linear(f"{ours}/out", f"{theirs}.self_attn.out_proj", i)
        entries += linear(f"{ours}/fc1", f"{theirs}.mlp.fc1", i) + linear(f"{ours}/fc2", f"{theirs}.mlp.fc2", i)
    return Plan(_config(shapes, tokens, positions, layers, _shape(shapes, "text_projection.weight")[0]), OURS, entries, ignored=IGNORED)


def _config(shapes: Shapes, tokens: str, positions: str, layers: int, embed_dim: int):
    """A recipe whose text encoder has the sizes of these tables."""
    vocab_size, width = _shape(shapes, tokens)
    config = recipe.base()
    config.model.text.update(
        name="clip",
        tokenizer="clip",
        vocab_size=vocab_size,
        context=_shape(shapes, positions)[0],
        width=width,
        heads=max(1, width // HEAD_WIDTH),
        layers=layers,
        embed_dim=embed_dim,
    )
    return config


def _shape(shapes: Shapes, key: str) -> tuple[int, int]:
    if len(shapes.get(key, ())) != 2:
        raise ValueError(f"{key} {shapes.get(key, 'is missing')}: a CLIP text tower has a matrix there; is the file whole?")
    return shapes[key]


def _count(shapes: Shapes, pattern: str) -> int:
    """Layers, by the keys that show each one's number."""
    layers = [int(match[1]) for key in shapes if (match := re.match(pattern, key))]
    if not layers:
        raise ValueError(f"no key like {pattern}: a CLIP text tower has one a layer; is the file whole?")
    return 1 + max(layers)


FAMILIES = (
    Family(
        "clip_text",
        "OpenAI's CLIP (ViT-B/32, ViT-B/16, ViT-L/14 and others), its text tower",
        lambda shapes: {"token_embedding.weight", "positional_embedding", "ln_final.weight"} <= shapes.keys(),
        _openai,
    ),
    Family(
        "hf_clip_text",
        "Hugging Face's CLIPModel and CLIPTextModelWithProjection",
        lambda shapes: any(f"{prefix}embeddings.token_embedding.weight" in shapes for prefix in ("", "text_model.")),
        _hugging_face,
    ),
)
