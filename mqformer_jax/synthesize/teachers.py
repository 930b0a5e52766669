"""The interfaces of teachers and the tables of all teachers. A teacher generates masks or captions, or scores captions.

To add a teacher, write a class with one of the interfaces below and add a line to the table of that interface at the
end of this file.
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
    """An image and the boxes that a teacher annotates.

    record, info: the record of the image and the DatasetInfo of its data set. Teachers may use these labels.
    image: RGB.
    segments: index into `record.segments` of each box.
    boxes: x0, y0, x1, y1 in pixels, inside the image and not empty.
    """

    record: Record
    info: DatasetInfo
    image: UInt8[np.ndarray, "h w 3"]
    segments: tuple[int, ...]
    boxes: Float[np.ndarray, "n 4"]


@dataclasses.dataclass(frozen=True, eq=False)
class BoxMasks:
    """A teacher's masks for the boxes of an image.

    masks: logits. Each mask is resized to the image only when it is indexed, to save memory. scores: 0 to 1; the
    predicted IoU if the teacher predicts it.
    """

    masks: CanvasMasks
    scores: Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption of a box. score: 0 to 1; its meaning depends on the captioner."""

    text: str
    score: float


@runtime_checkable
class MaskTeacher(Protocol):
    """The interface of teachers that predict masks from boxes.

    name: the teacher and its version, as written to the records.
    """

    name: str

    def __call__(self, pictures: Sequence[Picture], boxes: Sequence[Float[np.ndarray, "_k 4"]]) -> list[BoxMasks]:
        """Return the masks for k boxes of each image: its n boxes and jittered copies of them.

        boxes: x0, y0, x1, y1 in pixels. Box j of a picture belongs to its segment `segments[j % n]`.
        """
        ...


@runtime_checkable
class Captioner(Protocol):
    """The interface of teachers that caption boxes.

    name: the teacher and its version, as written to the records. unique: whether each caption fits only its own object
    in the image.
    """

    name: str
    unique: bool

    def __call__(self, pictures: Sequence[Picture]) -> list[list[list[Caption]]]:
        """Return the captions of each box of each image, best first."""
        ...


@runtime_checkable
class CaptionScorer(Protocol):
    """The interface of teachers that score how well captions fit boxes."""

    name: str

    def __call__(
        self, pictures: Sequence[Picture], captions: Sequence[Sequence[Sequence[str]]]
    ) -> list[list[Float[np.ndarray, "_c _n"]]]:
        """Return, for each of the n boxes of each image, the scores of the box's c captions for all n boxes.

        A caption fits the box with the largest score, and no box if no score is above 0.
        """
        ...


# {name: (module, class)}. The module is imported when a teacher of this name is made. The class is called with `where`
# from "name:where": a folder, a name on the Hugging Face hub, or "".
MASK_TEACHERS = {
    "ours": ("mqformer_teacher", "MqformerMasks"),
    "sam": ("sam", "Sam"),
    "sam2": ("sam", "Sam2"),
    "hq-sam": ("sam", "HqSam"),
}
CAPTIONERS = {
    "rules": ("rule_captioner", "RuleCaptioner"),
    "blip": ("hf_captioners", "Blip"),
    "blip2": ("hf_captioners", "Blip2"),
    "florence2": ("hf_captioners", "Florence2"),
}
CAPTION_SCORERS = {
    "ours": ("mqformer_teacher", "MqformerScorer"),
    "clip": ("clip_scorer", "ClipScorer"),
}


def make_teacher(
    given: str, among: dict[str, tuple[str, str]], option: str = "teacher"
) -> MaskTeacher | Captioner | CaptionScorer:
    """Make the teacher that `given` describes, as "name:where".

    among: the table with the name, e.g. `MASK_TEACHERS`. option: the command-line option, for messages. Raises
    ValueError if there is no such teacher or a package that it needs is missing, and ValueError or OSError if the
    weights cannot be loaded.
    """
    name, _, where = given.partition(":")
    if name not in among:
        raise ValueError(f"--{option}={given}: {name!r} is not supported; give one of {', '.join(among)}.")
    if not where and name != "rules":
        raise ValueError(
            f"--{option}={given}: the weights are missing; give {name}:"
            + ("WORKDIR of a training run." if name == "ours" else f"FOLDER or {name}:NAME of the Hugging Face hub.")
        )
    module, kind = among[name]
    try:
        return getattr(importlib.import_module(f"mqformer_jax.synthesize.{module}"), kind)(where)
    except ImportError as e:
        if (e.name or "").startswith("mqformer_jax"):
            raise
        raise ValueError(f"--{option}={given}: {e.name} is not installed: pip install 'mqformer_jax[teachers]'.") from e
