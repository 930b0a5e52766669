"""The original and the converted model side by side, stage by stage:

    python -m mqformer_jax.convert.verify --input FILE_OR_FOLDER [--image photo.jpg]

Needs torch, and the package that holds the original's code: transformers (for a Hugging Face folder with its config.json), timm,
efficientnet_lite_pytorch. Mask DINO's, Mask2Former's and OpenSeeD's own code is in no release; tests/test_maskdino.py holds ours to
numbers recorded from it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from mqformer_jax.convert.convert import plan_of
from mqformer_jax.convert.rules import Plan, apply, fill, leaves
from mqformer_jax.models.backbone import make_backbone
from mqformer_jax.models.pixel_decoder import PixelDecoder
from mqformer_jax.models.text_encoder import make_text_encoder

Stages = dict[str, np.ndarray]
SIDES = 256, 320  # of the image that both are shown


def verify(path: str, family: str | None = None, image: np.ndarray | None = None) -> list[tuple[str, float, float]]:
    """For each stage: its name, the largest absolute difference, and the largest value of the original.

    image: RGB uint8 of any size; noise where None. Raises ValueError, one line, for a family whose original cannot be had.
    """
    name, plan, tensors = plan_of(path, family)
    if name not in ORIGINALS:
        raise ValueError(f"{path}: the original of {name} is in no package; families that can be verified are {', '.join(ORIGINALS)}.")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*SIDES, 3), np.uint8) if image is None else cv2.resize(image, SIDES[::-1], interpolation=cv2.INTER_AREA)
    if plan.part == "text_encoder":
        given = _tokens(plan, rng)
        ours = {
            "text": _module(plan, tensors, "text_encoder", lambda rngs: make_text_encoder(plan.config.model.text, rngs, jnp.float32))(given)
        }
    else:
        backbone = _module(plan, tensors, "backbone", lambda rngs: make_backbone(plan.config.model.backbone, False, rngs, jnp.float32))
        given = ((image - np.array(backbone.mean)) / np.array(backbone.std)).astype(np.float32)[None]
        ours = _image_stages(plan, tensors, backbone, given)
    theirs = ORIGINALS[name](path, tensors, given)
    return [(stage, float(np.abs(ours[stage] - value).max()), float(np.abs(value).max())) for stage, value in theirs.items()]


def _module(plan: Plan, tensors: Any, part: str, make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    shapes = leaves(nnx.to_pure_dict(nnx.split(module)[1]))
    values, report = apply(plan, tensors, {f"{part}/{path}": leaf for path, leaf in shapes.items()})
    if report.missing:
        raise ValueError(
            f"{len(report.missing)} parameters of the {part} are missing ({report.missing[0]}, ...): convert it first and read the report."
        )
    return fill(module, values, part)


def _image_stages(plan: Plan, tensors: Any, backbone: nnx.Module, pixels: Float[np.ndarray, "1 h w 3"]) -> Stages:
    """Features of the backbone, and what the pixel decoder makes of them where the plan has one."""
    features = jax.jit(lambda x: backbone(x))(pixels)
    stages = {f"stride {stride}": np.asarray(value) for stride, value in features.items()}
    if not plan.part:
        c = plan.config.model
        make = lambda rngs: PixelDecoder(
            backbone.channels, c.width, c.heads, c.points, c.encoder_layers, c.encoder_ffn, c.strides, c.mask_dim, c.mask_stride, rngs=rngs
        )
        decoder = _module(plan, tensors, "pixel_decoder", make)
        memory, shapes, _, masks = jax.jit(lambda f: decoder(f, np.array([SIDES]), SIDES))(features)
        cuts = np.cumsum([int(h) * int(w) for h, w in shapes])[:-1]
        for stride, (h, w), level in zip(c.strides, shapes, np.split(np.asarray(memory), cuts, 1)):
            stages[f"memory at stride {stride}"] = level.reshape(1, int(h), int(w), -1)
        stages["mask features"] = np.asarray(masks)
    return stages


def _tokens(plan: Plan, rng: np.random.Generator) -> Int[np.ndarray, "4 l"]:
    """Four texts of different lengths; CLIP's end token, the highest id, ends each, zeros follow."""
    text = plan.config.model.text
    length = min(text.context, 16)
    tokens = rng.integers(1, text.vocab_size - 2, (4, length))
    for row, end in enumerate((3, 5, length - 2, length - 1)):
        tokens[row, end:] = 0
        tokens[row, end] = text.vocab_size - 1
    return tokens


