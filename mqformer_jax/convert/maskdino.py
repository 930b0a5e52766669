"""Convert Mask DINO's checkpoints, which have detectron2's tensor names. OpenSeeD uses some of the conversion rules.

Mask DINO learns weights for each class, and has no text encoder. Each class becomes one row of a `ClassTable`: [weight,
bias, denoising label]. The class head uses the weight and the bias, and the denoising queries use the label, so that no
weights are lost.
"""

from __future__ import annotations

import numpy as np

from mqformer_jax.config import base
from mqformer_jax.convert.mask2former import ORIGINAL, POINTS, backbone_entries, pixel_decoder_entries
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, count, linear, norm, packed, shape_of
from mqformer_jax.input.coco_classes import class_names

PIXEL, PREDICTOR = ORIGINAL.pixel, ORIGINAL.predictor
QUERIES = 300  # two-stage checkpoints do not store the number of queries
IGNORED = {
    r"^criterion\.": "a constant of the loss",
    r"(num_batches_tracked|relative_position_index)$": "computed, not learned",
}


def attention_entries(ours: str, theirs: str, index: int) -> list[Entry]:
    """Return the conversion rules of multi-scale deformable attention. index: the layer's number."""
    names = ("value_proj", "output_proj", "sampling_offsets", "attention_weights")
    return [entry for name in names for entry in linear(f"{ours}/{name}", f"{theirs}.{name}", index)]


def decoder_entries(theirs: str, depth: int, width: int) -> list[Entry]:
    """Return the conversion rules of Mask DINO's or OpenSeeD's decoder and heads, except the class head.

    theirs: prefix of the tensor names. depth: number of layers.
    """
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
        for copy in (f"{theirs}_bbox_embed", *boxes):  # the same head is stored under many names
            entries += linear(f"heads/box/layers/{i}", f"{copy}.layers.{i}")
    for copy in ("decoder_norm", "decoder.norm"):
        entries += norm("heads/norm", theirs + copy)
    return entries


def proposal_entries(theirs: str) -> list[Entry]:
    """Return the conversion rules of the two-stage module, which selects the conditional queries."""
    return linear("conditional/proj", f"{theirs}enc_output") + norm("conditional/norm", f"{theirs}enc_output_norm")


def class_entries(theirs: str, width: int) -> tuple[list[Entry], dict[str, np.ndarray]]:
    """Return the conversion rules that pack the class weights into a ClassTable, and {path: value} of constant weights.

    theirs: prefix of the tensor names. With the constant weights, the class head and the denoising queries each select
    their own part of a row of the table.
    """
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
        "denoising_embedding/kernel": read_label,
        "denoising_embedding/bias": np.zeros(width),
    }
    return entries, constants


def sizes(shapes: Shapes) -> dict[str, int]:
    """Return the sizes of Mask DINO or OpenSeeD as {field of `config.model`: size}.

    The extra key "levels" holds the number of feature levels.
    """
    encoder, decoder = f"{PIXEL}transformer.encoder.layers.", f"{PREDICTOR}decoder.layers."
    levels = shape_of(shapes, f"{PIXEL}transformer.level_embed", 2)[0]
    return dict(
        width=shape_of(shapes, f"{PREDICTOR}decoder_norm.weight", 1)[0],
        heads=shape_of(shapes, f"{encoder}0.self_attn.attention_weights.weight", 2)[0] // (levels * POINTS),
        mask_dim=shape_of(shapes, f"{PIXEL}mask_features.weight", 4)[0],
        ffn=shape_of(shapes, f"{decoder}0.linear1.weight", 2)[0],
        encoder_ffn=shape_of(shapes, f"{encoder}0.linear1.weight", 2)[0],
        encoder_layers=count(shapes, f"{encoder}{{}}."),
        decoder_layers=count(shapes, f"{decoder}{{}}."),
        levels=levels,
    )


def strides(shapes: Shapes, levels: int) -> tuple[int, ...]:
    """Return the strides of the feature levels, from fine to coarse.

    Levels with a 1x1 projection are features of the backbone, the coarsest at stride 32. Each 3x3 projection adds a
    level with twice the stride.
    """
    read = sum(shape_of(shapes, f"{PIXEL}input_proj.{i}.0.weight", 4)[-1] == 1 for i in range(levels))
    return tuple(64 >> read << i for i in range(levels))


def head_plan(shapes: Shapes) -> Plan:
    """Return the conversion plan of a checkpoint, except for its backbone.

    Raises ValueError if a tensor is missing, or if the class head is a softmax.
    """
    config, known = base(), sizes(shapes)
    model, levels = config.model, known.pop("levels")
    model.update(known)
    classes, width = shape_of(shapes, f"{PREDICTOR}class_embed.weight", 2)[0], model.width
    if shape_of(shapes, f"{PREDICTOR}label_enc.weight", 2)[0] != classes:
        raise ValueError(
            f'{PREDICTOR}class_embed.weight has a row for "no object": a model with a softmax over classes '
            "(SEMANTIC_CE_LOSS) cannot be converted; give a model that was trained without this option."
        )
    sides = [shape_of(shapes, f"{PIXEL}input_proj.{i}.0.weight", 4)[1] for i in (0, levels - 1)]
    reverse = sides[0] > sides[1]  # high2low: the coarsest feature, which has the most channels, comes first
    model.update(
        strides=strides(shapes, levels), level_order="fine_to_coarse" if reverse else "coarse_to_fine",
        interaction="none", score="dot", region_embedding=False,
        # the file does not hold this value: use the one of Mask DINO's released configs; `--set` can change it
        initialize_box_type={80: "mask2box" if levels == 4 else "bitmask"}.get(classes, "no"),
    )  # fmt: skip
    model.text.update(
        name="classes", tokenizer="classes", classes=class_names(classes), context=1, embed_dim=2 * width + 1
    )
    rows, constants = class_entries(PREDICTOR, width)
    entries = pixel_decoder_entries(ORIGINAL, model.heads, model.encoder_layers, levels, reverse)
    entries += decoder_entries(PREDICTOR, model.decoder_layers, width) + rows
    two_stage, content = f"{PREDICTOR}enc_output.weight" in shapes, f"{PREDICTOR}query_feat.weight"
    own = shape_of(shapes, content, 2)[0] if content in shapes or not two_stage else QUERIES
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
    "Mask DINO with a ResNet-50 or Swin backbone (detectron2 names)",
    lambda shapes: f"{PREDICTOR}label_enc.weight" in shapes and f"{PREDICTOR}class_embed.bias" in shapes,
    plan,
)
