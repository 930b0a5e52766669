"""Convert CLIP's text encoder, with OpenAI's or Hugging Face's tensor names. CLIP's image encoder is ignored."""

from __future__ import annotations

from ml_collections import ConfigDict

from mqformer_jax import config as recipe
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, count, linear, norm, packing, shape_of

HEAD_WIDTH = 64  # channels of an attention head in every CLIP model; the weights do not show the number of heads
IGNORED = {
    r"^logit_scale$": "MQ-Former's class head learns a new scale",
    r"^(visual|vision_model|visual_projection)\.": "the image encoder",
    r"position_ids$": "position indices, not weights",
    r"^(input_resolution|context_length|vocab_size)$": "a size, not a weight",
}
OURS = "text_encoder"


def openai_entries(root: str, blocks: str, projection: str, layers: int) -> list[Entry]:
    """Return the conversion rules of CLIP's text encoder with the tensor names of OpenAI or OpenSeeD.

    root: prefix of the names of the embeddings and the last norm. blocks: prefix of the names of the layers.
    projection: name of the projection matrix, [width, embed_dim].
    """
    ours = f"{OURS}/blocks"
    entries = [
        Entry(f"{OURS}/tokens", f"{root}token_embedding.weight"),
        Entry(f"{OURS}/positions", f"{root}positional_embedding"),
        Entry(f"{OURS}/projection/kernel", projection),  # [in, out], like this project's kernels
        *norm(f"{OURS}/norm", f"{root}ln_final"),
    ]
    for i in range(layers):
        theirs = f"{blocks}{i}"
        entries += norm(f"{ours}/norm1", f"{theirs}.ln_1", i) + norm(f"{ours}/norm2", f"{theirs}.ln_2", i)
        entries.append(Entry(f"{ours}/qkv/kernel", f"{theirs}.attn.in_proj_weight", "linear", i))
        entries.append(Entry(f"{ours}/qkv/bias", f"{theirs}.attn.in_proj_bias", "same", i))
        entries += linear(f"{ours}/out", f"{theirs}.attn.out_proj", i)
        entries += linear(f"{ours}/fc1", f"{theirs}.mlp.c_fc", i) + linear(f"{ours}/fc2", f"{theirs}.mlp.c_proj", i)
    return entries


def set_sizes(text: ConfigDict, shapes: Shapes, tokens: str, positions: str, layers: int, embed_dim: int) -> None:
    """Set `text`, the text encoder's config, to a CLIP text encoder with the sizes of a checkpoint.

    tokens, positions: names of the token and position embeddings, whose shapes give the other sizes.
    """
    vocab_size, width = shape_of(shapes, tokens, 2)
    text.update(
        name="clip",
        tokenizer="clip",
        vocab_size=vocab_size,
        context=shape_of(shapes, positions, 2)[0],
        width=width,
        heads=max(1, width // HEAD_WIDTH),
        layers=layers,
        embed_dim=embed_dim,
    )


def _openai(shapes: Shapes) -> Plan:
    config, layers = recipe.base(), count(shapes, "transformer.resblocks.{}.")
    embed_dim = shape_of(shapes, "text_projection", 2)[1]
    set_sizes(config.model.text, shapes, "token_embedding.weight", "positional_embedding", layers, embed_dim)
    return Plan(config, OURS, openai_entries("", "transformer.resblocks.", "text_projection", layers), ignored=IGNORED)


def _hugging_face(shapes: Shapes) -> Plan:
    if "text_projection.weight" not in shapes:
        raise ValueError(
            "text_projection.weight is missing: save a CLIPModel or a CLIPTextModelWithProjection, not a CLIPTextModel."
        )
    config, layers = recipe.base(), count(shapes, "text_model.encoder.layers.{}.")
    tokens, positions = (f"text_model.embeddings.{name}_embedding.weight" for name in ("token", "position"))
    entries = [
        Entry(f"{OURS}/tokens", tokens),
        Entry(f"{OURS}/positions", positions),
        *linear(f"{OURS}/projection", "text_projection", bias=False),
        *norm(f"{OURS}/norm", "text_model.final_layer_norm"),
    ]
    set_sizes(config.model.text, shapes, tokens, positions, layers, shape_of(shapes, "text_projection.weight", 2)[0])
    for i in range(layers):
        ours, theirs = f"{OURS}/blocks", f"text_model.encoder.layers.{i}"
        entries += norm(f"{ours}/norm1", f"{theirs}.layer_norm1", i) + norm(f"{ours}/norm2", f"{theirs}.layer_norm2", i)
        entries += packing(
            f"{ours}/qkv", [f"{theirs}.self_attn.{name}_proj" for name in "qkv"], config.model.text.width, i
        )
        entries += linear(f"{ours}/out", f"{theirs}.self_attn.out_proj", i)
        entries += linear(f"{ours}/fc1", f"{theirs}.mlp.fc1", i) + linear(f"{ours}/fc2", f"{theirs}.mlp.fc2", i)
    return Plan(config, OURS, entries, ignored=IGNORED)


FAMILIES = (
    Family(
        "clip_text",
        "the text encoder of OpenAI's CLIP (ViT-B/32, ViT-B/16, ViT-L/14 and others)",
        lambda shapes: {"token_embedding.weight", "positional_embedding", "ln_final.weight"} <= shapes.keys(),
        _openai,
    ),
    Family(
        "hf_clip_text",
        "the text encoder of Hugging Face's CLIPModel or CLIPTextModelWithProjection",
        lambda shapes: any(f"{prefix}embeddings.token_embedding.weight" in shapes for prefix in ("", "text_model.")),
        _hugging_face,
    ),
)
