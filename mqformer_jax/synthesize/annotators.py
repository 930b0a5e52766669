"""The interface of the classes that generate masks or captions, and a function that makes one for the command line."""

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
    """The interface of `Masks` and `Captions`: run a teacher on the boxes of images and check its output.

    kind: "masks" or "captions".
    name: the teacher and its version, as written to the records.
    settings: everything that affects the output, as text.
    unique: whether each new expression names exactly one object of its image.
    wanted: returns the indices of the segments to annotate.
    """

    kind: str
    name: str
    settings: str
    unique: bool

    def wanted(self, record: Record, info: DatasetInfo) -> list[int]: ...

    def __call__(self, pictures: Sequence[Picture]) -> list[list[Annotation]]: ...


def make_annotator(kind: str, teacher: str, quality: Quality, verifier: str | None) -> Annotator:
    """Make the annotator that the command line describes. Raises ValueError with a one-line message."""
    if kind == "masks":
        if verifier:
            raise ValueError(f"--verifier={verifier}: only `synthesize captions` takes a verifier.")
        return Masks(teachers.make_teacher(teacher, teachers.MASK_TEACHERS), quality)
    captioner = teachers.make_teacher(teacher, teachers.CAPTIONERS)
    scorer = teachers.make_teacher(verifier, teachers.CAPTION_SCORERS, "verifier") if verifier else None
    return Captions(captioner, scorer)
