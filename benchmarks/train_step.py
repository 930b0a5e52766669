"""Compare the speed of the train step with that of Hugging Face's Mask2Former (PyTorch), or profile the train step.

    pip install -e '.[parity]'
    python benchmarks/train_step.py [--size=512] [--batch=1] [--steps=5] [--device=cpu|gpu] [--profile]

All models start from random weights. A step consists of a forward pass, the loss with its matching, a backward pass,
gradient clipping and AdamW, on images of the same size with the same number of targets. Rows of the table:

- "Mask2Former": ResNet-50 with frozen BatchNorm, 6 encoder and 9 decoder layers, 100 queries, three levels, 12,544
  points, 133 classes.
- "ours, like for like": configs/coco_ref.py with these numbers, 25 learnable and 75 conditional queries, a frozen text
  encoder (its vectors are given), no denoising and no recomputation. Its loss also covers the encoder's proposals.
- "ours, the recipe": configs/coco_ref.py with --size, --batch and --dtype. It has 100 learnable and 300 conditional
  queries, four levels, 160 prompts, up to 100 targets, a trained text encoder and 100 denoising queries.

The models run one step each in turn. "s/step" is the median over --steps steps, after a first one, which compiles. "CPU
s/step" is the processor time of all threads, which depends less on other work on the machine. --profile traces the
like-for-like row and sums the time of its operations by part of the model and by source file.
"""

from __future__ import annotations

import collections
import glob
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from absl import app, flags

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Otherwise, torch's idle threads spin, which makes a machine with other work three times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory of the GPU for torch
import jax  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from mqformer_jax.configs import coco_ref  # noqa: E402

from mqformer_jax.input.batch import Batch  # noqa: E402
from mqformer_jax.parallel.mesh import make_mesh  # noqa: E402
from mqformer_jax.training.step import TrainStep  # noqa: E402

