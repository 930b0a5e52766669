"""Mask DINO's checkpoints (detectron2 names), and the entries that its descendants share.

Its classes have weights of their own and no words. They become the rows of a `ClassTable`: [weight, bias, denoising label];
the class head then reads the first two parts and the denoising queries the third, so that nothing is lost.
"""

from __future__ import annotations

import re

import numpy as np

from mqformer_jax.config import base
from mqformer_jax.convert.class_names import class_names
from mqformer_jax.convert.mask2former import backbone_entries
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, conv, linear, norm, packed, reversed_levels

POINTS = 4  # a level, in every released config
PIXEL, PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
QUERIES = 300  # a number that two-stage checkpoints do not hold
IGNORED = {r"^criterion\.": "a constant of the loss", r"(num_batches_tracked|relative_position_index)$": "computed, not learned"}


def count(shapes: Shapes, pattern: str) -> int:
    """How many numbers i there are, from 0 on, whose `pattern` (with {} for i) starts a key."""
    found = {int(m.group(1)) for key in shapes if (m := re.match(re.escape(pattern).replace(r"\{\}", r"(\d+)"), key))}
    return len(found)


def attention_entries(ours: str, theirs: str, index: int, order: tuple[int, int] | None = None) -> list[Entry]:
    """Multi-scale deformable attention. order: (heads, levels) where theirs counts levels from the coarsest."""
    entries = linear(f"{ours}/value_proj", f"{theirs}.value_proj", index) + linear(f"{ours}/output_proj", f"{theirs}.output_proj", index)
    for name, rest in (("sampling_offsets", 2 * POINTS), ("attention_weights", POINTS)):
        rows = None if order is None else reversed_levels(*order, rest)
        entries.append(Entry(f"{ours}/{name}/kernel", f"{theirs}.{name}.weight", "linear", index, order=rows))
        entries.append(Entry(f"{ours}/{name}/bias", f"{theirs}.{name}.bias", "same", index, order=rows))
    return entries


def pixel_decoder_entries(theirs: str, depth: int, levels: int, heads: int, reverse: bool = False) -> list[Entry]:
    """Mask DINO's and OpenSeeD's pixel decoder. reverse: levels are counted from the coarsest (high2low)."""
    ours, entries = "pixel_decoder", []
    for i in range(levels):
        number = levels - 1 - i if reverse else i
        entries += conv(f"{ours}/input_proj/{i}/conv", f"{theirs}input_proj.{number}.0", bias=True)
        entries += norm(f"{ours}/input_proj/{i}/norm", f"{theirs}input_proj.{number}.1")
    order = reversed_levels(1, levels, 1) if reverse else None
    entries.append(Entry(f"{ours}/level_embed", f"{theirs}transformer.level_embed", order=order))
    for i in range(depth):
        layer = f"{theirs}transformer.encoder.layers.{i}"
        entries += attention_entries(f"{ours}/layers/attention", f"{layer}.self_attn", i, (heads, levels) if reverse else None)
        entries += linear(f"{ours}/layers/ffn/layers/0", f"{layer}.linear1", i) + linear(
            f"{ours}/layers/ffn/layers/1", f"{layer}.linear2", i
        )
        entries += norm(f"{ours}/layers/norm1", f"{layer}.norm1", i) + norm(f"{ours}/layers/norm2", f"{layer}.norm2", i)
    features = f"{ours}/mask_features"
    entries += conv(f"{features}/lateral/conv", f"{theirs}adapter_1") + norm(f"{features}/lateral/norm", f"{theirs}adapter_1.norm")
    entries += conv(f"{features}/merge/conv", f"{theirs}layer_1") + norm(f"{features}/merge/norm", f"{theirs}layer_1.norm")
    return entries + conv(f"{features}/project", f"{theirs}mask_features", bias=True)


def decoder_entries(theirs: str, depth: int, width: int) -> list[Entry]:
    """The decoder and its heads (but for classes) of Mask DINO and OpenSeeD."""
    ours, entries = "decoder", []
    for i in range(2):
        entries += linear(f"{ours}/anchor_pos/layers/{i}", f"{theirs}decoder.ref_point_head.layers.{i}")
    for i in range(depth):
        layer = f"{theirs}decoder.layers.{i}"
        names = [f"{ours}/layers/self_attention/{name}" for name in ("query", "key", "value")]
        entries += packed(names, f"{layer}.self_attn.in_proj_", width, i)
        entries += linear(f"{ours}/layers/self_attention/out", f"{layer}.self_attn.out_proj", i)
        entries += attention_entries(f"{ours}/layers/cross_attention", f"{layer}.cross_attn", i)
        entries += linear(f"{ours}/layers/ffn/layers/0", f"{layer}.linear1", i) + linear(
            f"{ours}/layers/ffn/layers/1", f"{layer}.linear2", i
        )
        for k in (1, 2, 3):
            entries += norm(f"{ours}/layers/norm{k}", f"{layer}.norm{k}", i)
    for i in range(3):
        entries += linear(f"heads/mask_embed/layers/{i}", f"{theirs}mask_embed.layers.{i}")
        boxes = [f"{theirs}{copy}" for k in range(depth) for copy in (f"bbox_embed.{k}", f"decoder.bbox_embed.{k}")]
        for copy in (f"{theirs}_bbox_embed", *boxes):  # one head under many names
            entries += linear(f"heads/box/layers/{i}", f"{copy}.layers.{i}")
    for copy in ("decoder_norm", "decoder.norm"):
        entries += norm("heads/norm", theirs + copy)
    return entries


