"""Generate masks or captions for the boxes of a prepared data set.

    mqformer synthesize masks --data=objects365 --teacher=sam2:facebook/sam2.1-hiera-large
    mqformer synthesize captions --data=objects365_syn_m --teacher=florence2:florence-community/Florence-2-large

The result is a new data set beside the old one. Its name follows the paper: objects365_syn_m has generated masks,
objects365_syn has generated masks and captions, and coco_syn has generated captions for COCO's own masks. Run a killed
command again to resume it. To divide the shards among four processes, give them --worker=0/4 to --worker=3/4.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

import cv2
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordReader

from mqformer_jax import cli
from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.synthesize import teachers
from mqformer_jax.synthesize.annotators import KINDS, make_annotator
from mqformer_jax.synthesize.job import BATCH, Job, is_complete, synthesize
from mqformer_jax.synthesize.masks import Quality
from mqformer_jax.synthesize.report import Tally, sample_grid


def default_name(kind: str, data: str) -> str:
    """Return the default name of the new data set, which follows the paper.

    Masks: objects365 -> objects365_syn_m. Captions: objects365_syn_m -> objects365_syn, coco -> coco_syn.
    """
    return f"{data}_syn_m" if kind == "masks" else f"{data.removesuffix('_syn_m')}_syn"


def show(job: Job, tally: Tally) -> None:
    """Print the report of a finished job, and write a PNG grid of sample boxes."""
    print(f"{job.title}: {tally}")
    path = os.path.join(job.folder, f"{job.split}.synthesis.png")
    if sample_grid(tally, lambda shard, number: _image(job.source.paths[shard], number), path):
        print(path)


def _image(path: str, number: int) -> np.ndarray:
    reader = ArrayRecordReader(path)
    try:
        return Record.from_bytes(reader.read([number])[0]).decode_image()
    finally:
        reader.close()


def parse_worker(text: str) -> tuple[int, int]:
    """Return the index of a process and the number of processes: (0, 4) for "0/4"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(
            f"--worker={text}: give INDEX/COUNT with an INDEX from 0 to COUNT - 1, e.g. 0/4 to 3/4 for four processes."
        )
    return int(found[1]), int(found[2])


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if len(argv) != 1 or argv[0] not in KINDS:
        raise ValueError(
            f"say what to generate, {' or '.join(KINDS)}: mqformer synthesize masks --data=NAME --teacher=TEACHER."
        )
    kind, worker = argv[0], parse_worker(given.worker)
    quality = Quality(**{f.name: given[f.name].value for f in dataclasses.fields(Quality)})
    cv2.setNumThreads(1)
    cli.keep_compiled()
    ShardSource(given.root, given.data, given.split)  # report a missing data set before loading the teacher
    options = kind, given.teacher, quality, given.verifier
    annotator = make_annotator(*options)
    job = Job(
        given.root,
        given.data,
        given.split,
        given.output or default_name(kind, given.data),
        annotator.settings,
        given.batch,
    )
    if is_complete(job):
        print(f"{job.title} is up to date.")
        return
    if given.beam is None:
        tally = synthesize(job, annotator, worker)
    else:
        from mqformer_jax.synthesize.beam import run_pipeline

        tally = run_pipeline(job, options, given.beam.split())
    if tally is None:
        print(f"{job.title}: the shards of this process are finished; the process that ends last completes the set.")
    else:
        show(job, tally)


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of the command."""
    flags.DEFINE_string(
        "data", None, "Name of the prepared data set to annotate, e.g. objects365. Required.", flag_values=values
    )
    flags.DEFINE_string("split", "train", "Split to annotate, e.g. val.", flag_values=values)
    flags.DEFINE_string("root", "data/records", "Folder of the old and the new data set.", flag_values=values)
    flags.DEFINE_string(
        "output",
        None,
        "Name of the new data set, e.g. mine_syn. (default: DATA_syn_m for masks, DATA_syn for captions)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "teacher",
        None,
        "Model that annotates the boxes, as NAME:WEIGHTS, e.g. sam2:facebook/sam2.1-hiera-large. NAME for masks: "
        f"{', '.join(teachers.MASK_TEACHERS)}; for captions: {', '.join(teachers.CAPTIONERS)}. "
        "For ours, WEIGHTS is the workdir of a training run; rules needs no WEIGHTS. Required.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "verifier",
        None,
        "Captions: model that scores captions, as NAME:WEIGHTS, e.g. clip:openai/clip-vit-large-patch14. Captions that "
        f"fit another box better are dropped. NAME: {' or '.join(teachers.CAPTION_SCORERS)}. (default: none)",
        flag_values=values,
    )
    flags.DEFINE_string(
        "worker", "0/1", "Index of this process, from 0, and number of processes, e.g. 2/8.", flag_values=values
    )
    flags.DEFINE_integer("batch", BATCH, "Images per call of the teacher, e.g. 16.", lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "beam",
        None,
        'Run as an Apache Beam pipeline with these options, e.g. "--runner=DirectRunner".',
        flag_values=values,
    )
    flags.DEFINE_float(
        "min_score",
        Quality.min_score,
        "Masks: drop a mask with a score below this, 0 to 1, e.g. 0.8.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "min_stability",
        Quality.min_stability,
        "Masks: drop a mask whose mean IoU with the masks of jittered boxes is below this, e.g. 0.8.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "min_box_iou",
        Quality.min_box_iou,
        "Masks: drop a mask if the IoU of its tight box with the given box is below this, e.g. 0.8.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "min_box_area",
        Quality.min_box_area,
        "Masks: drop a mask that covers less than this fraction of its box, e.g. 0.1.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_jittered_boxes",
        Quality.num_jittered_boxes,
        "Masks: number of jittered copies of each box, for --min_stability, e.g. 4.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "box_jitter",
        Quality.box_jitter,
        "Masks: largest shift of the edges of a jittered box, as a fraction of the box's width or height, e.g. 0.1.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "min_component_area",
        Quality.min_component_area,
        "Masks: remove islands and fill holes smaller than this fraction of the mask, e.g. 0.05.",
        flag_values=values,
    )
    flags.mark_flags_as_required(["data", "teacher"], values)
    cli.require_fractions(
        "min_score", "min_stability", "min_box_iou", "min_box_area", "box_jitter", "min_component_area", values=values
    )


def run(argv: Sequence[str]) -> None:
    define_flags(flags.FLAGS)
    cli.run(main, "synthesize", __doc__, "stopped. Run the same command to resume.", argv)