def _torch():
    return _package("torch")


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ValueError(f"the original needs the package {name}: pip install {name}.") from e


def _nhwc(x) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def _nchw(pixels: np.ndarray):
    return _torch().tensor(pixels.transpose(0, 3, 1, 2))


def _weights(tensors: Any) -> dict:
    return {key: _torch().tensor(np.asarray(value)) for key, value in tensors.items()}


def _backbone_folder(path: str, tensors: Any, pixels: np.ndarray) -> Stages:
    names = ["stage1", "stage2", "stage3", "stage4"]
    model = _package("transformers").AutoBackbone.from_pretrained(path, out_features=names).eval()
    maps = model(_nchw(pixels)).feature_maps
    return {f"stride {4 << k}": _nhwc(x) for k, x in enumerate(maps)}


def _mask2former_folder(path: str, tensors: Any, pixels: np.ndarray) -> Stages:
    model = _package("transformers").Mask2FormerModel.from_pretrained(path).eval().pixel_level_module
    out = model(_nchw(pixels), output_hidden_states=True)
    stages = {f"stride {4 << k}": _nhwc(x) for k, x in enumerate(out.encoder_hidden_states)}
    levels = out.decoder_hidden_states
    return (
        stages
        | {f"memory at stride {32 >> k}": _nhwc(x) for k, x in enumerate(levels)}
        | {"mask features": _nhwc(out.decoder_last_hidden_state)}
    )


def _timm_resnet(path: str, tensors: Any, pixels: np.ndarray) -> Stages:
    depth = 50 if "layer3.6.conv1.weight" not in tensors else 101
    model = _package("timm").create_model(f"resnet{depth}", features_only=True).eval()
    model.load_state_dict({key: value for key, value in _weights(tensors).items() if not key.startswith("fc.")})
    return {f"stride {4 << k}": _nhwc(x) for k, x in enumerate(model(_nchw(pixels))[1:])}


def _lite0(path: str, tensors: Any, pixels: np.ndarray) -> Stages:
    model = _package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(_weights(tensors))
    x, stages = model._swish(model._bn0(model._conv_stem(_nchw(pixels)))), {}
    for k, block in enumerate(model._blocks):
        x = block(x)
        if k in (2, 4, 10, 15):  # the last blocks before the stride doubles
            stages[f"stride {SIDES[0] // x.shape[2]}"] = _nhwc(x)
    return stages


def _clip_folder(path: str, tensors: Any, tokens: np.ndarray) -> Stages:
    model = _package("transformers").CLIPTextModelWithProjection.from_pretrained(path).eval()
    return {"text": model(_torch().tensor(tokens)).text_embeds.detach().numpy()}


def _minilm(path: str, tensors: Any, tokens: np.ndarray) -> Stages:
    transformers, torch = _package("transformers"), _torch()
    depth = 1 + max(int(key.split("layer.")[1].split(".")[0]) for key in tensors if "encoder.layer." in key)
    config = transformers.BertConfig(hidden_size=384, num_hidden_layers=depth, num_attention_heads=12, intermediate_size=1536)
    model = transformers.BertModel(config).eval()
    model.load_state_dict(_weights(tensors), strict=False)
    mask = torch.tensor(tokens != 0)
    states = model(torch.tensor(tokens), attention_mask=mask.long()).last_hidden_state * mask[..., None]
    return {"text": (states.sum(1) / mask.sum(1, keepdim=True)).detach().numpy()}


ORIGINALS: dict[str, Callable[[str, Any, np.ndarray], Stages]] = {
    "resnet": _timm_resnet,
    "hf_resnet": _backbone_folder,
    "hf_swin": _backbone_folder,
    "efficientnet_lite0": _lite0,
    "hf_clip_text": _clip_folder,
    "minilm": _minilm,
    "hf_mask2former": _mask2former_folder,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mqformer_jax.convert.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="the original checkpoint")
    parser.add_argument("--from", dest="family", help="its family; guessed if left out")
    parser.add_argument("--image", help="a photo for both to look at (default: noise)")
    args = parser.parse_args()
    image = None
    if args.image:
        image = cv2.imread(args.image)
        if image is None:
            raise ValueError(f"--image {args.image}: no image could be read there.")
        image = image[..., ::-1]
    print(f"{'stage':24} {'largest difference':>20} {'largest value':>15}")
    for stage, difference, largest in verify(args.input, args.family, image):
        print(f"{stage:24} {difference:20.2e} {largest:15.3g}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"mqformer_jax.convert.verify: {e}")
