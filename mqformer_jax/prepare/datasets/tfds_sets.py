"""Data sets of TensorFlow Datasets (TFDS). TFDS builders download and read them; the examples become records.

TFDS needs TensorFlow to make a data set, but not to read one that is stored in ArrayRecord files. So a data set can be
made on another machine and copied.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mqformer_jax.input.coco_classes import THING_IDS, class_names
from mqformer_jax.input.record import ClassInfo, Record, encode_rle
from mqformer_jax.prepare.datasets import cityscapes
from mqformer_jax.prepare.formats.coco_categories import vocabulary
from mqformer_jax.prepare.formats.coco_records import Labels, instances_record, referring_record
from mqformer_jax.prepare.formats.images import Image, same_size
from mqformer_jax.prepare.formats.label_maps import Piece, panoptic_record
from mqformer_jax.prepare.plan import Built, Job, Plan, Problems, build, coco_origin

Example = Mapping[str, Any]
Vocabulary = tuple[tuple[ClassInfo, ...], dict[int, int]]


@dataclasses.dataclass(frozen=True)
class TfdsSet:
    """A TFDS builder that `plans` supports.

    name: name of the data set in recipes.
    splits: {name of a split here: the builder's name of the split}.
    needs: packages that the builder needs to make the data set, but not to read it.
    vocabulary: function that takes the builder's features and returns the classes and {class id: class index}.
    key: function that takes an example and returns its image name.
    record: function that converts a job to a record (`make_record` of `plan.build`); `job.labels` is the TFDS example.
    image: the feature that holds the image.
    """

    name: str
    splits: Mapping[str, str]
    needs: tuple[str, ...]
    vocabulary: Callable[[Mapping[str, Any]], Vocabulary]
    key: Callable[[Example], str]
    record: Callable[..., Record]
    exhaustive: bool = False
    image: str = "image"


def plans(
    builder: str, split: str, name: str | None = None, data_dir: str | None = None
) -> Iterator[tuple[str, str, Plan]]:
    """Yield (name, split, plan) of one split of a TFDS builder, e.g. "lvis" or "voc/2012".

    If the data set is not in `data_dir`, it is first downloaded and made. Raises ValueError if the builder or the split
    is not supported, or if the builder fails.
    """
    full = _full_name(builder)
    known = SETS[full]
    if split not in known.splits:
        raise ValueError(f"{full} has no split {split!r} with labels; it has {', '.join(known.splits)}")
    made = _made(full, data_dir)
    theirs = known.splits[split]
    classes, class_of = known.vocabulary(made.info.features)
    # The labels of a job name a file that is rewritten whenever the data set is made again. So a preparation does not
    # resume with shards of another version.
    info = os.path.join(made.data_dir, "dataset_info.json")
    jobs = [Job(f"{full} {theirs} {i}", i, "", (info, i)) for i in range(made.info.splits[theirs].num_examples)]
    make = functools.partial(_build, full, str(made.data_dir), theirs, class_of)
    yield name or known.name, split, Plan(f"tfds {full}", classes, jobs, make, known.exhaustive)


# ---- Builders ------------------------------------------------------------------------------------------------------


def _full_name(builder: str) -> str:
    """Return the name of a builder with its configuration, by default the first supported one ("voc": "voc/2007").

    Raises ValueError if the builder is not supported.
    """
    full = next((known for known in SETS if known == builder or known.startswith(f"{builder}/")), None)
    if full is None and builder.split("/")[0] in _INSTEAD:
        raise ValueError(f"{builder}: {_INSTEAD[builder.split('/')[0]]}")
    if full is None:
        raise ValueError(f"unknown builder {builder!r}; give one of {', '.join(SETS)}")
    return full


def _made(full: str, data_dir: str | None) -> Any:
    """Return the TFDS builder of a data set, after making the data set if needed.

    Raises ValueError if a package is missing, if the builder fails, or if the data set is not stored in ArrayRecord
    files.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError("tensorflow-datasets is not installed; run pip install -e '.[tfds]'") from None
    builder = tfds.builder(full, data_dir=data_dir)
    if not builder.data_path.exists():
        missing = [
            package.replace("_", "-") for package in SETS[full].needs if importlib.util.find_spec(package) is None
        ]
        if missing:
            there = f"or make it on a machine that has them and copy {builder.data_path} here"
            raise ValueError(
                f"{full}: its builder needs {', '.join(missing)} to make this data set; "
                f"run pip install {' '.join(missing)}, {there}"
            )
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as e:  # of any kind: no network, a manual download, a wrong checksum, a full disk
            page = f"https://www.tensorflow.org/datasets/catalog/{builder.name}"
            what = str(e).strip().split("\n")[0] or type(e).__name__
            raise ValueError(f"{full}: the builder failed: {what} (see {page} for what it needs)") from e
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        mend = "delete this folder, then run the same command to make the data set again from the downloads"
        raise ValueError(
            f"{builder.data_dir}: its files are not ArrayRecord files, so reading them needs TensorFlow; {mend}"
        )
    return builder


@functools.lru_cache(maxsize=1)
def _examples(folder: str, split: str, image: str) -> Sequence[Example]:
    """Return the examples of an existing split. Images are not decoded: an image is the bytes of its file."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder, file_format="array_record")
    return builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})


def _build(full: str, folder: str, split: str, class_of: dict[int, int], job: Job) -> Built:
    known = SETS[full]
    example = _examples(folder, split, known.image)[job.id]
    key = known.key(example)
    with tempfile.NamedTemporaryFile() as file:  # images are read and checked as files
        file.write(example[known.image])
        file.flush()
        make_record = functools.partial(known.record, class_of=class_of, split=split)
        return build(make_record, Job(key, job.id, file.name, example, coco_origin(key)))


# ---- Examples to records, in a worker process ----------------------------------------------------------------------


def _lvis(job: Job, image: Image, problems: Problems, class_of: dict[int, int], split: str) -> Record:
    """Return the record of an LVIS example.

    The masks differ slightly from those of LVIS: the TFDS builder rounds the corners of polygons down to whole pixels,
    and includes the pixels on their outlines.
    """
    objects = job.labels["objects"]
    rows = zip(objects["id"], objects["label"], objects["bbox"], objects["segmentation"])
    items = [
        {"id": int(number), "category_id": int(label), "bbox": _xywh(box, image), "segmentation": _rle(mask)}
        for number, label, box, mask in rows
    ]
    lists = (
        tuple(int(label) for label in job.labels[field])
        for field in ("neg_category_ids", "not_exhaustive_category_ids")
    )
    return instances_record(_with(job, items, *lists), image, problems, class_of, federated=True)


def _ref_coco(job: Job, image: Image, problems: Problems, class_of: dict[int, int], split: str) -> Record:
    """Return the record of a RefCOCO example.

    The expressions are in the field `raw`, as the annotators wrote them. TFDS lacks the normalized expressions (lower
    case, no period), which the REFER toolkit calls `sent`.
    """
    objects = job.labels["objects"]
    rows = zip(objects["id"], objects["label"], objects["bbox"], objects["mask"], objects["refexp"]["raw"])
    items = [
        {
            "ref_id": f"of annotation {number}",
            "ann_id": int(number),
            "category_id": int(label),
            "bbox": _xywh(box, image),
            "segmentation": _rle(mask),
            "sentences": [text.decode() for text in texts],
        }
        for number, label, box, mask, texts in rows
    ]
    return referring_record(_with(job, items), image, problems, class_of, every=split != "train")


def _voc(job: Job, image: Image, problems: Problems, class_of: dict[int, int], split: str) -> Record:
    """Return the record of a VOC example. Objects marked as difficult become crowds: VOC's evaluation ignores them."""
    objects = job.labels["objects"]
    items = []
    for number, (label, box, difficult) in enumerate(zip(objects["label"], objects["bbox"], objects["is_difficult"])):
        x, y, width, height = _xywh(box, image)
        bbox = x - 1, y - 1, width + 1, height + 1  # VOC counts pixels from 1 and includes the last
        items.append({"id": number, "category_id": int(label), "bbox": bbox, "iscrowd": int(difficult)})
    return instances_record(_with(job, items), image, problems, class_of, federated=False)


def _cityscapes(job: Job, image: Image, problems: Problems, class_of: dict[int, int], split: str) -> Record:
    """Return the record of a Cityscapes example. Pixels of labels that the evaluation does not use are ignored."""
    labels = same_size(job.labels["segmentation_label"][..., 0], image)
    pieces = [Piece(class_of[label], labels == label) for label in np.unique(labels).tolist() if label in class_of]
    return panoptic_record(job.key, image, pieces, CITYSCAPES)


def _with(job: Job, items: list[dict[str, Any]], absent: tuple[int, ...] = (), partial: tuple[int, ...] = ()) -> Job:
    """Return the job with COCO annotations as labels, for the functions of `coco_records`.

    absent, partial: ids of categories that are verified as absent, and that are labeled only in part (LVIS).
    """
    return dataclasses.replace(job, labels=Labels(items, None, None, absent, partial))


def _xywh(box: Any, image: Image) -> tuple[float, ...]:
    """Convert a box ymin, xmin, ymax, xmax (fractions, 0 to 1) to COCO's x, y, width, height in pixels.

    The result is rounded to 1/1000 pixel, about the precision of float32.
    """
    y0, x0, y1, x1 = (float(v) * size for v, size in zip(box, (image.height, image.width) * 2))
    return tuple(round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0))


