"""Compare predictions with Hugging Face's Mask2Former (PyTorch) on this CPU: latency, memory and startup time.

    pip install -e '.[parity]'
    python benchmarks/predict.py [--size=512] [--runs=5] [--batch=1] [--rows=theirs,like,recipe] \\
        [--checkpoint=runs/demo]

A prediction turns a uint8 image of 480 x 640 pixels into panoptic segments of that size. It consists of preprocessing,
network and post-processing. All models have 133 classes and random weights, except that of --checkpoint. The object
mask threshold is set so that about 20 queries compete for pixels in each model. Each row runs in a separate process, so
that torch and XLA do not affect each other. "memory" is the peak resident memory of the process. Rows of the table:

- "Mask2Former": ResNet-50, 6 encoder and 9 decoder layers, 100 queries, three levels.
- "ours, like for like": configs/coco_ref.py with these numbers, 25 learnable and 75 conditional queries. Prompt
  embeddings are cached, as in normal use.
- "ours, the recipe": configs/coco_ref.py with 100 learnable and 300 conditional queries and four levels.
- "the checkpoint": the model of --checkpoint at the input size (canvas) of its recipe.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_SIZE = flags.DEFINE_integer("size", 512, "Side of the network's input in pixels, except for --checkpoint.")
_RUNS = flags.DEFINE_integer("runs", 5, "Number of timed predictions after the first one; the median is reported.")
_BATCH = flags.DEFINE_integer("batch", 1, "Images per prediction.")
_ROWS = flags.DEFINE_list("rows", ["theirs", "like", "recipe"], "Rows of the table to measure.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a trained model, which adds a row.")
_ROW = flags.DEFINE_string("row", None, "Measure only this row in this process; the script itself uses it.")
CLASSES, KEPT = 133, 20  # classes; queries that compete for pixels
NAMES = {
    "theirs": "Mask2Former",
    "like": "ours, like for like",
    "recipe": "ours, the recipe",
    "checkpoint": "the checkpoint",
}


def main(_: list[str]) -> None:
    if _ROW.value:
        print(json.dumps(measured(_ROW.value)))
        return
    rows = [*_ROWS.value, *(["checkpoint"] if _CHECKPOINT.value else [])]
    print(f"{_SIZE.value} x {_SIZE.value}, batch {_BATCH.value}, {CLASSES} classes, float32, {os.cpu_count()} CPUs")
    print(
        "| | s, median (range) | images/s | speed relative to first row | first prediction, s | memory, GB |\n"
        "|---|---|---|---|---|---|"
    )
    baseline = None
    for row in rows:
        done = subprocess.run([sys.executable, *sys.argv, f"--row={row}"], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        typical = float(np.median(found["seconds"]))
        baseline = baseline or typical
        spread = f"{typical:.3f} ({min(found['seconds']):.3f} to {max(found['seconds']):.3f})"
        rate = f"{_BATCH.value / typical:.2f} | {baseline / typical:.2f}"
        print(f"| {NAMES[row]} | {spread} | {rate} | {found['first']:.1f} | {found['memory']:.2f} |", flush=True)


def measured(row: str) -> dict[str, object]:
    """Return the seconds of the first prediction, those of the later ones, and the peak memory of this process in GB.

    The seconds of the first prediction include building the model.
    """
    started = time.perf_counter()
    predict = theirs() if row == "theirs" else ours(row)
    images = list(np.random.default_rng(0).integers(0, 256, (_BATCH.value, 480, 640, 3), np.uint8))
    seconds = []
    for _ in range(_RUNS.value + 1):
        begun = time.perf_counter() if seconds else started
        predict(images)
        seconds.append(time.perf_counter() - begun)
    return {
        "first": seconds[0],
        "seconds": seconds[1:],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def theirs() -> Callable[[list[np.ndarray]], object]:
    """Return a function that predicts panoptic segments with Mask2Former."""
    import torch
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        ResNetConfig,
    )

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    backbone = ResNetConfig(depths=[3, 4, 6, 3], out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=CLASSES, num_queries=100, encoder_layers=6, decoder_layers=10
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    size = {"height": _SIZE.value, "width": _SIZE.value}
    processor = Mask2FormerImageProcessor(size=size, do_rescale=True, do_normalize=True)

    @torch.inference_mode()
    def predict(images: list[np.ndarray]) -> object:
        outputs = model(**processor(images, return_tensors="pt"))
        scores = outputs.class_queries_logits.softmax(-1)[..., :-1].amax(-1).sort(-1, descending=True).values
        threshold = float(scores[:, KEPT].mean())
        sizes = [image.shape[:2] for image in images]
        return processor.post_process_panoptic_segmentation(outputs, threshold, 0.5, 0.8, target_sizes=sizes)

    return predict


def ours(row: str) -> Callable[[list[np.ndarray]], object]:
    """Return a function that predicts panoptic segments with a model of this project.

    row: "like", "recipe" or "checkpoint".
    """
    import jax
    from mqformer_jax.configs import coco_ref

    from mqformer_jax.inference.predictor import Predictor
    from mqformer_jax.models.build import build_model
    from mqformer_jax.models.tokenizer import make_tokenizer

    jax.config.update("jax_platforms", "cpu")
    if row == "checkpoint":
        predictor = Predictor.from_checkpoint(_CHECKPOINT.value)
    else:
        config = coco_ref.full()
        config.model.dtype, config.data.canvas, config.model.text.tokenizer = (
            "float32",
            (_SIZE.value, _SIZE.value),
            "words",
        )
        config.data.templates = ("{}",)
        if row == "like":
            config.model.update(num_learnable=25, num_conditional=75, strides=(8, 16, 32), encoder_ffn=1024)
        params, frozen = jax.jit(lambda key: build_model(config.model, key)[1:])(jax.random.key(0))
        predictor = Predictor(config, params, frozen, make_tokenizer(config.model.text))
    prompts = [f"class {i}" for i in range(CLASSES)]
    regions = [i >= 80 for i in range(CLASSES)]

    def predict(images: list[np.ndarray]) -> object:
        return predictor(images, prompts, "panoptic", regions, score=threshold)

    # set the threshold so that as many queries as in Mask2Former exceed it
    embedded = predictor.embed(prompts, regions)
    answer = predictor.predict_raw([np.zeros((480, 640, 3), np.uint8)], [embedded])[0]
    threshold = float(np.sort(answer.class_probs.max(1))[-min(KEPT, len(answer.class_probs))])
    return predict


if __name__ == "__main__":
    app.run(main)
