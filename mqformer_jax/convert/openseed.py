"""Convert OpenSeeD (Zhang et al., ICCV 2023), which is Mask DINO with texts as classes.

OpenSeeD exists with two decoders. The plain decoder has only conditional queries. The decoupled decoder, recognized by
`query_feat`, also has learnable queries. All queries attend to each other, but training matches learnable queries with
stuff and conditional queries with things (`model.queries = "decoupled"`).

The converted model differs from the original in two ways. Learnable queries come before conditional queries, which
permutes the predictions. And the gradient of the decoder reaches the learnable queries.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from mqformer_jax.config import base
from mqformer_jax.convert.clip_text import openai_entries, set_sizes
from mqformer_jax.convert.mask2former import ORIGINAL, backbone_entries, pixel_decoder_entries
from mqformer_jax.convert.maskdino import PREDICTOR, QUERIES, decoder_entries, proposal_entries, sizes, strides
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, count, prefix_of, shape_of
from mqformer_jax.input.prompts import PHOTO_TEMPLATES

LANGUAGE = f"{PREDICTOR}lang_encoder."
TOWER = f"{LANGUAGE}lang_encoder."
IGNORED = {
    r"(^|\.)criterion\w*\.empty_weight$": "a constant of the loss",
    r"\.relative_position_index$": "computed from the window size",
    # only in files that hold the text encoder alone
    r"\.lang_encoder\.logit_scale$": "MQ-Former's class head learns a new scale",
}


def head_entries(learned: bool) -> list[Entry]:
    """Return the conversion rules of OpenSeeD's classes and queries, which differ from Mask DINO's.

    learned: whether the decoder has learnable queries. The checkpoint stores `class_embed` and `lang_mapper` as [in,
    out], like this project's kernels, so they are not transposed.
    """
    entries = [
        Entry("heads/class_embed/kernel", f"{PREDICTOR}class_embed"),
        Entry("heads/logit_scale", f"{LANGUAGE}logit_scale"),
        Entry("denoising_embedding/kernel", f"{PREDICTOR}lang_mapper"),
    ]
    if learned:
        entries.append(Entry("learnable/content", f"{PREDICTOR}query_feat.weight"))
        entries.append(Entry("learnable/anchors", f"{PREDICTOR}query_embed.weight"))
    return entries


def _model_plan(shapes: Shapes) -> Plan:
    """Return the conversion plan of the complete model.

    shapes: {tensor name without the prefix "model.": shape}.
    """
    config, known = base(), sizes(shapes)
    model, levels = config.model, known.pop("levels")
    model.update(known)
    content = f"{PREDICTOR}query_feat.weight"
    learned = shape_of(shapes, content, 2)[0] if content in shapes else 0
    model.update(
        strides=strides(shapes, levels),
        region_embedding=False,
        score="cosine",
        queries="decoupled" if learned else "conditional",
        num_learnable=learned,
        num_conditional=QUERIES,
        interaction="joint",
    )
    config.denoising.label_noise = 0.0  # denoising queries keep the labels of their targets
    config.data.templates = PHOTO_TEMPLATES
    entries = [
        *backbone_entries(config, shapes, "backbone."),
        *pixel_decoder_entries(ORIGINAL, model.heads, model.encoder_layers, levels, coarse_first=False),
        *decoder_entries(PREDICTOR, model.decoder_layers, model.width),
        *proposal_entries(PREDICTOR),
        *head_entries(learned > 0),
        *_text_entries(model.text, shapes),
    ]
    zeros = {"heads/logit_bias": np.zeros(()), "denoising_embedding/bias": np.zeros(model.width)}
    return Plan(config, "", entries, zeros, IGNORED)


def _text_plan(shapes: Shapes) -> Plan:
    """Return the conversion plan of the text encoder alone. shapes: see `_model_plan`."""
    config = base()
    return Plan(config, "text_encoder", _text_entries(config.model.text, shapes), ignored=IGNORED)


def _text_entries(text: ConfigDict, shapes: Shapes) -> list[Entry]:
    """Set the sizes of the text encoder in its config `text`, and return the conversion rules of the text encoder."""
    layers, projection = count(shapes, f"{TOWER}resblocks.{{}}."), f"{LANGUAGE}lang_proj"
    embed_dim = shape_of(shapes, projection, 2)[1]
    set_sizes(text, shapes, f"{TOWER}token_embedding.weight", f"{TOWER}positional_embedding", layers, embed_dim)
    text.norm_eps = 1e-12
    return openai_entries(TOWER, f"{TOWER}resblocks.", projection, layers)


def _family(name: str, originals: str, whole: bool) -> Family:
    def recognizes(shapes: Shapes) -> bool:
        root = prefix_of(shapes, f"{LANGUAGE}lang_proj")
        return root is not None and (f"{root}{PREDICTOR}lang_mapper" in shapes) == whole

    def plan(shapes: Shapes) -> Plan:
        root = prefix_of(shapes, f"{LANGUAGE}lang_proj") or ""  # training adds "model." to all names
        bare = {key.removeprefix(root): shape for key, shape in shapes.items()}
        found = _model_plan(bare) if whole else _text_plan(bare)
        return dataclasses.replace(
            found, entries=[dataclasses.replace(entry, theirs=root + entry.theirs) for entry in found.entries]
        )

    return Family(name, originals, recognizes, plan)


FAMILIES = (
    _family("openseed", "OpenSeeD with a Swin backbone and the plain or decoupled decoder", whole=True),
    _family("openseed_text", "the text encoder of OpenSeeD alone", whole=False),
)
