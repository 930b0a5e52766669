"""What asks the teachers: the maker of masks and the maker of captions, as the command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.synthesize import teachers
from mqformer_jax.synthesize.captions import Captions
from mqformer_jax.synthesize.masks import Masks, Quality
from mqformer_jax.synthesize.teachers import Picture
from mqformer_jax.synthesize.verdicts import Verdict

KINDS = ("masks", "captions")


@runtime_checkable
class Maker(Protocol):
    """What asks a teacher (`Masks`, `Captions`). kind: "masks" or "captions". name: what records are marked with.
    settings: all that decides the answers.

    unique: whether an expression still names one object and nothing else of its image. wanted: the segments to ask
        about.
    """

    kind: str
    name: str
    settings: str
    unique: bool

    def wanted(self, record: Record, info: DatasetInfo) -> list[int]: ...

    def __call__(self, pictures: Sequence[Picture]) -> list[list[Verdict]]: ...


def make_maker(kind: str, teacher: str, quality: Quality, pick: str | None) -> Maker:
    """What the command line asks for. Raises ValueError in one line."""
    if kind == "masks":
        if pick:
            raise ValueError("--pick goes with captions.")
        return Masks(teachers.make_teacher(teacher, teachers.MASK_TEACHERS), quality)
    captioner = teachers.make_teacher(teacher, teachers.CAPTIONERS)
    return Captions(captioner, teachers.make_teacher(pick, teachers.PICKERS, "pick") if pick else None)