def _rle(mask: np.ndarray) -> dict[str, Any]:
    """Convert a mask from TFDS, [h, w, channels], to COCO's run-length code. Pixels above 0 are in the mask."""
    return {"size": list(mask.shape[:2]), "counts": encode_rle(mask[..., 0] > 0)}


# ---- Supported builders --------------------------------------------------------------------------------------------


def _named(features: Any) -> Vocabulary:
    """Return the classes, named after the builder's labels, and {class id: class index}."""
    spaced = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv/monitor"}  # VOC's
    names = enumerate(features["objects"]["label"].names)
    return vocabulary([{"id": i, "name": spaced.get(name, name)} for i, name in names], "the builder's labels")


def _coco_ids(features: Any) -> Vocabulary:
    """Return COCO's 80 classes and {category id: class index}.

    The builder `ref_coco` provides category ids, but no names.
    """
    return vocabulary([{"id": i, "name": name} for i, name in zip(THING_IDS, class_names(80), strict=True)], "COCO")


def _cityscapes_labels(features: Any) -> Vocabulary:
    return CITYSCAPES, {label: i for i, label in enumerate(cityscapes.LABELS)}


def _splits(*ours: str) -> dict[str, str]:
    return {split: "validation" if split == "val" else split for split in ours}


def _refer(name: str, *splits: str) -> TfdsSet:
    def key(example: Example) -> str:
        return f"COCO_train2014_{example['image/id']:012d}.jpg"

    return TfdsSet(name, _splits(*splits), ("tensorflow", "pycocotools"), _coco_ids, key, _ref_coco)


