"""What a teacher is: a model that says more of a box than its data set does. And the ones there are, by name.

A new one is a class with one of the two shapes below and a line in `MASK_TEACHERS` or `CAPTIONERS`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.segments import CanvasMasks


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """An image and the boxes that a teacher is asked about.

    record, info: all that is known of the image; a teacher may use the names of the classes and the other segments.
        image: RGB.
    segments: index into `record.segments` of each box. boxes: x0, y0, x1, y1 in pixels, inside the image and not empty.
    """

    record: Record
    info: DatasetInfo
    image: UInt8[np.ndarray, "h w 3"]
    segments: tuple[int, ...]
    boxes: Float[np.ndarray, "n 4"]


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """The masks that a teacher drew in the boxes of a picture, as logits that are restored one by one, so that memory
    is bounded.

    scores: what the teacher believes of each, 0 to 1 (an IoU where it predicts one).
    """

    masks: CanvasMasks
    scores: Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Caption:
    """Words for one box. score: how sure they are, 0 to 1; what that means is the captioner's own."""

    text: str
    score: float


@runtime_checkable
class MaskTeacher(Protocol):
    """Masks from boxes. name: what the records are marked with, the teacher and its version."""

    name: str

    def __call__(self, pictures: Sequence[Picture], boxes: Sequence[Float[np.ndarray, "_k 4"]]) -> list[Drawn]:
        """The masks in `boxes`, k of each picture: those of the picture, or copies of them that were moved a little.

        Box j of a picture's k belongs to segment `segments[j % n]` of its n.
        """
        ...


@runtime_checkable
class Captioner(Protocol):
    """Words from boxes. name: what the records are marked with. unique: its captions fit no other object of the
    image.
    """

    name: str
    unique: bool

    def __call__(self, pictures: Sequence[Picture]) -> list[list[list[Caption]]]:
        """Of each picture, for each of its boxes, the captions, best first."""
        ...


@runtime_checkable
class Picker(Protocol):
    """Says which box words mean, to try captions with."""

    name: str

    def __call__(
        self, pictures: Sequence[Picture], captions: Sequence[Sequence[Sequence[str]]]
    ) -> list[list[Float[np.ndarray, "_c _n"]]]:
        """Of each picture, for each of its n boxes, how well its c captions fit each of the n boxes: the largest is
        what a caption means.
        """
        ...


# name: module, class. Each is made of the text behind the colon, a folder or a name on the Hugging Face hub, and is
# imported only when asked for.
MASK_TEACHERS = {
    "ours": ("own", "OwnMasks"),
    "sam": ("sam", "Sam"),
    "sam2": ("sam", "Sam2"),
    "hq-sam": ("sam", "HqSam"),
}
CAPTIONERS = {
    "attributes": ("attributes", "Attributes"),
    "blip": ("region_captions", "Blip"),
    "blip2": ("region_captions", "Blip2"),
    "florence2": ("region_captions", "Florence2"),
}
PICKERS = {
    "ours": ("own", "OwnPicker"),
    "clip": ("clip_picker", "ClipPicker"),
}


def make_teacher(
    given: str, among: dict[str, tuple[str, str]], option: str = "teacher"
) -> MaskTeacher | Captioner | Picker:
    """The teacher that "name:where" names. Raises ValueError in one line where there is none, or what it needs is not
    installed.
    """
    name, _, where = given.partition(":")
    if name not in among:
        raise ValueError(f"--{option}={given}: it may be one of {', '.join(among)}.")
    if not where and name != "attributes":
        raise ValueError(
            f"--{option}={given}: say which weights: {name}:FOLDER"
            + (", or a workdir." if name == "ours" else " or a name on the Hugging Face hub.")
        )
    module, kind = among[name]
    try:
        return getattr(importlib.import_module(f"mqformer_jax.synthesize.{module}"), kind)(where)
    except ImportError as e:
        if (e.name or "").startswith("mqformer_jax"):
            raise
        raise ValueError(f"--{option}={given}: {e.name} is not installed: pip install -e '.[teachers]'.") from e
