"""Mask2Former against Hugging Face's with random weights: backbone and pixel decoder are equal, the rest is told
apart.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees, load, state_dict

from mqformer_jax import config as recipe
from mqformer_jax.convert.mask2former import FAMILIES
from mqformer_jax.convert.rules import Plan, apply, invert, leaves
from mqformer_jax.models.mqformer import MQFormer
from mqformer_jax.models.pixel_decoder import PixelDecoder
from mqformer_jax.models.swin import Swin

families = {family.name: family for family in FAMILIES}
TINY = dict(
    feature_size=32, hidden_dim=32, mask_feature_size=16, encoder_feedforward_dim=48, dim_feedforward=64,
    encoder_layers=2, decoder_layers=3, num_attention_heads=2, num_queries=5,
)  # fmt: skip


def mask2former(device: str = "cpu", swin: bool = True, **sizes):
    """Hugging Face's, with a Swin-T or a ResNet-50 and weights away from their start."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features = dict(out_features=["stage1", "stage2", "stage3", "stage4"])
    kind = transformers.SwinConfig if swin else transformers.ResNetConfig
    with torch.device(device):
        config = transformers.Mask2FormerConfig(
            backbone_config=kind(drop_path_rate=0.0, **features) if swin else kind(**features), **sizes
        )
        model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    if device != "meta":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def shapes_of(tensors) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def original_names(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes, with a ResNet, as Mask2Former's own code has them: q, k and v packed."""
    pixel, decoder = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    rules = [
        (r"^model\.pixel_level_module\.encoder\.embedder\.embedder\.convolution", "backbone.stem.conv1"),
        (r"^model\.pixel_level_module\.encoder\.embedder\.embedder\.normalization", "backbone.stem.conv1.norm"),
        (
            r"^model\.pixel_level_module\.encoder\.encoder\.stages\.(\d)\.layers\.(\d+)\.",
            lambda m: f"backbone.res{int(m[1]) + 2}.{m[2]}.",
        ),
        (r"(?<=\d\.)layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}"),
        (r"(?<=\d\.)layer\.(\d)\.normalization", lambda m: f"conv{int(m[1]) + 1}.norm"),
        (r"shortcut\.convolution", "shortcut"),
        (r"shortcut\.normalization", "shortcut.norm"),
        (r"^model\.pixel_level_module\.decoder\.(encoder|level_embed)", rf"{pixel}transformer.\1"),
        (r"^model\.pixel_level_module\.decoder\.", pixel),
        (r"input_projections", "input_proj"),
        (r"(adapter_1|layer_1)\.0", r"\1"),
        (r"(adapter_1|layer_1)\.1", r"\1.norm"),
        (r"mask_projection", "mask_features"),
        (r"(encoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm1"),
        (r"(encoder\.layers\.\d+)\.final_layer_norm", r"\1.norm2"),
        (r"(encoder\.layers\.\d+)\.fc", r"\1.linear"),
        (r"^model\.transformer_module\.(decoder\.)?", decoder),
        (r"predictor\.layers\.(\d+)\.self_attn\.", r"predictor.transformer_self_attention_layers.\1.self_attn."),
        (r"predictor\.layers\.(\d+)\.self_attn_layer_norm", r"predictor.transformer_self_attention_layers.\1.norm"),
        (r"predictor\.layers\.(\d+)\.cross_attn\.", r"predictor.transformer_cross_attention_layers.\1.multihead_attn."),
        (r"predictor\.layers\.(\d+)\.cross_attn_layer_norm", r"predictor.transformer_cross_attention_layers.\1.norm"),
        (r"predictor\.layers\.(\d+)\.final_layer_norm", r"predictor.transformer_ffn_layers.\1.norm"),
        (r"predictor\.layers\.(\d+)\.fc", r"predictor.transformer_ffn_layers.\1.linear"),
        (r"predictor\.layernorm", "predictor.decoder_norm"),
        (r"mask_predictor\.mask_embedder\.(\d)\.0", r"mask_embed.layers.\1"),
        (r"queries_features", "query_feat"),
        (r"queries_embedder", "query_embed"),
        (r"^class_predictor", f"{decoder}class_embed"),
    ]
    renamed = {}
    for key, shape in shapes.items():
        for pattern, to in rules:
            key = re.sub(pattern, to, key)
        renamed[key] = shape
    for key in [key for key in renamed if re.search(r"predictor.*self_attn\.[qkv]_proj", key)]:
        shape = renamed.pop(key)
        whole = re.sub(r"[qkv]_proj\.", "in_proj_", key)
        renamed[whole] = (3 * shape[0], *shape[1:])
    return renamed


def parts_of(plan: Plan) -> dict[str, nnx.Module]:
    """What runs alone: backbone and pixel decoder of the plan's config, without values."""
    model = plan.config.model

    def make():
        backbone = Swin(model.backbone.name.removeprefix("swin_"), model.backbone.window, rngs=nnx.Rngs(0))
        decoder = PixelDecoder(
            backbone.channels, model.width, model.heads, model.num_sampling_points, model.encoder_layers,
            model.encoder_ffn, model.strides, model.mask_dim, model.mask_stride, rngs=nnx.Rngs(0),
        )  # fmt: skip
        return nnx.split(backbone), nnx.split(decoder)

    return dict(zip(("backbone", "pixel_decoder"), (nnx.merge(*part) for part in jax.eval_shape(make))))


def whole(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of the MQ-Former that the plan's config describes, its text encoder made small."""
    model = plan.config.model.copy_and_resolve_references()
    model.text.update(vocab_size=50, width=64, layers=1, embed_dim=8)
    _, state = jax.eval_shape(lambda: nnx.split(MQFormer(model, rngs=nnx.Rngs(0))))
    return leaves(nnx.to_pure_dict(state))


@pytest.mark.parity
def test_backbone_and_pixel_decoder_match_original_outputs_and_gradients():
    theirs = mask2former(**TINY)
    import torch

    tensors = state_dict(theirs)
    plan = families["hf_mask2former"].plan(shapes_of(tensors))
    parts = {name: nnx.split(load(part, plan, tensors, name)) for name, part in parts_of(plan).items()}
    graphs, states = ({name: part[k] for name, part in parts.items()} for k in (0, 1))
    image = torch.randn(2, 3, 64, 96, requires_grad=True)
    output = theirs.model.pixel_level_module(image)
    expected = [output.decoder_last_hidden_state, *output.decoder_hidden_states[::-1]]
    cotangents = [torch.randn_like(x) for x in expected]
    sum((x * c).sum() for x, c in zip(expected, cotangents)).backward()

    def run(states, image):
        backbone, decoder = (nnx.merge(graphs[name], states[name]) for name in parts)
        memory, mask_features = decoder(backbone(image), np.full((2, 2), (64, 96)), (64, 96))
        cuts = np.cumsum([h * w for h, w in memory.shapes])[:-1]
        levels = zip(jnp.split(memory.tokens, cuts, 1), memory.shapes)
        maps = [level.reshape(2, *shape, -1) for level, shape in levels]
        return [mask_features, *maps]

    @jax.jit
    def both(states, image, cotangents):
        values, pull_back = jax.vjp(run, states, image)
        return values, *pull_back(cotangents)

    to_ours = lambda x: jnp.asarray(x.detach().numpy().transpose(0, 2, 3, 1))
    values, gradient, into_image = both(states, to_ours(image), [to_ours(c) for c in cotangents])
    for ours, theirs_at in zip(values, expected):
        assert_agrees("Mask2Former backbone + pixel decoder (transformers)", "forward", ours, to_ours(theirs_at))
    close = functools.partial(assert_agrees, "Mask2Former backbone + pixel decoder (transformers)", "gradient")
    close(into_image, to_ours(image.grad))
    wanted = {name.removeprefix("model.pixel_level_module."): p.grad for name, p in theirs.named_parameters()}
    offsets = lambda g: g.reshape(32, 2, 3, 8)[:, :, ::-1].reshape(32, -1)  # [width, heads, levels, points and xy]
    pixel, backbone = gradient["pixel_decoder"], gradient["backbone"]
    close(
        offsets(pixel["layers"]["attention"]["sampling_offsets"]["kernel"][0]).T,
        wanted["decoder.encoder.layers.0.self_attn.sampling_offsets.weight"],
    )
    close(pixel["level_embed"][::-1], wanted["decoder.level_embed"])
    close(pixel["mask_features"]["merge"]["conv"]["kernel"].transpose(3, 2, 0, 1), wanted["decoder.layer_1.0.weight"])
    close(
        backbone["embed"]["kernel"].transpose(3, 2, 0, 1),
        wanted["encoder.swin.embeddings.patch_embeddings.projection.weight"],
    )


@pytest.mark.parity
def test_partial_conversion_reports_missing_and_ignored_parameters():
    tensors = state_dict(mask2former(**TINY))
    plan = families["hf_mask2former"].plan(shapes_of(tensors))
    values, report = apply(plan, tensors, whole(plan))
    assert not report.unused and not report.mismatched, report.table()
    places = (
        "decoder/layers/cross_attention", "decoder/anchor_pos", "heads/box", "heads/class_embed", "heads/logit_scale",
        "heads/logit_bias", "learnable/anchors", "region_embedding", "denoising_embedding", "text_encoder",
    )  # fmt: skip
    unfilled = {place: [path for path in report.missing if path.startswith(place)] for place in places}
    assert all(unfilled.values()) and sum(map(len, unfilled.values())) == len(report.missing)
    whys = {line.split(": ", 1)[1].split(":")[0] for line in report.ignored}
    assert whys == {
        "masked cross-attention",
        "classes learned without text",
        "query positions",
        "the classifier's norm",
    }
    for key, value in invert(plan, values).items():
        np.testing.assert_array_equal(value, tensors[key])


@pytest.mark.parity
def test_in_memory_and_on_disk_names_map_to_the_same_parameters():
    sizes = shapes_of(mask2former("meta").state_dict())
    names = {
        ".encoder.swin.e": ".encoder.e", ".attention.relative_position_bias.": ".attention.self.",
        ".mlp.fc1.": ".intermediate.dense.", ".mlp.fc2.": ".output.dense.", ".o_proj.": ".output.dense.",
        ".attention.q_proj.": ".attention.self.query.",
        ".attention.k_proj.": ".attention.self.key.", ".attention.v_proj.": ".attention.self.value.",
    }  # fmt: skip
    on_disk = {
        functools.reduce(lambda k, name: k.replace(name, names[name]), names, key): shape
        for key, shape in sizes.items()
    }
    places = [
        [(entry.ours, entry.index, entry.into) for entry in families["hf_mask2former"].plan(s).entries]
        for s in (sizes, on_disk)
    ]
    assert on_disk.keys() != sizes.keys() and places[0] == places[1]


@pytest.mark.parity
def test_hugging_face_and_original_layouts_map_to_same_parameters():
    sizes = shapes_of(mask2former("meta", swin=False).state_dict())
    hugging_face, original = families["hf_mask2former"].plan(sizes), families["mask2former"].plan(original_names(sizes))
    assert hugging_face.config.to_dict() == original.config.to_dict()
    places = [{(entry.ours, entry.index) for entry in plan.entries} for plan in (hugging_face, original)]
    assert places[0] == places[1]
    assert {entry.theirs for entry in original.entries} <= original_names(sizes).keys()
    unread = original_names(sizes).keys() - {entry.theirs for entry in original.entries}
    assert all(any(re.search(pattern, key) for pattern in original.ignored) for key in unread)


@pytest.mark.parity
@pytest.mark.parametrize("swin", [False, True])
def test_published_model_size_is_inferred_from_tensor_shapes(swin):
    plan = families["hf_mask2former"].plan(shapes_of(mask2former("meta", swin).state_dict()))
    model = plan.config.model
    assert model.backbone.name == ("swin_t" if swin else "resnet50")
    assert (model.width, model.heads, model.encoder_ffn, model.ffn, model.mask_dim) == (256, 8, 1024, 2048, 256)
    assert (model.encoder_layers, model.decoder_layers, model.strides) == (6, 9, (8, 16, 32))
    assert (model.queries, model.num_learnable, model.num_conditional) == ("learnable", 100, 0)
    plan.config.data.mixture = (dict(name="any", split="train", tasks=("panoptic",)),)
    recipe.check(plan.config)


@pytest.mark.parity
def test_old_query_name_static_query_is_accepted():
    sizes = original_names(shapes_of(mask2former("meta", swin=False).state_dict()))
    old = {key.replace("query_feat", "static_query"): shape for key, shape in sizes.items()}
    places = [
        [dataclasses.replace(entry, theirs="", order=None) for entry in families["mask2former"].plan(s).entries]
        for s in (sizes, old)
    ]
    assert places[0] == places[1]


@pytest.mark.parity
def test_each_layout_is_recognized_only_by_its_family():
    sizes = shapes_of(mask2former("meta", swin=False).state_dict())
    headless = {key.removeprefix("model."): shape for key, shape in sizes.items() if key.startswith("model.")}
    layouts = [sizes, headless, original_names(sizes)]
    owners = [[name for name, family in families.items() if family.recognizes(layout)] for layout in layouts]
    assert owners == [["hf_mask2former"], ["hf_mask2former"], ["mask2former"]]
    assert len(families["hf_mask2former"].plan(headless).entries) == len(families["hf_mask2former"].plan(sizes).entries)
    assert all("CC-BY-NC" in family.license for family in families.values())


@pytest.mark.parity
def test_unknown_backbone_and_incomplete_checkpoint_are_rejected():
    sizes = original_names(shapes_of(mask2former("meta", swin=False).state_dict()))
    headed = {key: shape for key, shape in sizes.items() if not key.startswith("backbone.")}
    with pytest.raises(ValueError, match=r"backbone\.\* is missing: .* give the complete file"):
        families["mask2former"].plan(headed)
    with pytest.raises(ValueError, match="neither a ResNet nor a Swin"):
        families["mask2former"].plan(headed | {"backbone.stage1.conv.weight": (64, 3, 3, 3)})
    del sizes["sem_seg_head.predictor.query_feat.weight"]
    with pytest.raises(ValueError, match="query_feat.weight is missing: .* give the complete file"):
        families["mask2former"].plan(sizes)
