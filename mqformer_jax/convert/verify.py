"""Compare the outputs of a converted model with those of the original code, stage by stage.

    python -m mqformer_jax.convert.verify --input FILE_OR_FOLDER [--converted FOLDER] [--image photo.jpg]

Stages are the features of the backbone, the outputs of the pixel decoder, or the output of the text encoder.
--converted is a folder that `mqformer convert` wrote. Without it, the original is converted in memory.

This requires torch and the package with the original code: transformers (for Hugging Face folders with a config.json,
and for MiniLM), timm (for ResNets), clip-anytorch, or efficientnet_lite_pytorch. No package contains the original code
of Mask DINO, Mask2Former, OpenSeeD or the Swin for detection (timm's Swin differs: it shifts windows before it pads
them). For Mask DINO, tests/test_maskdino.py compares this project's outputs with recorded outputs of the original code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from mqformer_jax.checkpoint import load_weights
from mqformer_jax.convert.convert import plan_of
from mqformer_jax.convert.rules import Tensors, apply, fill, leaves, prefix_of
from mqformer_jax.models.backbone import make_backbone
from mqformer_jax.models.pixel_decoder import PixelDecoder
from mqformer_jax.models.text_encoder import make_text_encoder

Stages = dict[str, np.ndarray]
# takes {path: shape and type} of parameters, returns {path: value}, from which some may be missing
Leaves = Callable[[Mapping[str, jax.ShapeDtypeStruct]], Mapping[str, Any]]
SIDES = 256, 320  # height and width of the test image


def verify(
    path: str, family: str | None = None, image: np.ndarray | None = None, converted: str | None = None
) -> list[tuple[str, float, float]]:
    """Return for each stage its name, the largest absolute difference, and the largest absolute value of the original.

    path: the original checkpoint. family: the name of its family (default: determined from the tensor names). image:
    RGB uint8 of any size (default: noise). converted: the folder that `convert` wrote for `path` (default: convert in
    memory). Raises ValueError if a checkpoint does not fit, if no package contains the family's original code, or if
    the package is not installed, and OSError if a file cannot be read.
    """
    name, plan, tensors = plan_of(path, family)
    if name not in ORIGINALS:
        raise ValueError(
            f"{path}: the original code of the family {name} is not in a package; "
            f"families that can be verified are {', '.join(ORIGINALS)}."
        )
    if converted is None:
        config, values = plan.config.model, lambda wanted: apply(plan, tensors, wanted)[0]
    else:
        weights = load_weights(converted)
        config, found = weights.config.model, leaves(weights.params) | leaves(weights.frozen)
        values = lambda wanted: found
    rng = np.random.default_rng(0)
    if plan.part == "text_encoder":
        given = _tokens(plan.config.model.text, rng)
        ours = lambda: {
            "text": _module(values, "text_encoder", lambda rngs: make_text_encoder(config.text, rngs, jnp.float32))(
                given
            )
        }
    else:
        backbone = _module(values, "backbone", lambda rngs: make_backbone(config.backbone, "none", rngs, jnp.float32))
        image = rng.integers(0, 256, (*SIDES, 3), np.uint8) if image is None else image
        image = cv2.resize(image, SIDES[::-1], interpolation=cv2.INTER_AREA)
        given = ((image - np.array(backbone.mean)) / np.array(backbone.std)).astype(np.float32)[None]
        ours = lambda: _image_stages(values, config, backbone, given, whole=not plan.part)
    with _torch().inference_mode():
        theirs = ORIGINALS[name](path, tensors, given)
    mine = ours()
    return [
        (stage, float(np.abs(mine[stage] - value).max()), float(np.abs(value).max())) for stage, value in theirs.items()
    ]


def _module(values: Leaves, part: str, make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    wanted = {f"{part}/{path}": leaf for path, leaf in leaves(nnx.to_pure_dict(nnx.split(module)[1])).items()}
    found = values(wanted)
    absent = [path for path, leaf in wanted.items() if path not in found or found[path].shape != leaf.shape]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(wanted)} parameters of the {part} are missing or have another shape "
            f"({absent[0]}, ...): see the report of `mqformer convert`."
        )
    return fill(module, found, part)


def _compiled(module: nnx.Module, call: Callable[..., Any], x: Any) -> Any:
    """Compile `call(module, x)` with the weights as arguments, and return its result.

    Weights that are constants trigger a bug of XLA:CPU (jaxlib 0.10.2 to 0.12.0): if XLA fuses a reduction with a
    product by a uniform constant, such as the zeros of a fresh layer, the result is sometimes NaN.
    """
    graph, state = nnx.split(module)
    return jax.jit(lambda state, x: call(nnx.merge(graph, state), x))(state, x)


def _image_stages(
    values: Leaves, config: ConfigDict, backbone: nnx.Module, pixels: Float[np.ndarray, "1 h w 3"], whole: bool
) -> Stages:
    """Return the features of the backbone and, for a complete model (`whole`), the outputs of the pixel decoder."""
    features = _compiled(backbone, lambda backbone, x: backbone(x), pixels)
    stages = {f"stride {stride}": np.asarray(value) for stride, value in features.items()}
    if whole:
        c = config
        make = lambda rngs: PixelDecoder(
            backbone.channels,
            c.width,
            c.heads,
            c.num_sampling_points,
            c.encoder_layers,
            c.encoder_ffn,
            c.strides,
            c.mask_dim,
            c.mask_stride,
            rngs=rngs,
        )
        decoder = _module(values, "pixel_decoder", make)
        memory, masks = _compiled(decoder, lambda decoder, f: decoder(f, np.array([SIDES]), SIDES), features)
        cuts = np.cumsum([h * w for h, w in memory.shapes])[:-1]
        for stride, shape, level in zip(c.strides, memory.shapes, np.split(np.asarray(memory.tokens), cuts, 1)):
            stages[f"memory at stride {stride}"] = level.reshape(1, *shape, -1)
        stages["mask features"] = np.asarray(masks)
    return stages


def _tokens(text: ConfigDict, rng: np.random.Generator) -> Int[np.ndarray, "4 l"]:
    """Return the token ids of four random texts of different lengths.

    Each text ends with CLIP's end token, the highest id, and is padded with zeros.
    """
    length = min(text.context, 16)
    tokens = rng.integers(1, text.vocab_size - 2, (4, length))
    for row, end in enumerate((3, 5, length - 2, length - 1)):
        tokens[row, end:] = 0
        tokens[row, end] = text.vocab_size - 1
    return tokens


def _torch():
    return _package("torch")


def _package(module: str, name: str | None = None):
    """Import and return a module. Raises ValueError if it is not installed.

    name: the package to install with pip (default: `module`).
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        name = name or module
        raise ValueError(f"the original code requires the package {name} ({e}): run `pip install {name}`.") from e


