"""Run an export of `mqformer export` on one image, without mqformer_jax.

    python serve.py exported/demo image.npy prompts.npy predictions.npz

It needs jax, numpy, safetensors and flatbuffers.
image.npy: uint8 RGB [h, w, 3]. prompts.npy: float32 [prompts, e], as docs/tasks.md makes it.
"""

import json
import pathlib
import sys

import jax
import jax.export
import numpy as np
from safetensors.numpy import load_file

folder = pathlib.Path(sys.argv[1])
about = json.loads((folder / "export.json").read_text())
weights = jax.device_put(load_file(folder / about["weights"]))
segment = jax.jit(jax.export.deserialize((folder / "segment.stablehlo").read_bytes()).call)
takes = about["functions"]["segment"]["inputs"]


def predict(image, prompts):
    """Predict one image and its embedded prompts -> class_probs [q, prompts], boxes [q, 4], masks [q, h, w] (see
    export.json).
    """
    canvas = np.full(takes["image"]["shape"], about["image"]["pad"], np.uint8)
    scale = min(canvas.shape[1] / image.shape[0], canvas.shape[2] / image.shape[1])
    size = [max(1, round(side * scale)) for side in image.shape[:2]]
    resized = jax.image.resize(image.astype(np.float32), (*size, 3), "linear", antialias=scale < 0.5)
    canvas[0, : size[0], : size[1]] = np.rint(resized)
    sizes = np.full(takes["size"]["shape"], canvas.shape[1:3], np.int32)
    sizes[0] = size
    padded, valid = np.zeros(takes["prompt_embeddings"]["shape"], np.float32), np.zeros(takes["valid"]["shape"], bool)
    padded[0, : len(prompts)], valid[0, : len(prompts)] = prompts, True
    probs, boxes, masks = jax.device_get(segment(weights, canvas, sizes, padded, valid))
    return probs[0, :, : len(prompts)], boxes[0], masks[0]


probs, boxes, masks = predict(np.load(sys.argv[2]), np.load(sys.argv[3]))
np.savez(sys.argv[4], class_probs=probs, boxes=boxes, masks=masks)
