"""Convert checkpoints of Mask2Former (Cheng et al., CVPR 2022) to initial weights of MQ-Former.

The checkpoints have the tensor names of the original code or of Hugging Face. The backbone and the pixel decoder
convert exactly. These parts of the decoder convert exactly too: the self-attention, FFN and norms of each layer, the
mask head, and the content of the queries. The masked cross-attention and the class weights, which are learned without
text, have no counterpart in MQ-Former.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from mqformer_jax import config as recipe
from mqformer_jax.convert import resnet, swin
from mqformer_jax.convert.rules import (
    Entry,
    Family,
    Plan,
    Shapes,
    conv,
    count,
    linear,
    norm,
    packed,
    reversed_levels,
    shape_of,
)

STRIDES, MASK_STRIDE = (8, 16, 32), 4
POINTS = 4  # sampling points per head and level, in every released config
LEVELS = len(STRIDES)
LICENSE = "Mask2Former's model zoo is CC-BY-NC 4.0: no commercial use."
NO_CROSS, NO_CLASS = "masked cross-attention: MQ-Former has deformable attention", "classes learned without text"
IGNORED = {
    r"(transformer_cross_attention_layers\.\d+\.multihead_attn|layers\.\d+\.cross_attn)\.": NO_CROSS,
    r"(predictor|transformer_module)\.(level_embed|input_proj|input_projections)\.": NO_CROSS,
    r"(query_embed|queries_embedder)\.": "query positions: MQ-Former computes them from anchors",
    r"(class_embed|class_predictor|^criterion)\.": NO_CLASS,
    r"encoder\.swin\.layernorm\.": "the classifier's norm",
    r"num_batches_tracked$": "a training counter",
    r"relative_position_index$": "computed from the window size",
}

# path in the model: (function that returns the rules, the original's tensor name, Hugging Face's tensor name)
ENCODER_LAYER = {
    "attention/value_proj": (linear, "self_attn.value_proj", "self_attn.value_proj"),
    "attention/output_proj": (linear, "self_attn.output_proj", "self_attn.output_proj"),
    "norm1": (norm, "norm1", "self_attn_layer_norm"),
    "ffn/layers/0": (linear, "linear1", "fc1"),
    "ffn/layers/1": (linear, "linear2", "fc2"),
    "norm2": (norm, "norm2", "final_layer_norm"),
}
DECODER_LAYER = {  # {}: the layer's number
    "self_attention/out": (
        linear,
        "transformer_self_attention_layers.{}.self_attn.out_proj",
        "decoder.layers.{}.self_attn.out_proj",
    ),
    "norm1": (norm, "transformer_cross_attention_layers.{}.norm", "decoder.layers.{}.cross_attn_layer_norm"),
    "norm2": (norm, "transformer_self_attention_layers.{}.norm", "decoder.layers.{}.self_attn_layer_norm"),
    "ffn/layers/0": (linear, "transformer_ffn_layers.{}.linear1", "decoder.layers.{}.fc1"),
    "ffn/layers/1": (linear, "transformer_ffn_layers.{}.linear2", "decoder.layers.{}.fc2"),
    "norm3": (norm, "transformer_ffn_layers.{}.norm", "decoder.layers.{}.final_layer_norm"),
}


@dataclasses.dataclass(frozen=True)
class Names:
    """The tensor names of one kind of checkpoint (original or Hugging Face) that are not in the tables above.

    column: the index of this kind's names in the rows of those tables. pixel: prefix of the next six names. predictor:
    prefix of the last four names. projection, lateral, merge: names of a convolution and its GroupNorm. {}: the number
    of a layer or level.
    """

    column: int
    backbone: str
    pixel: str
    encoder: str
    level_embed: str
    projection: tuple[str, str]
    lateral: tuple[str, str]
    merge: tuple[str, str]
    mask_features: str
    predictor: str
    self_attention: str
    decoder_norm: str
    mask_embed: str
    queries: str


ORIGINAL = Names(
    column=1,
    backbone="backbone.",
    pixel="sem_seg_head.pixel_decoder.",
    encoder="transformer.encoder.layers.{}.",
    level_embed="transformer.level_embed",
    projection=("input_proj.{}.0", "input_proj.{}.1"),
    lateral=("adapter_1", "adapter_1.norm"),
    merge=("layer_1", "layer_1.norm"),
    mask_features="mask_features",
    predictor="sem_seg_head.predictor.",
    self_attention="transformer_self_attention_layers.{}.self_attn.",
    decoder_norm="decoder_norm",
    mask_embed="mask_embed.layers.{}",
    queries="query_feat.weight",
)
HUGGING_FACE = Names(
    column=2,
    backbone="pixel_level_module.encoder.",
    pixel="pixel_level_module.decoder.",
    encoder="encoder.layers.{}.",
    level_embed="level_embed",
    projection=("input_projections.{}.0", "input_projections.{}.1"),
    lateral=("adapter_1.0", "adapter_1.1"),
    merge=("layer_1.0", "layer_1.1"),
    mask_features="mask_projection",
    predictor="transformer_module.",
    self_attention="decoder.layers.{}.self_attn.",
    decoder_norm="decoder.layernorm",
    mask_embed="decoder.mask_predictor.mask_embedder.{}.0",
    queries="queries_features.weight",
)


def pixel_decoder_entries(
    names: Names, heads: int, layers: int, levels: int = LEVELS, coarse_first: bool = True
) -> list[Entry]:
    """Return the conversion rules of the pixel decoder of Mask2Former, Mask DINO or OpenSeeD.

    names: the tensor names of the checkpoint; `ORIGINAL` for Mask DINO and OpenSeeD. coarse_first: whether the
    checkpoint's levels run from coarse to fine. The levels of this project's model run from fine to coarse. So if
    coarse_first is true, the rules reverse the levels in the projections, the level embeddings, and the sampling
    offsets and attention weights of each head.
    """
    ours, pixel = "pixel_decoder", names.pixel
    turned = lambda heads, rest: reversed_levels(heads, levels, rest) if coarse_first else None
    entries = [Entry(f"{ours}/level_embed", pixel + names.level_embed, order=turned(1, 1))]
    for level in range(levels):
        mine = levels - 1 - level if coarse_first else level
        entries += _conv_norm(
            f"{ours}/input_proj/{mine}", pixel, [name.format(level) for name in names.projection], bias=True
        )
    for i in range(layers):
        theirs = pixel + names.encoder.format(i)
        for name, size in (("sampling_offsets", 2 * POINTS), ("attention_weights", POINTS)):
            dense = linear(f"{ours}/layers/attention/{name}", f"{theirs}self_attn.{name}", i)
            entries += [dataclasses.replace(entry, order=turned(heads, size)) for entry in dense]
        for name, row in ENCODER_LAYER.items():
            entries += row[0](f"{ours}/layers/{name}", theirs + row[names.column], i)
    entries += _conv_norm(f"{ours}/mask_features/lateral", pixel, names.lateral)
    entries += _conv_norm(f"{ours}/mask_features/merge", pixel, names.merge)
    return entries + conv(f"{ours}/mask_features/project", pixel + names.mask_features, bias=True)


def decoder_entries(names: Names, width: int, layers: int) -> list[Entry]:
    """Return the conversion rules of the parts that Mask2Former's decoder and heads share with MQ-Former's."""
    ours, theirs = "decoder/layers", names.predictor
    entries = [Entry("learnable/content", theirs + names.queries), *norm("heads/norm", theirs + names.decoder_norm)]
    for i in range(3):
        entries += linear(f"heads/mask_embed/layers/{i}", theirs + names.mask_embed.format(i))
    for i in range(layers):
        attention, parts = (
            theirs + names.self_attention.format(i),
            [f"{ours}/self_attention/{name}" for name in ("query", "key", "value")],
        )
        if names.column == ORIGINAL.column:
            entries += packed(parts, f"{attention}in_proj_", width, i)
        else:
            for part, letter in zip(parts, "qkv"):
                entries += linear(part, f"{attention}{letter}_proj", i)
        for name, row in DECODER_LAYER.items():
            entries += row[0](f"{ours}/{name}", theirs + row[names.column].format(i), i)
    return entries


def _conv_norm(ours: str, prefix: str, theirs: tuple[str, str] | list[str], bias: bool = False) -> list[Entry]:
    return conv(f"{ours}/conv", prefix + theirs[0], bias=bias) + norm(f"{ours}/norm", prefix + theirs[1])


def backbone_entries(config: ConfigDict, shapes: Shapes, prefix: str) -> list[Entry]:
    """Set the fields of the backbone in `config`, and return the conversion rules of the backbone.

    Raises ValueError if the backbone is missing or unsupported.
    """
    ours, keys = config.model.backbone, [key for key in shapes if key.startswith(prefix)]
    has = lambda part: any(part in key for key in keys)
    if not keys:
        raise ValueError(f"{prefix}* is missing: the tensors of the backbone have this prefix; give the complete file.")
    if has("relative_position_bias_table"):
        size, ours.window = swin.sizes_of(shapes, prefix)
        ours.name = f"swin_{size}"
        return swin.entries(shapes, prefix)
    for make, part, bottleneck in (
        (resnet.detectron2_entries, "stem.conv1.", resnet.DETECTRON2),
        (resnet.hugging_face_entries, "embedder.embedder.convolution.", resnet.HUGGING_FACE),
    ):
        if has(part):
            depth = resnet.depth_of(shapes, prefix + bottleneck)
            ours.name = f"resnet{depth}"
            return make("backbone", prefix, depth)
    raise ValueError(f"{prefix}*: this backbone is neither a ResNet nor a Swin; only these two can be converted.")


def _plan(shapes: Shapes, names: Names) -> Plan:
    """Return the conversion plan of a checkpoint with these names.

    All sizes come from tensor names and shapes. Each attention head samples POINTS points per level, so the number of
    sampled points shows the number of heads.
    """
    pixel, predictor, column = names.pixel, names.predictor, names.column
    sides = lambda key: shape_of(shapes, key, 2)
    queries, width = sides(predictor + names.queries)
    encoder, ffn = pixel + names.encoder.format(0), predictor + DECODER_LAYER["ffn/layers/0"][column].format(0)
    heads = sides(f"{encoder}self_attn.attention_weights.weight")[0] // (LEVELS * POINTS)
    encoder_layers = count(shapes, pixel + names.encoder)
    decoder_layers = count(shapes, predictor + names.self_attention)
    config = recipe.base()
    backbone = backbone_entries(config, shapes, names.backbone)
    config.model.update(
        width=width,
        heads=heads,
        num_sampling_points=POINTS,
        encoder_ffn=sides(encoder + ENCODER_LAYER["ffn/layers/0"][column] + ".weight")[0],
        ffn=sides(f"{ffn}.weight")[0],
        strides=STRIDES,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        mask_dim=sides(predictor + names.mask_embed.format(2) + ".weight")[0],
        mask_stride=MASK_STRIDE,
        queries="learnable",
        num_learnable=queries,
        num_conditional=0,
    )
    config.data.max_targets = min(config.data.max_targets, queries)
    entries = [
        *backbone,
        *pixel_decoder_entries(names, heads, encoder_layers),
        *decoder_entries(names, width, decoder_layers),
    ]
    return Plan(config, "", entries, ignored=IGNORED)


def _original(shapes: Shapes) -> Names:
    """Return the tensor names of the original code. Its first checkpoints have static_query instead of query_feat."""
    old = f"{ORIGINAL.predictor}static_query.weight" in shapes
    return dataclasses.replace(ORIGINAL, queries="static_query.weight") if old else ORIGINAL


def _hugging_face(shapes: Shapes) -> Names:
    """Return Hugging Face's tensor names, with the prefix "model." if the checkpoint includes the class head."""
    root = "model." if f"model.{HUGGING_FACE.pixel}{HUGGING_FACE.level_embed}" in shapes else ""
    places = {name: root + getattr(HUGGING_FACE, name) for name in ("backbone", "pixel", "predictor")}
    return dataclasses.replace(HUGGING_FACE, **places)


FAMILIES = (
    Family(
        "mask2former",
        "Mask2Former's model zoo (ResNet-50 and -101, Swin-T/S/B/L), as initial weights for training",
        lambda shapes: "sem_seg_head.predictor.transformer_cross_attention_layers.0.norm.weight" in shapes,
        lambda shapes: _plan(shapes, _original(shapes)),
        LICENSE,
    ),
    Family(
        "hf_mask2former",
        "Hugging Face's Mask2FormerForUniversalSegmentation and Mask2FormerModel, as initial weights for training",
        lambda shapes: (
            any(f"{root}transformer_module.queries_features.weight" in shapes for root in ("", "model."))
            and any("decoder.layers.0.cross_attn.in_proj_weight" in key for key in shapes)
        ),
        lambda shapes: _plan(shapes, _hugging_face(shapes)),
        LICENSE,
    ),
)
