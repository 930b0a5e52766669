"""Export a checkpoint as two functions that run without this package.

    mqformer export --checkpoint=runs/demo --output=exported/demo

The folder contains the functions `encode` (texts to embeddings) and `segment` (images and embeddings to masks) as
StableHLO for CPUs, GPUs and TPUs (`jax.export`), their weights, the tokenizer's file if there is one, and export.json,
which describes inputs and outputs. The script docs/serve.py runs `segment` on an image.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import mqformer_jax
from mqformer_jax import cli
from mqformer_jax.convert.files import write_safetensors
from mqformer_jax.inference.predictor import Predictor, PromptBatch
from mqformer_jax.input.batch import PAD
from mqformer_jax.interrupts import removed_on_exit
from mqformer_jax.models.mqformer import query_counts
from mqformer_jax.models.tokenizer import TOKENIZER
from mqformer_jax.parallel import rules

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = "weights.safetensors"
OUTPUTS = {"encode": ("prompt_embeddings",), "segment": ("class_probs", "boxes", "masks")}
PLACE = (
    "Resize the image by the factor min(canvas height / height, canvas width / width), bilinearly with pixel centers "
    "at halves (by area averaging if the factor is below one half), into the upper left corner of the canvas. "
    "Fill the rest with `pad`. `size` is the height and width of the resized image. "
    "Pass uint8 values: the function normalizes them."
)
MEANING = {
    "prompt_embeddings": "embedded prompts; `is_region` marks prompts that own one region instead of several segments",
    "class_probs": "probability of each prompt for each query, 0 to 1; learnable queries come first",
    "boxes": "cx, cy, w, h as fractions of the canvas",
    "masks": "mask logits on the canvas, at the lower resolution that `shape` gives; positive inside the mask",
}


def export(source: str, output: str, prompts: int = 32, batch: int = 1) -> int:
    """Export the checkpoint `source` to the folder `output` and return its size in bytes.

    A failed export leaves no folder. prompts, batch: the fixed numbers of prompts and of images per call; callers pad
    smaller inputs. Raises ValueError for an invalid argument or a missing package, OSError if files cannot be read or
    written.
    """
    if prompts < 1 or batch < 1:
        raise ValueError(f"--prompts={prompts} --batch={batch}: both must be at least 1.")
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("the export needs the package flatbuffers. Run pip install 'mqformer_jax[export]'.")
    predictor = Predictor.from_checkpoint(source)
    tokenizer = pathlib.Path(source, TOKENIZER)
    with _atomic_folder(output) as folder:
        exported = dict(_exported(predictor, prompts, batch))
        for name, (function, _) in exported.items():
            (folder / f"{name}.stablehlo").write_bytes(function.serialize())
        write_safetensors(str(folder / WEIGHTS), {name: np.asarray(x) for name, x in _named_weights(predictor).items()})
        if tokenizer.exists():
            shutil.copyfile(tokenizer, folder / TOKENIZER)
        about = describe(predictor.config, exported, tokenizer.exists())
        (folder / "export.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
        return sum(file.stat().st_size for file in folder.iterdir())


def _named_weights(predictor: Predictor) -> dict[str, jax.Array]:
    """Return the parameters and frozen constants by path. `encode` and `segment` take them as the first argument."""
    return rules.flatten_paths(predictor.params) | rules.flatten_paths(predictor.frozen)


def functions(predictor: Predictor) -> dict[str, Callable[..., tuple[jax.Array, ...]]]:
    """Return the exported functions {name: function}. They take `_named_weights` first and return float32 arrays."""

    def trees(weights: dict[str, Any]) -> Iterator[Any]:
        for tree in (predictor.params, predictor.frozen):
            yield rules.filled(tree, weights)

    def encode(weights, tokens, is_region):
        params, frozen = trees(weights)
        return (
            predictor.embed_vectors(params, frozen, predictor.encode_tokens(params, frozen, tokens), is_region).astype(
                jnp.float32
            ),
        )

    def segment(weights, image, size, prompt_embeddings, valid):
        raw = predictor.forward(*trees(weights), image, size, PromptBatch(prompt_embeddings, valid))
        return tuple(x.astype(jnp.float32) for x in raw)

    return {"encode": encode, "segment": segment}


def inputs(config: ConfigDict, prompts: int, batch: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Return {function: {input: shape and dtype}} for all inputs except the weights."""
    text, struct = config.model.text, jax.ShapeDtypeStruct
    return {
        "encode": {"tokens": struct((prompts, text.context), jnp.int32), "is_region": struct((prompts,), bool)},
        "segment": {
            "image": struct((batch, *config.data.canvas, 3), jnp.uint8),
            "size": struct((batch, 2), jnp.int32),
            "prompt_embeddings": struct((batch, prompts, text.embed_dim), jnp.float32),
            "valid": struct((batch, prompts), bool),
        },
    }


