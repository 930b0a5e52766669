"""Masks and captions for the boxes of a prepared data set, made once, offline:

    mqformer synthesize masks    --data=objects365       --teacher=sam2:facebook/sam2.1-hiera-large
    mqformer synthesize captions --data=objects365_syn_m
    --teacher=florence2:florence-community/Florence-2-large

The new set lies beside the old one, named as the paper names them: objects365_syn_m has masks, objects365_syn captions
too, coco_syn captions on COCO's own masks. Killed, the same command goes on; with --share=0/4 ... 3/4 four processes
share the work.
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
from mqformer_jax.synthesize.makers import KINDS, make_maker
from mqformer_jax.synthesize.masks import Quality
from mqformer_jax.synthesize.report import Tally, contact_sheet
from mqformer_jax.synthesize.work import BATCH, Work, is_made, synthesize


def default_name(kind: str, data: str) -> str:
    """objects365 -> objects365_syn_m -> objects365_syn; coco -> coco_syn (the paper's names)."""
    return f"{data}_syn_m" if kind == "masks" else f"{data.removesuffix('_syn_m')}_syn"


def show(work: Work, tally: Tally) -> None:
    """Prints the report and draws the contact sheet."""
    print(f"{work.title}: {tally}")
    path = os.path.join(work.folder, f"{work.split}.synthesis.png")
    if contact_sheet(tally, lambda shard, number: _image(work.source.paths[shard], number), path):
        print(path)


def _image(path: str, number: int) -> np.ndarray:
    reader = ArrayRecordReader(path)
    try:
        return Record.from_bytes(reader.read([number])[0]).decode_image()
    finally:
        reader.close()


def parse_share(text: str) -> tuple[int, int]:
    """ "0/4" as (0, 4)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--share={text}: give a process's number and how many there are, from 0/4 to 3/4.")
    return int(found[1]), int(found[2])


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if len(argv) != 1 or argv[0] not in KINDS:
        raise ValueError(f"say what is to be made: mqformer synthesize {'|'.join(KINDS)} --data=NAME --teacher=...")
    kind, share = argv[0], parse_share(given.share)
    quality = Quality(**{f.name: given[f.name].value for f in dataclasses.fields(Quality)})
    cv2.setNumThreads(1)
    cli.keep_compiled()
    ShardSource(given.root, given.data, given.split)  # what is not there should not wait for a teacher to load
    asked = kind, given.teacher, quality, given.pick
    maker = make_maker(*asked)
    work = Work(
        given.root, given.data, given.split, given.out or default_name(kind, given.data), maker.settings, given.batch
    )
    if is_made(work):
        print(f"{work.title}: made of the same already, nothing was done")
        return
    if given.beam is None:
        tally = synthesize(work, maker, share)
    else:
        from mqformer_jax.synthesize.beam import run_pipeline

        tally = run_pipeline(work, asked, given.beam.split())
    if tally is None:
        print(f"{work.title}: this share is made; the process that ends last completes the set")
    else:
        show(work, tally)


def run(argv: Sequence[str]) -> None:
    flags.DEFINE_string("data", None, "A prepared data set with boxes.")
    flags.DEFINE_string("split", "train", "Its split.")
    flags.DEFINE_string("root", "data/records", "The folder of prepared data sets, for both.")
    flags.DEFINE_string("out", None, "The name of the new set; default: the paper's.")
    flags.DEFINE_string(
        "teacher",
        None,
        f"NAME:WHERE. Of masks: {', '.join(teachers.MASK_TEACHERS)}; of captions: {', '.join(teachers.CAPTIONERS)}.",
    )
    flags.DEFINE_string(
        "pick",
        None,
        f"Captions: what tries whether one means its own box: {', '.join(teachers.PICKERS)}, as NAME:WHERE.",
    )
    flags.DEFINE_string("share", "0/1", "This process's number and how many there are: 2/8 makes shards 2, 10, 18 ...")
    flags.DEFINE_integer("batch", BATCH, "Images that the teacher is given at once.", lower_bound=1)
    flags.DEFINE_string(
        "beam", None, 'Run as an Apache Beam pipeline with these options, e.g. --beam="--runner=DirectRunner".'
    )
    flags.DEFINE_float("score", Quality.score, "Masks: the least estimate of the teacher.")
    flags.DEFINE_float(
        "stability", Quality.stability, "Masks: the least mean IoU with the masks of boxes moved a little."
    )
    flags.DEFINE_float("agreement", Quality.agreement, "Masks: the least IoU of a mask's tight box with the given one.")
    flags.DEFINE_float("area", Quality.area, "Masks: the least share of its box that a mask fills.")
    flags.DEFINE_integer("copies", Quality.copies, "Masks: how many moved boxes are tried.", lower_bound=0)
    flags.DEFINE_float("jitter", Quality.jitter, "Masks: how far their sides move, in sides of the box.", lower_bound=0)
    flags.DEFINE_float(
        "clean", Quality.clean, "Masks: holes and islands below this share of a mask are filled and left out."
    )
    flags.mark_flags_as_required(["data", "teacher"])
    cli.run(main, "synthesize", __doc__, "stopped; the same command goes on from here.", argv)