def _nhwc(x) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def _nchw(pixels: np.ndarray):
    return _torch().tensor(pixels.transpose(0, 3, 1, 2))


def _weights(tensors: Tensors, known: str = "") -> dict:
    """Return the tensors as torch tensors in float32, by name.

    known: a tensor name of the original code. If the checkpoint has this name with a prefix, only tensors with this
    prefix are returned, and the prefix is removed. Raises ValueError if the checkpoint does not have this name.
    """
    prefix = prefix_of({key: () for key in tensors}, known) if known else ""
    if prefix is None:
        raise ValueError(f"no tensor is named {known}: give a file with the tensor names of the original code.")
    return {
        key.removeprefix(prefix): _torch().tensor(np.asarray(value, np.float32))
        for key, value in tensors.items()
        if key.startswith(prefix)
    }


def _load(module, weights: dict, unused: tuple[str, ...] = ()) -> None:
    """Load weights into a torch module. Raises ValueError if the module has tensors that `weights` lacks.

    unused: prefixes of the names of tensors that do not affect the outputs that are compared. These may be missing.
    """
    kept = {key: value for key, value in weights.items() if not key.startswith(unused)}
    absent = [key for key in module.load_state_dict(kept, strict=False).missing_keys if not key.startswith(unused)]
    if absent := [key for key in absent if not key.endswith("num_batches_tracked")]:
        raise ValueError(
            f"{len(absent)} tensors of the original model are missing ({absent[0]}, ...): give the complete file."
        )