def _exported(predictor: Predictor, prompts: int, batch: int) -> Iterator[tuple[str, tuple[jax.export.Exported, dict]]]:
    """Export `encode` and `segment`. Yield (name, (exported function, its entry of `inputs`)) for each."""
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in _named_weights(predictor).items()}
    specs = inputs(predictor.config, prompts, batch)
    for name, function in functions(predictor).items():
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(weights, *specs[name].values())
        yield name, (exported, specs[name])


def describe(config: ConfigDict, exported: dict[str, tuple[jax.export.Exported, dict]], tokenizer: bool) -> dict:
    """Return the contents of export.json.

    exported: the items of `_exported`. tokenizer: whether the export contains a tokenizer file.
    """
    array = lambda x: {"shape": list(x.shape), "dtype": str(np.dtype(x.dtype))}
    about = {}
    for name, (function, specs) in exported.items():
        outputs = {key: array(x) | {"meaning": MEANING[key]} for key, x in zip(OUTPUTS[name], function.out_avals)}
        about[name] = {
            "file": f"{name}.stablehlo",
            "inputs": {key: array(x) for key, x in specs.items()},
            "outputs": outputs,
        }
    learnable, conditional = query_counts(config.model)
    names = ("object_mask_threshold", "overlap_threshold", "max_detections", "crop_masks", "no_target_threshold")
    thresholds = {name: config.eval[name] for name in names}
    return {
        "made_by": f"mqformer_jax {mqformer_jax.__version__}, jax {jax.__version__}",
        "platforms": list(PLATFORMS),
        "weights": WEIGHTS,
        "functions": about,
        "image": {"canvas": list(config.data.canvas), "pad": PAD, "place": PLACE},
        "text": {
            "tokenizer": config.model.text.tokenizer,
            "file": TOKENIZER if tokenizer else None,
            "context": config.model.text.context,
            "templates": list(config.data.templates),
        },
        "queries": {"learnable": learnable, "conditional": conditional},
        "thresholds": thresholds,
    }


@contextmanager
def _atomic_folder(output: str) -> Generator[pathlib.Path]:
    """Yield a temporary folder, which is renamed to `output` on success and removed on failure."""
    if os.path.lexists(output):
        raise FileExistsError(f"--output={output} already exists; remove it, or give another folder.")
    folder = pathlib.Path(f"{os.path.abspath(output)}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        with removed_on_exit(folder):
            yield folder
        folder.rename(os.path.abspath(output))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mqformer export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="Workdir of a training run or folder of a converted model, e.g. runs/demo. Required.",
    )
    parser.add_argument("--output", required=True, help="Folder to write, e.g. exported/demo. Required.")
    parser.add_argument(
        "--prompts", type=int, default=32, help="Fixed number of prompts per call, e.g. 16. (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="Fixed number of images per call, e.g. 4. (default: %(default)s)"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    size = export(args.checkpoint, args.output, args.prompts, args.batch)
    print(
        f"{args.output}: {size / 1e6:.1f} MB. export.json describes the inputs and outputs; "
        "docs/serve.py runs `segment` on an image."
    )


def run(argv: Sequence[str]) -> None:
    cli.run_parsed(arguments(), main, "stopped; nothing was written.", argv)
