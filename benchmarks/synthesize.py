"""Measure the time per image of the teacher models of `mqformer synthesize`, at full size with random weights.

    pip install -e '.[teachers]'
    python benchmarks/synthesize.py --images=4

Images have 640 x 480 pixels and 12 boxes, each with two jittered copies, as in `mqformer synthesize`. Speed does not
depend on the weights. torch counts the FLOPs. "Quality tests" is the time outside of the teacher, mainly of the tests
that reject masks. Days are for 1.7 M images (Objects365). For this machine, they are computed from the measured time.
For a GPU, they are estimated as the larger of the teacher's FLOPs at 40 % of an A100's 312 TFLOP/s (bfloat16) and the
quality tests on 8 cores.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from absl import app, flags
from torch.utils.flop_counter import FlopCounterMode

from mqformer_jax.input.record import ClassInfo, DatasetInfo, Record, Segment
from mqformer_jax.synthesize import sam
from mqformer_jax.synthesize.captions import Captions
from mqformer_jax.synthesize.masks import Masks, Quality
from mqformer_jax.synthesize.rule_captioner import RuleCaptioner
from mqformer_jax.synthesize.teachers import Picture

_IMAGES = flags.DEFINE_integer("images", 4, "Number of timed images, after one that is not timed.")
_BOXES = flags.DEFINE_integer("boxes", 12, "Boxes per image.")
_ONLY = flags.DEFINE_list("only", [], "Teachers to time. (default: all)")
SIZE = 480, 640  # height and width of the images
OBJECTS365, GPU, CORES = 1.7e6, 0.4 * 312e12, 8  # images; FLOP/s; CPU cores
INFO = DatasetInfo("random", tuple(ClassInfo((name,)) for name in ("cat", "dog", "car", "person")), {})


def picture(seed: int, boxes: int) -> Picture:
    """Return a random image with this number of random boxes."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (boxes, 2, 2)) * SIZE[::-1], 1).reshape(boxes, 4)
    corners[:, 2:] = np.minimum(corners[:, 2:] + 8, SIZE[::-1])
    segments = tuple(Segment(int(rng.integers(4)), box=tuple(c.tolist())) for c in corners)
    image = np.kron(rng.integers(0, 255, (SIZE[0] // 20, SIZE[1] // 20, 3)), np.ones((20, 20, 1))).astype(np.uint8)
    return Picture(
        Record(str(seed), b"", *SIZE, segments), INFO, image, tuple(range(boxes)), corners.astype(np.float32)
    )


def saved(model_class: type, config: transformers.PreTrainedConfig, processor: object | None) -> str:
    """Save a model with random weights, and its processor, to a temporary folder. Return the folder."""
    folder = tempfile.mkdtemp()
    model_class(config).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    else:
        with open(os.path.join(folder, "preprocessor_config.json"), "w") as f:
            f.write("{}")
    return folder


def sam_vit_h() -> sam.Sam:
    vision = dict(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
        mlp_dim=5120,
    )
    config = transformers.SamConfig(vision_config=vision)
    return sam.Sam(saved(transformers.SamModel, config, transformers.SamImageProcessorPil()))


def sam_vit_b() -> sam.Sam:
    return sam.Sam(saved(transformers.SamModel, transformers.SamConfig(), transformers.SamImageProcessorPil()))


def sam2_tiny() -> sam.Sam2:
    return sam.Sam2(saved(transformers.Sam2Model, transformers.Sam2Config(), None))


def sam2_large() -> sam.Sam2:
    backbone = dict(
        model_type="sam2_hiera_det_model",
        hidden_size=144,
        num_attention_heads=2,
        blocks_per_stage=[2, 6, 36, 4],
        embed_dim_per_stage=[144, 288, 576, 1152],
        num_attention_heads_per_stage=[2, 4, 8, 16],
        window_size_per_stage=[8, 4, 16, 8],
        global_attention_blocks=[23, 33, 43],
        window_positional_embedding_background_size=[7, 7],
    )
    vision = dict(backbone_config=backbone, backbone_channel_list=[1152, 576, 288, 144])
    return sam.Sam2(saved(transformers.Sam2Model, transformers.Sam2Config(vision_config=vision), None))


TEACHERS: dict[str, Callable] = {
    "rules": lambda: RuleCaptioner(""),
    "sam2 hiera-tiny": sam2_tiny,
    "sam2 hiera-large": sam2_large,
    "sam vit-b": sam_vit_b,
    "sam vit-h": sam_vit_h,
}


class Timed:
    """Wrap a teacher and count the seconds spent in it."""

    def __init__(self, teacher: object):
        self.teacher, self.name, self.seconds = teacher, teacher.name, 0.0

    def __call__(self, *asked: object) -> object:
        started = time.perf_counter()
        answer = self.teacher(*asked)
        self.seconds += time.perf_counter() - started
        return answer


def main(_: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    columns = (
        "teacher",
        "parameters, M",
        "s per image",
        "quality tests, s per image",
        "GFLOP per image",
        "days here",
        "days on a GPU (estimate)",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in _ONLY.value or TEACHERS:
        teacher = TEACHERS[name]()
        timed = Timed(teacher)
        annotator = Masks(timed, Quality()) if name != "rules" else Captions(teacher)
        annotator([picture(0, _BOXES.value)])
        timed.seconds, started = 0.0, time.perf_counter()
        for seed in range(1, _IMAGES.value + 1):
            annotator([picture(seed, _BOXES.value)])
        seconds, asked = ((t / _IMAGES.value) for t in (time.perf_counter() - started, timed.seconds))
        row = [name, "–", f"{seconds:.2f}", "–", "–", f"{OBJECTS365 * seconds / 86400:,.0f}", "–"]
        if name != "rules":
            with FlopCounterMode(display=False) as counter:
                annotator([picture(0, _BOXES.value)])
            count, host = counter.get_total_flops(), seconds - asked
            row[1] = f"{sum(p.numel() for p in teacher.model.parameters()) / 1e6:.0f}"
            row[3], row[4] = f"{host:.3f}", f"{count / 1e9:,.0f}"
            row[6] = f"{OBJECTS365 * max(count / GPU, host / CORES) / 86400:.1f}"
        print(f"| {' | '.join(row)} |", flush=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    app.run(main)
