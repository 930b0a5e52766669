"""OpenSeeD (Zhang et al., ICCV 2023): Mask DINO whose classes are texts, and the ancestor of MQ-Former's two kinds of queries.

Two decoders bear its names. The plain one has conditional queries only. The decoupled one has learned queries as well, which
`query_feat` shows: all see each other in self-attention, and what divides them is a rule of training (learned queries are matched
with stuff, conditional ones with things), kept here by `model.queries = "decoupled"`.

What differs from the original: the query order (learned first, which permutes the predictions), and that learned queries are not
cut from the decoder's gradient.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from mqformer_jax.config import base
from mqformer_jax.convert.mask2former import backbone_entries
from mqformer_jax.convert.maskdino import (
    PIXEL,
    PREDICTOR,
    QUERIES,
    count,
    decoder_entries,
    pixel_decoder_entries,
    proposal_entries,
    sizes,
    strides,
)
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, linear, norm
from mqformer_jax.input.prompts import PHOTO_TEMPLATES

HEAD_WIDTH = 64  # of the text encoder, as in every CLIP; no tensor shows it
LANGUAGE = f"{PREDICTOR}lang_encoder."
TOWER = f"{LANGUAGE}lang_encoder."
IGNORED = {
    r"(^|\.)criterion\w*\.empty_weight$": "a constant of the loss",
    r"\.relative_position_index$": "computed from the window",
    r"\.lang_encoder\.logit_scale$": "it belongs to the heads, which learn their own",  # only of a text encoder by itself
}


def text_entries(layers: int) -> list[Entry]:
    """The text encoder: OpenAI's names, but for the projection's."""
    ours = "text_encoder/blocks"
    entries = [
        Entry("text_encoder/tokens", f"{TOWER}token_embedding.weight"),
        Entry("text_encoder/positions", f"{TOWER}positional_embedding"),
        Entry("text_encoder/projection/kernel", f"{LANGUAGE}lang_proj"),  # stands on the right of a product, as ours does
        *norm("text_encoder/norm", f"{TOWER}ln_final"),
    ]
    for i in range(layers):
        block = f"{TOWER}resblocks.{i}"
        entries.append(Entry(f"{ours}/qkv/kernel", f"{block}.attn.in_proj_weight", "linear", i))
        entries.append(Entry(f"{ours}/qkv/bias", f"{block}.attn.in_proj_bias", "same", i))
        for mine, theirs in (("out", "attn.out_proj"), ("fc1", "mlp.c_fc"), ("fc2", "mlp.c_proj")):
            entries += linear(f"{ours}/{mine}", f"{block}.{theirs}", i)
        entries += norm(f"{ours}/norm1", f"{block}.ln_1", i) + norm(f"{ours}/norm2", f"{block}.ln_2", i)
    return entries


def head_entries(learned: bool) -> list[Entry]:
    """Classes and queries, where they are not Mask DINO's. `class_embed` and `lang_mapper` stand on the right of a product, as ours."""
    entries = [
        Entry("heads/class_embed/kernel", f"{PREDICTOR}class_embed"),
        Entry("heads/logit_scale", f"{LANGUAGE}logit_scale"),
        Entry("noised/kernel", f"{PREDICTOR}lang_mapper"),
    ]
    if learned:
        entries.append(Entry("learnable/content", f"{PREDICTOR}query_feat.weight"))
        entries.append(Entry("learnable/anchors", f"{PREDICTOR}query_embed.weight"))
    return entries


def _model_plan(shapes: Shapes) -> Plan:
    """The whole model of names without a prefix."""
    config, known = base(), sizes(shapes)
    model, levels = config.model, known.pop("levels")
    model.update(known)
    learned = shapes.get(f"{PREDICTOR}query_feat.weight", (0,))[0]
    model.update(
        strides=strides(shapes, levels),
        grain=False,
        score="cosine",
        queries="decoupled" if learned else "conditional",
        num_learnable=learned,
        num_conditional=QUERIES,
        interaction="joint",
    )
    config.denoising.flip = 0.0  # noised copies always claim their own class
    config.data.templates = PHOTO_TEMPLATES
    entries = [
        *backbone_entries(config, shapes, "backbone."),
        *pixel_decoder_entries(PIXEL, model.encoder_layers, levels, model.heads),
        *decoder_entries(PREDICTOR, model.decoder_layers, model.width),
        *proposal_entries(PREDICTOR),
        *head_entries(learned > 0),
        *text_entries(_size_text(shapes, model.text)),
    ]
    return Plan(config, "", entries, {"heads/logit_bias": np.zeros(()), "noised/bias": np.zeros(model.width)}, IGNORED)


def _text_plan(shapes: Shapes) -> Plan:
    """The text encoder by itself, of names without a prefix."""
    config = base()
    return Plan(config, "text_encoder", text_entries(_size_text(shapes, config.model.text)), ignored=IGNORED)


def _size_text(shapes: Shapes, text: ConfigDict) -> int:
    """Writes the text encoder's sizes into the config's `text`; returns its number of layers."""
    keys = f"{TOWER}token_embedding.weight", f"{TOWER}positional_embedding", f"{LANGUAGE}lang_proj"
    for key in keys:
        if len(shapes.get(key, ())) != 2:
            raise ValueError(f"{key} {shapes.get(key, 'is missing')}: OpenSeeD has a matrix there; is the file whole?")
    (vocab_size, width), (context, _), (_, embed_dim) = (shapes[key] for key in keys)
    layers = count(shapes, f"{TOWER}resblocks.{{}}.")
    text.update(
        name="clip",
        tokenizer="clip",
        vocab_size=vocab_size,
        context=context,
        width=width,
        heads=max(1, width // HEAD_WIDTH),
        layers=layers,
        embed_dim=embed_dim,
        norm_eps=1e-12,
    )
    return layers


def _root(shapes: Shapes) -> str | None:
    """What stands before all names: nothing in the released files, "model." in those that its training writes; None: not OpenSeeD's."""
    return next((key.removesuffix(f"{LANGUAGE}lang_proj") for key in shapes if key.endswith(f"{LANGUAGE}lang_proj")), None)


def _family(name: str, originals: str, whole: bool) -> Family:
    def recognises(shapes: Shapes) -> bool:
        root = _root(shapes)
        return root is not None and (f"{root}{PREDICTOR}lang_mapper" in shapes) == whole

    def plan(shapes: Shapes) -> Plan:
        root = _root(shapes) or ""
        bare = {key.removeprefix(root): shape for key, shape in shapes.items()}
        found = _model_plan(bare) if whole else _text_plan(bare)
        return dataclasses.replace(found, entries=[dataclasses.replace(entry, theirs=root + entry.theirs) for entry in found.entries])

    return Family(name, originals, recognises, plan)


FAMILIES = (
    _family("openseed", "OpenSeeD with Swin, plain and decoupled", whole=True),
    _family("openseed_text", "OpenSeeD's text encoder by itself", whole=False),
)