def _from_folder(path: str, model: str, **settings: Any):
    """Return the model in a local Hugging Face folder. Raises ValueError if transformers cannot load it.

    model: the name of its class in transformers.
    """
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path}: transformers loads models from folders; give the folder with its config.json.")
    transformers = _package("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return getattr(transformers, model).from_pretrained(path, local_files_only=True, **settings).eval()
    except (OSError, RuntimeError, ValueError) as e:
        raise ValueError(f"{path}: transformers cannot load it as a {model}: {str(e).strip().splitlines()[0]}") from e


def _backbone_folder(model: str) -> Callable[[str, Tensors, np.ndarray], Stages]:
    def stages(path: str, tensors: Tensors, pixels: np.ndarray) -> Stages:
        maps = _from_folder(path, model, out_features=["stage1", "stage2", "stage3", "stage4"])(
            _nchw(pixels)
        ).feature_maps
        return {f"stride {4 << k}": _nhwc(x) for k, x in enumerate(maps)}

    return stages


def _mask2former_folder(path: str, tensors: Tensors, pixels: np.ndarray) -> Stages:
    out = _from_folder(path, "Mask2FormerModel").pixel_level_module(_nchw(pixels), output_hidden_states=True)
    stages = {f"stride {4 << k}": _nhwc(x) for k, x in enumerate(out.encoder_hidden_states)}
    stages |= {f"memory at stride {32 >> k}": _nhwc(x) for k, x in enumerate(out.decoder_hidden_states)}
    return stages | {"mask features": _nhwc(out.decoder_last_hidden_state)}


def _timm_resnet(path: str, tensors: Tensors, pixels: np.ndarray) -> Stages:
    weights = _weights(tensors, "layer1.0.conv1.weight")
    depth = 50 if "layer3.6.conv1.weight" not in weights else 101
    model = _package("timm").create_model(f"resnet{depth}", features_only=True).eval()
    _load(model, weights, ("fc.",))
    return {f"stride {4 << k}": _nhwc(x) for k, x in enumerate(model(_nchw(pixels))[1:])}


def _lite0(path: str, tensors: Tensors, pixels: np.ndarray) -> Stages:
    model = _package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    _load(model, _weights(tensors), ("_conv_head.", "_bn1.", "_fc."))
    x, stages = model._swish(model._bn0(model._conv_stem(_nchw(pixels)))), {}
    for k, block in enumerate(model._blocks):
        x = block(x)
        if k in (2, 4, 10, 15):  # the last blocks at strides 4, 8, 16 and 32
            stages[f"stride {SIDES[0] // x.shape[2]}"] = _nhwc(x)
    return stages


def _clip(path: str, tensors: Tensors, tokens: np.ndarray) -> Stages:
    if not any(key.startswith("visual.") for key in tensors):
        raise ValueError(
            f"{path}: OpenAI's code needs both encoders, but this file has only the text encoder: "
            "give the complete CLIP file."
        )
    weights = {
        key: value
        for key, value in _weights(tensors).items()
        if key not in ("input_resolution", "context_length", "vocab_size")
    }
    model = _package("clip.model", "clip-anytorch").build_model(dict(weights)).float()
    model.load_state_dict(weights)  # load them again, since build_model rounds them to half precision
    rest = len(tensors["positional_embedding"]) - tokens.shape[1]
    return {"text": model.encode_text(_torch().tensor(np.pad(tokens, ((0, 0), (0, rest))))).numpy()}


def _clip_folder(path: str, tensors: Tensors, tokens: np.ndarray) -> Stages:
    return {"text": _from_folder(path, "CLIPTextModelWithProjection")(_torch().tensor(tokens)).text_embeds.numpy()}


def _minilm(path: str, tensors: Tensors, tokens: np.ndarray) -> Stages:
    transformers, torch = _package("transformers"), _torch()
    weights = _weights(tensors, "embeddings.word_embeddings.weight")
    depth = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layer."))
    vocabulary = len(weights["embeddings.word_embeddings.weight"])
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=384,
            num_hidden_layers=depth,
            num_attention_heads=12,
            intermediate_size=1536,
        )
    ).eval()
    _load(model, weights, ("pooler.",))
    mask = torch.tensor(tokens != 0)
    states = model(torch.tensor(tokens), attention_mask=mask.long()).last_hidden_state * mask[..., None]
    return {"text": (states.sum(1) / mask.sum(1, keepdim=True)).numpy()}


ORIGINALS: dict[str, Callable[[str, Tensors, np.ndarray], Stages]] = {
    "resnet": _timm_resnet,
    "hf_resnet": _backbone_folder("ResNetBackbone"),
    "hf_swin": _backbone_folder("SwinBackbone"),
    "efficientnet_lite0": _lite0,
    "clip_text": _clip,
    "hf_clip_text": _clip_folder,
    "minilm": _minilm,
    "hf_mask2former": _mask2former_folder,
}


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mqformer_jax.convert.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, help="File or folder of the original checkpoint, e.g. resnet50.pth.")
    parser.add_argument("--from", dest="family", help="Family of the checkpoint, e.g. resnet. (default: detected)")
    parser.add_argument(
        "--converted", metavar="FOLDER", help="Folder that `mqformer convert` wrote. (default: convert in memory)"
    )
    parser.add_argument("--image", help="Test image, e.g. photo.jpg. (default: random noise)")
    return parser


def main() -> None:
    args = arguments().parse_args()
    image = None
    if args.image:
        image = cv2.imread(args.image)
        if image is None:
            raise ValueError(f"--image {args.image}: the file is missing or not an image; give an image file.")
        image = image[..., ::-1]
    rows = verify(args.input, args.family, image, args.converted)
    print(f"{'stage':24} {'largest difference':>20} {'largest value':>15}")
    for stage, difference, largest in rows:
        print(f"{stage:24} {difference:20.2e} {largest:15.3g}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"mqformer_jax.convert.verify: {e}")
