"""The record format: one image with its annotations, the same for all data sets.

A prepared data set is a folder of ArrayRecord shards and one `dataset.json`:

    <root>/<name>/dataset.json                     a `DatasetInfo`
    <root>/<name>/<split>-00000-of-00004.array_record

`dataset.json` is written last, so a folder without it is an unfinished preparation. Every record is one msgpack map
(`Record.to_bytes`), which can be read without running code. Masks are COCO run-length codes in image pixels, mattes are
8-bit PNGs, and images keep the bytes of their original files.
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
    """An error in one record. The message describes the problem."""


@dataclasses.dataclass(frozen=True)
class ClassInfo:
    """One class of a data set's vocabulary.

    texts: synonyms that serve as prompts; the first one is the display name. is_region: True if the class owns one
    region of an image (stuff), False if it may own several segments (instances).
    """

    texts: tuple[str, ...]
    is_region: bool = False

    @property
    def name(self) -> str:
        return self.texts[0]


@dataclasses.dataclass(frozen=True, eq=False)  # compares and hashes by identity, which is fast
class DatasetInfo:
    """The properties of a prepared data set.

    exhaustive: whether every class is labeled wherever it occurs, so that a class without a segment is absent.
        Federated sets (LVIS) are not exhaustive; their records list the classes that are known to be absent.
    unique_texts: whether an expression fits its segment and nothing else in the image (RefCOCO). If False (Visual
        Genome's region phrases), it may also fit unlabeled objects.
    splits: number of records of each split. class_images: for each split, the number of images that show each class.
    expressions: number of expressions of each split.
    source: the subcommand of `mqformer prepare` that made the set, or "synthesize".
    made_from: the data set to which a teacher added annotations (`mqformer synthesize`), or "".
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
        """Return the weights with which classes are drawn as negatives: square roots of image counts (as in Detic)."""
        counts = np.sum([np.zeros(len(self.classes)), *(c for c in self.class_images.values() if c)], axis=0)
        return tuple(np.sqrt(np.maximum(counts, 1)).tolist())

    def save(self, folder: str) -> None:
        write_json(os.path.join(folder, "dataset.json"), {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, folder: str) -> DatasetInfo:
        """Read `dataset.json`. Raises FileNotFoundError if it is missing, ValueError if it is damaged."""
        path = os.path.join(folder, "dataset.json")
        with open(path) as f:
            try:
                return cls._of(json.load(f))
            except (ValueError, TypeError, KeyError, AttributeError) as e:
                raise ValueError(
                    f"{path} cannot be read ({e}): delete the folder of this file and prepare the data set again"
                ) from None

    @classmethod
    def _of(cls, fields: dict) -> DatasetInfo:
        if fields.pop("format") != FORMAT:
            raise ValueError("unknown record format")
        fields["classes"] = tuple(ClassInfo(tuple(c["texts"]), c["is_region"]) for c in fields["classes"])
        fields["class_images"] = {split: tuple(counts) for split, counts in fields.get("class_images", {}).items()}
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One annotated segment of an image.

    class_id: index into `DatasetInfo.classes`, or None if the segment has no class (a referred object, a foreground).
    texts: expressions that refer to this segment (see `DatasetInfo.unique_texts`).
    box: x0, y0, x1, y1 in pixels (continuous; right and lower edges are exclusive), or None.
    mask: COCO compressed run-length code at the image's size, or None if only a box is labeled.
    alpha: the matte, an 8-bit gray PNG at the image's size (0 to 255), or None.
    trimap: 8-bit gray PNG or None: 0 is outside, 255 inside, other values unknown. Matting metrics with the
        prefix "unknown_" use only the unknown pixels.
    crowd: a region of several objects that are not separated. It is never a target, and its pixels have no loss.
    foreground: whether the segment is the salient foreground of the image, not an instance of a class.

    mask_by, captions_by: name and version of the teacher that made the mask or the captions (`mqformer synthesize`), or
        "" if people made them.
    mask_score: the teacher's confidence in its mask, 0 to 1. captions: the teacher's expressions, best first, each with
        a score of 0 to 1.
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
        """Return all expressions of the segment: those written by people, then those generated by a teacher."""
        return (*self.texts, *(text for text, _ in self.captions))

    def trusting(self, mask: float, caption: float) -> Segment:
        """Return the segment without synthetic annotations of low score.

        A teacher's mask is removed if it scores below `mask`, and its captions if they score below `caption`. The box
        and the annotations of people are kept.
        """
        captions = tuple(item for item in self.captions if item[1] >= caption)
        drop_mask = bool(self.mask_by) and self.mask_score < mask
        return dataclasses.replace(
            self, captions=captions, **(dict(mask=None, mask_by="", mask_score=1.0) if drop_mask else {})
        )


@dataclasses.dataclass(frozen=True)
class Record:
    """One image and its annotations.

    key: the image's name in its data set, for messages and evaluation.
    image: bytes of a JPEG or PNG file. height, width: its size in pixels (after EXIF rotation).
    ignore: run-length code of unlabeled pixels, or None. absent_texts: expressions that fit nothing in the image.
    absent_classes, partial_classes: if the data set is not exhaustive, classes that are known to be absent, and classes
        that may have unlabeled segments beside the labeled ones.
    origin: identifies an image that several data sets label ("coco/391895"), or "". See `exclude_eval_images`.
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
                raise ValueError("unknown record format")
            fields["segments"] = tuple(Segment(**_tuples(s)) for s in fields["segments"])
            return cls(**_tuples(fields))
        except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as e:
            raise BadRecord(f"the record cannot be read ({e}); prepare the data set again") from e

    def trusting(self, mask: float, caption: float) -> Record:
        """Return the record without synthetic masks that score below `mask` and captions that score below `caption`."""
        if not (mask or caption):
            return self
        return dataclasses.replace(self, segments=tuple(segment.trusting(mask, caption) for segment in self.segments))

    def decode_image(self) -> np.ndarray:
        """Return the image as uint8 [height, width, 3], RGB. Raises BadRecord if it is damaged."""
        image = cv2.imdecode(np.frombuffer(self.image, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise BadRecord(f"{self.key}: the image cannot be decoded; prepare the data set again")
        if image.shape[:2] != (self.height, self.width):
            actual = f"{image.shape[1]}x{image.shape[0]}"
            raise BadRecord(
                f"{self.key}: the image is {actual}, but its labels are for {self.width}x{self.height}; "
                "prepare the data set again"
            )
        return image

    def decode_mask(self, mask: bytes) -> np.ndarray:
        """Decode a run-length code of this record to bool [height, width]."""
        return decode_rle(mask, self.height, self.width)

    def decode_window(self, mask: bytes) -> tuple[np.ndarray, tuple[int, int]]:
        """Return a mask cropped to its box, bool [h, w], and (top, left) of the box in the image.

        An empty mask is cropped to a single False pixel.
        """
        rle = {"size": [self.height, self.width], "counts": mask}
        try:
            left, top, width, height = (
                max(1, int(v)) if i > 1 else int(v) for i, v in enumerate(rle_codec.toBbox(rle))
            )
            columns = rle_codec.decode(rle).T
        except (ValueError, TypeError) as e:
            raise BadRecord(f"{self.key}: a mask cannot be decoded ({e}); prepare the data set again") from e
        part = np.ascontiguousarray(columns[left : left + width, top : top + height])
        return cv2.transpose(part).view(bool), (top, left)

    def decode_alpha(self, alpha: bytes) -> np.ndarray:
        """Decode a matte of this record to uint8 [height, width]."""
        matte = cv2.imdecode(np.frombuffer(alpha, np.uint8), cv2.IMREAD_GRAYSCALE)
        if matte is None or matte.shape != (self.height, self.width):
            raise BadRecord(
                f"{self.key}: the matte cannot be decoded, or is not {self.width}x{self.height}; "
                "prepare the data set again"
            )
        return matte


def encode_rle(mask: np.ndarray) -> bytes:
    """Encode bool or uint8 [h, w] as COCO's compressed run-length code."""
    return rle_codec.encode(np.asfortranarray(mask, np.uint8))["counts"]


def decode_rle(counts: bytes, height: int, width: int) -> np.ndarray:
    """Decode COCO's compressed run-length code to bool [height, width]."""
    rle = {"size": [height, width], "counts": counts}
    try:
        columns = rle_codec.decode(rle).T  # the code is column-major, so this view is contiguous
    except (ValueError, TypeError) as e:
        raise BadRecord(f"a mask cannot be decoded ({e}); prepare the data set again") from e
    return cv2.transpose(columns).view(bool)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    """Return the tight box x0, y0, x1, y1 of a mask, bool [h, w], in pixels (x1 and y1 exclusive); None if empty."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return (float(left), float(top), float(left + width), float(top + height)) if width else None


def box_iou(a: Float[np.ndarray, "*#n 4"], b: Float[np.ndarray, "*#n 4"]) -> Float[np.ndarray, "*n"] | np.floating:
    """Return the IoU of boxes (x0, y0, x1, y1). `a` and `b` broadcast. The IoU of two boxes without area is 0."""
    area = lambda box: np.prod(np.maximum(box[..., 2:] - box[..., :2], 0), -1)
    common = area(np.concatenate([np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])], -1))
    return common / (area(a) + area(b) - common + 1e-9)


def _tuples(fields: dict) -> dict:
    """Convert the lists in a decoded record to tuples, which msgpack does not have."""
    return {k: _tuple(v) for k, v in fields.items()}


def _tuple(value: object) -> object:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def origins_path(folder: str, split: str) -> str:
    """Return the path of the file with each record's `origin`, one per line. If all are "", no such file exists."""
    return os.path.join(folder, f"{split}.origins.txt")


def shard_paths(folder: str, split: str, count: int) -> Sequence[str]:
    return [os.path.join(folder, f"{split}-{i:05d}-of-{count:05d}.array_record") for i in range(count)]
