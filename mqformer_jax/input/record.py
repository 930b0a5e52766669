"""The record format: what a shard holds for one image, whatever its data set labels.

A prepared data set is a folder of ArrayRecord shards and one `dataset.json`:

    <root>/<name>/dataset.json                     a `DatasetInfo`
    <root>/<name>/<split>-00000-of-00004.array_record

`dataset.json` is written last, so a folder without it is a preparation that did not finish. Every record is one
msgpack map (`Record.to_bytes`), so that no code runs when it is read. Masks are COCO run-length codes in image pixels,
mattes are 8-bit PNGs, the image keeps the bytes of the file it came from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence

import cv2
import msgpack
import numpy as np
from hotcoco import mask as rle_codec
from jaxtyping import Float

from mqformer_jax.files import write_json

FORMAT = 1


class BadRecord(ValueError):
    """One record that cannot be used; the message names the record and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class ClassInfo:
    """One class of a data set's vocabulary.

    `texts` are the words it may be prompted with (synonyms; the first is its display name). With `is_region`, the class
    owns one region of an image (stuff); without it, the class may own several segments (instances).
    """

    texts: tuple[str, ...]
    is_region: bool = False

    @property
    def name(self) -> str:
        return self.texts[0]


@dataclasses.dataclass(frozen=True, eq=False)  # one is itself alone, and quick to hash
class DatasetInfo:
    """What holds for a whole prepared data set.

    `exhaustive`: every class is labeled wherever it occurs, so a class without a segment is absent. Federated sets
    (LVIS) are not exhaustive; their records list what is known instead. `unique_texts`: an expression names its segment
    and nothing else of the image (RefCOCO); where not (Visual Genome's region phrases), it may fit others that nobody
    marked. `splits` maps a split to its number of records, `class_images` to the number of images that show each class,
    `expressions` to the number of expressions. `made_from`: the set that a teacher added to
    (`mqformer synthesize`), or "".
    """

    name: str
    classes: tuple[ClassInfo, ...]
    splits: dict[str, int]
    exhaustive: bool = True
    source: str = ""
    unique_texts: bool = True
    class_images: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    expressions: dict[str, int] = dataclasses.field(default_factory=dict)
    made_from: str = ""

    @functools.cached_property
    def class_weights(self) -> tuple[float, ...]:
        """How readily each class is drawn as a negative: the root of how many images show it (as Detic's federated
        loss).
        """
        counts = np.sum([np.zeros(len(self.classes)), *(c for c in self.class_images.values() if c)], axis=0)
        return tuple(np.sqrt(np.maximum(counts, 1)).tolist())

    def save(self, folder: str) -> None:
        write_json(os.path.join(folder, "dataset.json"), {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, folder: str) -> DatasetInfo:
        """Raises FileNotFoundError where there is none, ValueError in one line where it cannot be read."""
        path = os.path.join(folder, "dataset.json")
        with open(path) as f:
            try:
                return cls._of(json.load(f))
            except (ValueError, TypeError, KeyError, AttributeError) as e:
                raise ValueError(f"{path} cannot be read ({e}): delete the folder and prepare it again") from None

    @classmethod
    def _of(cls, fields: dict) -> DatasetInfo:
        if fields.pop("format") != FORMAT:
            raise ValueError("another record format")
        fields["classes"] = tuple(ClassInfo(tuple(c["texts"]), c["is_region"]) for c in fields["classes"])
        fields["class_images"] = {split: tuple(counts) for split, counts in fields.get("class_images", {}).items()}
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One annotated piece of an image.

    class_id: index into `DatasetInfo.classes`, or None where only words name it (a referred object, a foreground).
    texts: expressions that refer to this segment and to no other of the image.
    box: x0, y0, x1, y1 in pixels (continuous; the right and lower edges are outside), or None.
    mask: COCO compressed run-length code of the image's size, or None where only a box is labeled.
    alpha: 8-bit gray PNG of the image's size (0 to 255), or None. A matte.
    trimap: 8-bit gray PNG, 0 outside, 255 inside, between them unknown, or None. Where the matte is measured.
    crowd: a region of many objects that nobody separated: never a target, never punished.
    foreground: this is the salient foreground of the image, not a member of a class.

    What a teacher added (`mqformer synthesize`) is marked by its name and version: mask_by, captions_by; "" where
    people did it.
    mask_score: what the teacher thought of its mask, 0 to 1. captions: its expressions, best first, each with a score
        of 0 to 1.
    """

    class_id: int | None = None
    texts: tuple[str, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask: bytes | None = None
    alpha: bytes | None = None
    trimap: bytes | None = None
    crowd: bool = False
    foreground: bool = False
    mask_by: str = ""
    mask_score: float = 1.0
    captions: tuple[tuple[str, float], ...] = ()
    captions_by: str = ""

    @property
    def expressions(self) -> tuple[str, ...]:
        """All that refers to it: people's texts, then a teacher's."""
        return (*self.texts, *(text for text, _ in self.captions))

    def trusting(self, mask: float, caption: float) -> Segment:
        """The segment without what a teacher added and gave a lower score; where that was its mask, its box stays."""
        captions = tuple(said for said in self.captions if said[1] >= caption)
        doubtful = bool(self.mask_by) and self.mask_score < mask
        return dataclasses.replace(
            self, captions=captions, **(dict(mask=None, mask_by="", mask_score=1.0) if doubtful else {})
        )


@dataclasses.dataclass(frozen=True)
class Record:
    """All that is known of one image.

    key: the image's name in its data set, for messages and evaluation.
    image: bytes of a JPEG or PNG file. height, width: its size in pixels (after EXIF rotation).
    ignore: run-length code of pixels that nobody labeled, or None. absent_texts: expressions that name nothing here.
    absent_classes, partial_classes: for sets that are not exhaustive, classes checked to be absent, and classes of
    which some segments are labeled and others may not be.
    origin: whose picture it is, where several data sets label the same pictures ("coco/391895"), or "". What one set
    evaluates on leaves the others by it.
    """

    key: str
    image: bytes
    height: int
    width: int
    segments: tuple[Segment, ...] = ()
    ignore: bytes | None = None
    absent_texts: tuple[str, ...] = ()
    absent_classes: tuple[int, ...] = ()
    partial_classes: tuple[int, ...] = ()
    origin: str = ""

    def to_bytes(self) -> bytes:
        return msgpack.packb({"format": FORMAT, **dataclasses.asdict(self)}, use_bin_type=True)

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        try:
            fields = msgpack.unpackb(data, raw=False)
            if fields.pop("format") != FORMAT:
                raise ValueError("another record format; prepare the data set again")
            fields["segments"] = tuple(Segment(**_tuples(s)) for s in fields["segments"])
            return cls(**_tuples(fields))
        except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as e:
            raise BadRecord(f"not a record: {e}") from e

    def trusting(self, mask: float, caption: float) -> Record:
        """The record without the masks and captions to which teachers gave a lower score."""
        if not (mask or caption):
            return self
        return dataclasses.replace(self, segments=tuple(segment.trusting(mask, caption) for segment in self.segments))

    def decode_image(self) -> np.ndarray:
        """The image as uint8 [height, width, 3], RGB. Raises BadRecord where the bytes are no whole image."""
        image = cv2.imdecode(np.frombuffer(self.image, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise BadRecord(f"{self.key}: the image cannot be decoded")
        if image.shape[:2] != (self.height, self.width):
            raise BadRecord(
                f"{self.key}: image is {image.shape[1]}x{image.shape[0]}, record says {self.width}x{self.height}"
            )
        return image

    def decode_mask(self, mask: bytes) -> np.ndarray:
        """A run-length code of this record as bool [height, width]."""
        return decode_rle(mask, self.height, self.width)

    def decode_window(self, mask: bytes) -> tuple[np.ndarray, tuple[int, int]]:
        """The part of a mask that lies in its box, bool [h, w], and the box's top and left; 1 x 1 where the mask is
        empty.
        """
        rle = {"size": [self.height, self.width], "counts": mask}
        try:
            left, top, width, height = (
                max(1, int(v)) if i > 1 else int(v) for i, v in enumerate(rle_codec.toBbox(rle))
            )
            columns = rle_codec.decode(rle).T
        except (ValueError, TypeError) as e:
            raise BadRecord(f"{self.key}: bad run-length code: {e}") from e
        part = np.ascontiguousarray(columns[left : left + width, top : top + height])
        return cv2.transpose(part).view(bool), (top, left)

    def decode_alpha(self, alpha: bytes) -> np.ndarray:
        """A matte of this record as uint8 [height, width]."""
        matte = cv2.imdecode(np.frombuffer(alpha, np.uint8), cv2.IMREAD_GRAYSCALE)
        if matte is None or matte.shape != (self.height, self.width):
            raise BadRecord(f"{self.key}: the matte cannot be decoded, or is not {self.width}x{self.height}")
        return matte


def encode_rle(mask: np.ndarray) -> bytes:
    """bool or uint8 [h, w] to COCO's compressed run-length code."""
    return rle_codec.encode(np.asfortranarray(mask, np.uint8))["counts"]


def decode_rle(counts: bytes, height: int, width: int) -> np.ndarray:
    """COCO's compressed run-length code to bool [height, width]."""
    rle = {"size": [height, width], "counts": counts}
    try:
        columns = rle_codec.decode(rle).T  # the code runs down columns; this view is contiguous
    except (ValueError, TypeError) as e:
        raise BadRecord(f"bad run-length code: {e}") from e
    return cv2.transpose(columns).view(bool)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    """The tight box x0, y0, x1, y1 (pixels; right and lower edge outside) of bool [h, w], None where it is empty."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return (float(left), float(top), float(left + width), float(top + height)) if width else None


def box_iou(a: Float[np.ndarray, "*#n 4"], b: Float[np.ndarray, "*#n 4"]) -> Float[np.ndarray, "*n"] | np.floating:
    """Return the IoU of boxes x0, y0, x1, y1 that broadcast together; 0 for two boxes without area."""
    area = lambda box: np.prod(np.maximum(box[..., 2:] - box[..., :2], 0), -1)
    common = area(np.concatenate([np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])], -1))
    return common / (area(a) + area(b) - common + 1e-9)


def _tuples(fields: dict) -> dict:
    """msgpack reads every sequence as a list; the dataclasses hold tuples."""
    return {k: _tuple(v) for k, v in fields.items()}


def _tuple(value: object) -> object:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def origins_path(folder: str, split: str) -> str:
    """Where a split keeps the `origin` of its records, one a line; there is no such file where all are ""."""
    return os.path.join(folder, f"{split}.origins.txt")


def shard_paths(folder: str, split: str, count: int) -> Sequence[str]:
    return [os.path.join(folder, f"{split}-{i:05d}-of-{count:05d}.array_record") for i in range(count)]