def proposal_entries(theirs: str) -> list[Entry]:
    """The selection of conditional queries (two-stage)."""
    return linear("conditional/proj", f"{theirs}enc_output") + norm("conditional/norm", f"{theirs}enc_output_norm")


def class_entries(theirs: str, width: int) -> tuple[list[Entry], dict[str, np.ndarray]]:
    """The class layer as rows of a ClassTable, and the constants that read them."""
    table, third = "text_encoder/rows", (width + 1, 2 * width + 1)
    entries = [
        Entry(table, f"{theirs}class_embed.weight", into=(0, width)),
        Entry(table, f"{theirs}class_embed.bias", "column", into=(width, width + 1)),
        Entry(table, f"{theirs}label_enc.weight", into=third),
    ]
    read_class, read_label = np.eye(width, 2 * width + 1), np.zeros((2 * width + 1, width))
    read_label[slice(*third)] = np.eye(width)
    constants = {
        "heads/class_embed/kernel": read_class,
        "heads/class_embed/bias": np.eye(1, 2 * width + 1, width)[0],
        "noised/kernel": read_label,
        "noised/bias": np.zeros(width),
    }
    return entries, constants


def sizes(shapes: Shapes) -> dict[str, int]:
    """Depths and widths that Mask DINO and OpenSeeD share, by our config's names, and the number of levels."""
    encoder, decoder = f"{PIXEL}transformer.encoder.layers.0", f"{PREDICTOR}decoder.layers.0"
    try:
        levels = shapes[f"{PIXEL}transformer.level_embed"][0]
        return dict(
            width=shapes[f"{PREDICTOR}decoder_norm.weight"][0],
            heads=shapes[f"{encoder}.self_attn.attention_weights.weight"][0] // (levels * POINTS),
            mask_dim=shapes[f"{PIXEL}mask_features.weight"][0],
            ffn=shapes[f"{decoder}.linear1.weight"][0],
            encoder_ffn=shapes[f"{encoder}.linear1.weight"][0],
            encoder_layers=count(shapes, f"{PIXEL}transformer.encoder.layers.{{}}."),
            decoder_layers=count(shapes, f"{PREDICTOR}decoder.layers.{{}}."),
            levels=levels,
        )
    except (KeyError, IndexError) as e:
        raise ValueError(f"the tensor {e} is missing: Mask DINO and OpenSeeD have it; is the file whole?") from e


def strides(shapes: Shapes, levels: int) -> tuple[int, ...]:
    """Of the memory's levels: 1x1 projections read the backbone's features up to stride 32, 3x3 ones what is coarser."""
    read = sum(shapes[f"{PIXEL}input_proj.{i}.0.weight"][-1] == 1 for i in range(levels))
    return tuple(64 >> read << i for i in range(levels))


def head_plan(shapes: Shapes) -> Plan:
    """All but the backbone."""
    config, known = base(), sizes(shapes)
    model, levels = config.model, known.pop("levels")
    model.update(known)
    classes, width = shapes[f"{PREDICTOR}class_embed.weight"][0], model.width
    if shapes[f"{PREDICTOR}label_enc.weight"][0] != classes:
        raise ValueError(
            f'{PREDICTOR}class_embed.weight has a row for "nothing": a softmax over classes (SEMANTIC_CE_LOSS) has no counterpart here.'
        )
    sides = [shapes[f"{PIXEL}input_proj.{i}.0.weight"][1] for i in (0, levels - 1)]
    reverse = sides[0] > sides[1]  # high2low: the widest feature, which is the coarsest, comes first
    model.update(
        strides=strides(shapes, levels), coarse_first=not reverse, interaction="none", score="dot", grain=False,
        # what the file does not hold is as in the released recipes: `--set` says otherwise
        box_init={80: "mask2box" if levels == 4 else "bitmask"}.get(classes, "no"),
    )  # fmt: skip
    model.text.update(name="classes", tokenizer="classes", classes=class_names(classes), context=1, embed_dim=2 * width + 1)
    rows, constants = class_entries(PREDICTOR, width)
    entries = pixel_decoder_entries(PIXEL, model.encoder_layers, levels, model.heads, reverse)
    entries += decoder_entries(PREDICTOR, model.decoder_layers, width) + rows
    two_stage, content = f"{PREDICTOR}enc_output.weight" in shapes, f"{PREDICTOR}query_feat.weight"
    own = shapes.get(content, (QUERIES,))[0]
    if two_stage:
        model.update(queries="conditional", num_learnable=0, num_conditional=own, learned_content=content in shapes)
        entries += proposal_entries(PREDICTOR)
        entries += [Entry("conditional/content", content)] * (content in shapes)
    else:
        model.update(queries="learnable", num_learnable=own, num_conditional=0)
        entries += [Entry("learnable/content", content), Entry("learnable/anchors", f"{PREDICTOR}query_embed.weight")]
    return Plan(config, "", entries, constants, IGNORED)


def plan(shapes: Shapes) -> Plan:
    whole = head_plan(shapes)
    whole.entries += backbone_entries(whole.config, shapes, "backbone.")
    return whole


FAMILY = Family(
    "maskdino",
    "Mask DINO with R50 or Swin (detectron2 names)",
    lambda shapes: f"{PREDICTOR}label_enc.weight" in shapes and f"{PREDICTOR}class_embed.bias" in shapes,
    plan,
)
