"""Compare masks that a teacher model predicts from boxes with the true masks of a data set.

    python benchmarks/masks_from_boxes.py --teacher=ours:runs/lite --data=coco_2017 --split=val

Run this before `mqformer synthesize`, on data similar to yours. It prints the mean IoU with the true masks, in percent,
for the accepted masks, for all masks and for two baselines: the whole box and the ellipse inside it. A mask is accepted
if it passes the quality tests of `mqformer synthesize`.
"""

from __future__ import annotations

import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from mqformer_jax.input.record import BadRecord, Record, decode_rle
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.synthesize.annotations import usable_box
from mqformer_jax.synthesize.masks import Masks, Quality
from mqformer_jax.synthesize.report import SIZES
from mqformer_jax.synthesize.teachers import MASK_TEACHERS, Picture, make_teacher

_TEACHER = flags.DEFINE_string(
    "teacher", None, "Teacher of masks, as for `mqformer synthesize`. Required.", required=True
)
_ROOT = flags.DEFINE_string("root", "data/records", "Folder of prepared data sets.")
_DATA = flags.DEFINE_string("data", None, "Name of a data set with masks. Required.", required=True)
_SPLIT = flags.DEFINE_string("split", "val", "Split of the data set.")
BATCH = 8  # images per call of the teacher


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the IoU of two masks, bool [h, w]. It is 0 if both are empty."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def inside(box: np.ndarray, shape: tuple[int, int], round: bool) -> np.ndarray:
    """Return the pixels inside a box, or inside the largest ellipse in it if `round`, bool of this shape."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    center, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    dx, dy = (x + 0.5 - center[0]) / half[0], (y + 0.5 - center[1]) / half[1]
    return dx**2 + dy**2 <= 1 if round else (abs(dx) <= 1) & (abs(dy) <= 1)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    source, masks = (
        ShardSource(_ROOT.value, _DATA.value, _SPLIT.value),
        Masks(make_teacher(_TEACHER.value, MASK_TEACHERS), Quality()),
    )
    rows, taken, areas = [], [], []

    def ask(pictures: list[Picture]) -> None:
        for picture, found in zip(pictures, masks(pictures)):
            for annotation, box in zip(found, picture.boxes):
                truth = picture.record.decode_mask(picture.record.segments[annotation.segment].mask)
                drawn = np.zeros_like(truth) if annotation.mask is None else decode_rle(annotation.mask, *truth.shape)
                rows.append([iou(truth, drawn), *(iou(truth, inside(box, truth.shape, r)) for r in (False, True))])
                taken.append(not annotation.reason)
                areas.append(np.prod(box[2:] - box[:2]))

    waiting: list[Picture] = []
    for i in tqdm(range(len(source)), unit="image"):
        try:
            record = Record.from_bytes(source[i])
            things = [k for k, s in enumerate(record.segments) if s.mask and not s.crowd and s.class_id is not None]
            classes = source.info.classes
            things = [k for k in things if not classes[record.segments[k].class_id].is_region]
            boxes = {k: usable_box(record, k) for k in things}
            boxes = {k: box for k, box in boxes.items() if not isinstance(box, str)}
            if boxes:
                waiting.append(
                    Picture(record, source.info, record.decode_image(), tuple(boxes), np.stack([*boxes.values()]))
                )
        except BadRecord as e:
            tqdm.write(str(e))
        if len(waiting) == BATCH or (waiting and i == len(source) - 1):
            ask(waiting)
            waiting = []
    found, good, area = np.array(rows), np.array(taken), np.array(areas)
    print(
        "| boxes | accepted masks | IoU of accepted masks | IoU of all masks | IoU of the box | IoU of the ellipse |\n"
        "|---|---|---|---|---|---|"
    )
    ends = [0, *SIZES.values()]
    for name, low, high in [("all", 0, np.inf), *zip(SIZES, ends, ends[1:])]:
        k = (area >= low) & (area < high)
        if k.any():
            figures = [found[k & good, 0].mean() if (k & good).any() else np.nan, *found[k].mean(0)]
            print(
                f"| {k.sum()} {name} | {100 * good[k].mean():.1f} % | {' | '.join(f'{100 * f:.1f}' for f in figures)} |"
            )


if __name__ == "__main__":
    app.run(main)
