"""Export a checkpoint as two functions that run without this package.

    mqformer export --checkpoint=runs/demo --output=exported/demo

The folder holds the functions `encode` and `segment` as StableHLO for CPUs, GPUs and TPUs (`jax.export`), their
weights, the tokenizer's file if there is one, and export.json, which describes inputs and outputs. docs/serve.py runs
them.
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
    "Resized by min(canvas height / height, canvas width / width), bilinear with pixel centers at halves "
    "(averaged over areas where it shrinks to less than half), into the canvas' upper left corner; "
    "the rest is filled with `pad`. `size` is its height and width there. "
    "Bytes go in as they are: mean and standard deviation are inside."
)
MEANING = {
    "prompt_embeddings": "prompts as vectors; `is_region`: those that own one region, not several segments",
    "class_probs": "0 to 1, of every query for every prompt; learnable queries come first",
    "boxes": "cx, cy, w, h as fractions of the canvas",
    "masks": "logits on the canvas: above 0 is inside",
}


def export(source: str, output: str, prompts: int = 32, batch: int = 1) -> int:
    """Writes the checkpoint `source` as the folder `output`, whole or not at all; returns its bytes.

    prompts, batch: the shapes that the functions take; fewer are padded and marked. Raises ValueError or OSError in one
        line.
    """
    if prompts < 1 or batch < 1:
        raise ValueError(f"--prompts={prompts} --batch={batch}: both must be at least 1.")
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("an export is written with the package flatbuffers: pip install 'mqformer_jax[export]'.")
    predictor = Predictor.from_checkpoint(source)
    tokenizer = pathlib.Path(source, TOKENIZER)
    with _whole_folder(output) as folder:
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
    """Parameters and frozen constants by their paths: the first argument of both functions."""
    return rules.flatten_paths(predictor.params) | rules.flatten_paths(predictor.frozen)


def functions(predictor: Predictor) -> dict[str, Callable[..., tuple[jax.Array, ...]]]:
    """`Predictor`'s two functions, of named weights: `encode` and `segment`, which give float32."""

    def trees(weights: dict[str, Any]) -> Iterator[Any]:
        for tree in (predictor.params, predictor.frozen):
            yield rules.filled(tree, weights)

    def encode(weights, tokens, is_region):
        params, frozen = trees(weights)
        return (
            predictor._embed(params, frozen, predictor._encode(params, frozen, tokens), is_region).astype(jnp.float32),
        )

    def segment(weights, image, size, prompt_embeddings, valid):
        raw = predictor._forward(*trees(weights), image, size, PromptBatch(prompt_embeddings, valid))
        return tuple(x.astype(jnp.float32) for x in raw)

    return {"encode": encode, "segment": segment}


def inputs(config: ConfigDict, prompts: int, batch: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """What each function takes after the weights."""
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
    """(name, (the exported function, its inputs))."""
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in _named_weights(predictor).items()}
    takes = inputs(predictor.config, prompts, batch)
    for name, function in functions(predictor).items():
        yield (
            name,
            (jax.export.export(jax.jit(function), platforms=PLATFORMS)(weights, *takes[name].values()), takes[name]),
        )


def describe(config: ConfigDict, exported: dict[str, tuple[jax.export.Exported, dict]], tokenizer: bool) -> dict:
    """What export.json says."""
    array = lambda x: {"shape": list(x.shape), "dtype": str(np.dtype(x.dtype))}
    about = {}
    for name, (function, takes) in exported.items():
        gives = {key: array(x) | {"meaning": MEANING[key]} for key, x in zip(OUTPUTS[name], function.out_avals)}
        about[name] = {
            "file": f"{name}.stablehlo",
            "inputs": {key: array(x) for key, x in takes.items()},
            "outputs": gives,
        }
    learnable, conditional = query_counts(config.model)
    names = ("object_mask_threshold", "overlap_threshold", "max_detections", "no_target_threshold")
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
def _whole_folder(output: str) -> Generator[pathlib.Path]:
    """A folder that gets the name `output` once all of it is written, and is gone if that fails."""
    if os.path.lexists(output):
        raise FileExistsError(f"--output={output}: it is there already; remove it, or name another folder.")
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
        "--prompts", type=int, default=32, help="Number of prompts per call; fewer are padded. (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, help="Number of images per call. (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    size = export(args.checkpoint, args.output, args.prompts, args.batch)
    print(
        f"{args.output}: {size / 1e6:.1f} MB; export.json says what goes in and what comes out, "
        "docs/serve.py how to run it."
    )


def run(argv: Sequence[str]) -> None:
    cli.run_parsed(arguments(), main, "stopped; nothing was written.", argv)