def _pascal(name: str, *splits: str) -> TfdsSet:
    def key(example: Example) -> str:
        return example["image/filename"].decode()

    return TfdsSet(name, _splits(*splits), ("tensorflow",), _named, key, _voc, exhaustive=True)


CITYSCAPES = tuple(dataclasses.replace(info, is_region=True) for info in cityscapes.CLASSES)
SETS: dict[str, TfdsSet] = {
    "lvis": TfdsSet(
        "lvis_v1",
        _splits("train", "val", "minival"),
        ("tensorflow", "apache_beam"),
        _named,
        lambda example: f"{example['image/id']:012d}.jpg",
        _lvis,
    ),
    "ref_coco/refcoco_unc": _refer("refcoco", "train", "val", "testA", "testB"),
    "ref_coco/refcoco_google": _refer("refcoco_google", "train", "val", "test"),
    "ref_coco/refcocoplus_unc": _refer("refcocoplus", "train", "val", "testA", "testB"),
    "ref_coco/refcocog_google": _refer("refcocog_google", "train", "val"),
    "ref_coco/refcocog_umd": _refer("refcocog", "train", "val", "test"),
    "voc/2007": _pascal("voc_2007", "train", "val", "test"),
    "voc/2012": _pascal("voc_2012", "train", "val"),
    "cityscapes/semantic_segmentation": TfdsSet(
        "cityscapes_fine_sem_seg",
        _splits("train", "val"),
        ("tensorflow",),
        _cityscapes_labels,
        lambda example: example["image_id"].decode(),
        _cityscapes,
        exhaustive=True,
        image="image_left",
    ),
}
_INSTEAD = {
    "coco": (
        "its builder needs TensorFlow even for reading, and has no instance masks; "
        "use mqformer prepare public coco_2017 or coco_2017_panoptic"
    ),
    "scene_parse150": (
        "its builder has neither masks nor names of the 150 classes; use mqformer prepare public ade20k_panoptic"
    ),
}
