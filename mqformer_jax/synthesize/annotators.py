"""`Annotator`, the interface of `Masks` and `Captions`, and `make_annotator`, which makes one from the flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.synthesize import teachers
from mqformer_jax.synthesize.annotations import Annotation
from mqformer_jax.synthesize.captions import Captions
from mqformer_jax.synthesize.masks import Masks, Quality
from mqformer_jax.synthesize.teachers import Picture

KINDS = ("masks", "captions")


@runtime_checkable
class Annotator(Protocol):
    """The interface of `Masks` and `Captions`, which run a teacher on boxes and check the teacher's output.

    kind: "masks" or "captions".
    name: the teacher and its version, as written to the records.
    settings: text that contains everything that affects the output.
    unique: whether each generated caption fits exactly one object of its image (True for masks).
    wanted: returns the indices of the segments to annotate.
    __call__: returns a list of annotations for each image, one annotation for each box.
    """

    kind: str
    name: str
    settings: str
    unique: bool

    def wanted(self, record: Record, info: DatasetInfo) -> list[int]: ...

    def __call__(self, pictures: Sequence[Picture]) -> list[list[Annotation]]: ...


def make_annotator(kind: str, teacher: str, quality: Quality, verifier: str | None) -> Annotator:
    """Make the annotator that the command's flags describe.

    kind: "masks" or "captions". teacher, verifier: see `make_teacher`. quality: used for masks only. Raises ValueError
    if masks are given a verifier, and the errors of `make_teacher`.
    """
    if kind == "masks":
        if verifier:
            raise ValueError(f"--verifier={verifier}: only `synthesize captions` takes a verifier; remove this flag.")
        return Masks(teachers.make_teacher(teacher, teachers.MASK_TEACHERS), quality)
    captioner = teachers.make_teacher(teacher, teachers.CAPTIONERS)
    scorer = teachers.make_teacher(verifier, teachers.CAPTION_SCORERS, "verifier") if verifier else None
    return Captions(captioner, scorer)