_SIZE = flags.DEFINE_integer("size", 512, "Side of the images in pixels.")
_BATCH = flags.DEFINE_integer("batch", 1, "Images per step.")
_STEPS = flags.DEFINE_integer("steps", 5, "Number of timed steps; the median is reported.")
_TARGETS = flags.DEFINE_integer("targets", 20, "Targets per image.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type in which all models compute; torch uses autocast."
)
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Device of all models.")
_ROWS = flags.DEFINE_list("rows", ["theirs", "like", "recipe"], "Rows of the table to measure.")
_PROFILE = flags.DEFINE_bool("profile", False, "Also trace the like-for-like row and print the time by source file.")
CLASSES = 133


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cuda" if _DEVICE.value == "gpu" else "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_traceback_in_locations_limit", 100)  # keep all callers in the profile
    device = jax.devices()[0].device_kind
    print(
        f"{_SIZE.value} x {_SIZE.value}, batch {_BATCH.value}, {_TARGETS.value} targets, {_DTYPE.value}, {device}, "
        f"{os.cpu_count()} CPUs"
    )
    rows = {
        "theirs": ("Mask2Former", theirs),
        "like": ("ours, like for like", lambda: Ours(like_for_like())),
        "recipe": ("ours, the recipe", lambda: Ours(recipe())),
    }
    steps, first = {}, {}
    for name in _ROWS.value:
        steps[name] = rows[name][1]()
        first[name] = timed(steps[name])[0]
    taken = {name: [] for name in steps}
    for _ in range(_STEPS.value):  # in turn, so that other work on the machine slows all models equally
        for name, step in steps.items():
            taken[name].append(timed(step))

    print("| | s/step | range | CPU s/step | images/s | speed relative to Mask2Former | first step, s | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for name, results in taken.items():
        seconds, cpu, loss = np.array(results).T
        typical = np.median(seconds)
        ratio = np.median([row[0] for row in taken["theirs"]]) / typical if "theirs" in taken else np.nan
        spread = f"{seconds.min():.2f} to {seconds.max():.2f} | {np.median(cpu):.1f}"
        rate = f"{_BATCH.value / typical:.3f} | {ratio:.2f}"
        print(f"| {rows[name][0]} | {typical:.2f} | {spread} | {rate} | {first[name]:.0f} | {loss[-1]:.1f} |")
    if _PROFILE.value:
        profile(steps["like"])


def timed(step: Callable[[], float]) -> tuple[float, float, float]:
    """Run a step. Return its time in seconds, its processor time in seconds, and its loss.

    `step` returns the loss as a number, so it waits until the device has finished.
    """
    started, cpu = time.perf_counter(), time.process_time()
    loss = step()
    return time.perf_counter() - started, time.process_time() - cpu, loss


# --- ours


def recipe() -> ConfigDict:
    """Return the recipe with the sizes and types of the flags."""
    config = coco_ref.full()
    config.batch_size = _BATCH.value
    config.model.dtype = _DTYPE.value
    config.data.canvas = (_SIZE.value, _SIZE.value)
    return config


def like_for_like() -> ConfigDict:
    """Return the recipe with the numbers of Mask2Former."""
    config = recipe()
    config.model.update(num_learnable=25, num_conditional=75, strides=(8, 16, 32), encoder_ffn=1024, remat="none")
    config.denoising.num_queries = 0
    config.optimizer.text_lr_mult = 0.0
    config.data.update(max_targets=_TARGETS.value, max_prompts=CLASSES)
    return config


class Ours:
    """A train step of a config on random images. Each call updates the weights and returns the loss."""

    def __init__(self, config: ConfigDict):
        self.step = TrainStep(config, make_mesh((1, 1, 1), jax.devices()[:1]))
        self.state = self.step.init()
        self.batch = self.step.put(made_up(self.step.arguments[1]))

    def __call__(self) -> float:
        self.state, metrics = self.step(self.state, self.batch)
        return float(metrics["total"])


def made_up(shapes: Batch) -> Batch:
    """Return a batch of random images, in which each target is a rectangle. shapes: an abstract batch."""
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    b, (h, w), n = batch.image.shape[0], batch.image.shape[1:3], _TARGETS.value
    top, left, height, width = rectangles(rng, (b, n), h, w)
    batch.boxes[:, :n] = np.stack([(left + width / 2) / w, (top + height / 2) / h, width / w, height / h], -1)
    rows, columns = (4 * np.arange(side // 4)[None, None] for side in (h, w))
    inside = lambda cells, first, size: (cells >= first[..., None]) & (cells < (first + size)[..., None])
    masks = inside(rows, top, height)[..., None] & inside(columns, left, width)[:, :, None]
    batch.masks[:, :n] = np.packbits(masks, axis=-1)
    batch.positive[np.arange(b)[:, None], np.arange(n), rng.integers(0, CLASSES, (b, n))] = True
    batch.has_mask[:, :n] = True
    tokens = (
        rng.integers(1, 400, batch.tokens.shape)
        if batch.tokens.dtype.kind == "i"
        else rng.normal(size=batch.tokens.shape)
    )
    return batch.replace(
        image=rng.integers(0, 256, batch.image.shape, np.uint8), size=np.full_like(batch.size, (h, w)),
        tokens=tokens.astype(batch.tokens.dtype),
        prompt_valid=~batch.prompt_valid, prompt_exhaustive=~batch.prompt_exhaustive,
        num_targets=np.full_like(batch.num_targets, n),
    )  # fmt: skip


def rectangles(rng: np.random.Generator, shape: tuple[int, ...], h: int, w: int) -> tuple[np.ndarray, ...]:
    """Return arrays of this shape: top, left, height and width of random rectangles in an image of h x w pixels.

    A rectangle is at most half as high and half as wide as the image.
    """
    height, width = rng.integers(1, h // 2, shape), rng.integers(1, w // 2, shape)
    return rng.integers(0, h - height), rng.integers(0, w - width), height, width


# --- theirs


def theirs() -> Callable[[], float]:
    """Return a function that runs a step of Mask2Former on random images. Each call updates the weights."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    torch.set_float32_matmul_precision("high")  # allows TF32, as JAX does
    device, size = {"cpu": "cpu", "gpu": "cuda"}[_DEVICE.value], _SIZE.value
    backbone = ResNetConfig(depths=[3, 4, 6, 3], out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=CLASSES, num_queries=100, encoder_layers=6, decoder_layers=10
    )
    model = Mask2FormerForUniversalSegmentation(config).train().to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # frozen, as in every recipe of the family
            module.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05, fused=True)

    rng = np.random.default_rng(0)
    pixels = torch.rand(_BATCH.value, 3, size, size, device=device)
    masks, classes = [], []
    for _ in range(_BATCH.value):
        mask = np.zeros((_TARGETS.value, size, size), np.float32)
        for row, top, left, height, width in zip(mask, *rectangles(rng, (_TARGETS.value,), size, size)):
            row[top : top + height, left : left + width] = 1
        masks.append(torch.from_numpy(mask).to(device))
        classes.append(torch.from_numpy(rng.integers(0, CLASSES, _TARGETS.value)).to(device))

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=_DTYPE.value == "bfloat16"):
            loss = model(pixel_values=pixels, mask_labels=masks, class_labels=classes).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        return loss.item()

    return step


# --- profile


def profile(ours: Ours) -> None:
    """Print the time of one step's operations by part of the model and source file (see `sources`)."""
    where = sources(ours.step.compiled.lower(*ours.step.arguments).compile().as_text())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            ours()
        (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        spent = collections.Counter()
        for name, seconds in operations(jax.profiler.ProfileData.from_file(path)):
            spent[where.get(name, "elsewhere")] += seconds
    total = sum(spent.values())
    print(f"\noperations of one step: {total:.2f} s")
    for name, seconds in spent.most_common(25):
        print(f"  {seconds:7.3f} s {100 * seconds / total:5.1f} %  {name}")


def operations(trace: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
    """Yield the name and seconds of each operation of a trace, except operations that contain other operations."""
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                if not re.match(r"(while|call|conditional)\b", event.name) and any(
                    key == "hlo_op" for key, _ in event.stats
                ):
                    yield event.name, event.duration_ns / 1e9


def sources(hlo: str) -> dict[str, str]:
    """Map the name of each operation of a compiled step to "part of the model: file", using its stack frames.

    The file is the innermost file of this package. The part of the model is the outermost one, not counting the files
    of the step, the mesh and the whole model. hlo: the text of the compiled step.
    """
    table = lambda name: re.search(rf"^{name}\n((?:\d+ .*\n)+)", hlo, re.M)[1].splitlines()
    files = {line.split(" ", 1)[0]: line.split(" ", 1)[1].strip('"') for line in table("FileNames")}
    places = dict(re.match(r"(\d+) \{file_name_id=(\d+)", line).groups() for line in table("FileLocations"))
    frames = [
        re.match(r"\d+ \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", line).groups("0")
        for line in table("StackFrames")
    ]
    nobody = int(frames[0][1])  # the first frame has no caller; JAX 0.10 counts callers from one, so this is 1

    def told(frame: int, name: str) -> str:
        path = []
        while frame > 0:
            place, caller = frames[frame - 1]
            path.append(files[places[place]])
            frame = int(caller) - nobody
        ours = [file.split("mqformer_jax/")[-1] for file in path if "mqformer_jax/" in file]
        inner = [file for file in ours if file not in ("train_step.py", "models/mqformer.py", "parallel/mesh.py")]
        optimizer = "the step itself (optimizer)" if path else "elsewhere"
        return (f"{inner[-1]}: {inner[0]}" if inner else optimizer) + (", backward" if "transpose(" in name else "")

    pattern = r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{.*?op_name="([^"]*)".*?stack_frame_id=(\d+)'
    return {op: told(int(frame), name) for op, name, frame in re.findall(pattern, hlo, re.M)}


if __name__ == "__main__":
    app.run(main)
