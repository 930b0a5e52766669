"""TFDS's own builders make sets from official layouts. The records are compared with the original files."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

tfds = pytest.importorskip("tensorflow_datasets")

from tensorflow_datasets.core.features import feature, image_feature  # noqa: E402
from tensorflow_datasets.datasets.cityscapes import cityscapes_dataset_builder  # noqa: E402
from tensorflow_datasets.object_detection import voc  # noqa: E402

from mqformer_jax.input.record import Record  # noqa: E402
from mqformer_jax.input.sources import ShardSource  # noqa: E402
from mqformer_jax.prepare import cli  # noqa: E402
from mqformer_jax.prepare.datasets import tfds_sets  # noqa: E402

H, W = 40, 60
SQUARE, TRIANGLE = [10, 5, 30, 5, 30, 25, 10, 25], [40.5, 2, 55, 2.25, 50, 30]


class _Collection(list):
    """What `beam.Create(items) | beam.Map(function)` comes to."""

    def __or__(self, function):
        return [function(item) for item in self]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Has a builder make its set from the files in a folder, with stand-ins for the few functions of TensorFlow and
    Beam that it calls.
    """
    gfile = SimpleNamespace(GFile=open, exists=os.path.exists, listdir=os.listdir)
    tensorflow = SimpleNamespace(io=SimpleNamespace(gfile=gfile))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voc, "tf", tensorflow)
        patch.setattr(cityscapes_dataset_builder, "tf", tensorflow)
        patch.setattr(feature.TensorInfo, "tf_dtype", property(lambda self: self.np_dtype))
        patch.setattr(
            image_feature._ImageEncoder, "_encode_image", lambda self, pixels: cv2.imencode(".png", pixels)[1].tobytes()
        )
        patch.setitem(sys.modules, "apache_beam", SimpleNamespace(Create=_Collection, Map=lambda function: function))

        def make(builder, folder):
            """The folder that is the data_dir of the set."""
            data_dir = tmp_path_factory.mktemp("tfds")
            paths = tfds.core.Path(folder)
            patch.setattr(
                tfds.download.DownloadManager, "download_and_extract", lambda self, urls: dict.fromkeys(urls, paths)
            )
            patch.setattr(tfds.download.DownloadManager, "extract", lambda self, archive: paths)
            patch.setattr(
                tfds.download.DownloadManager,
                "download",
                lambda self, urls: {key: paths / f"{key}.json" for key in urls},
            )
            config = tfds.download.DownloadConfig(manual_dir=folder)
            tfds.builder(builder, data_dir=data_dir).download_and_prepare(
                file_format="array_record", download_config=config
            )
            return data_dir

        yield make


def _picture(seed, kind="JPEG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (H, W, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        data if isinstance(data, bytes) else json.dumps(data).encode() if isinstance(data, dict) else data.encode()
    )


def _prepare(builder, data_dir, out, split, **options):
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    return cli.main(
        ["tfds", builder, "--split", split, "--data_dir", str(data_dir), "--output", str(out), "--workers", "1", *words]
    )


def _records(out, name, split="train"):
    source = ShardSource(str(out), name, split)
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


# ---- RefCOCO -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ref_coco(make, tmp_path_factory):
    """refcoco.json and coco_train2014: image 5 for train, 6 (its file is cut short) for train, 7 for val."""
    folder, refs, images = tmp_path_factory.mktemp("manual"), [], {}
    for image_id, split in ((5, "train"), (6, "train"), (7, "val")):
        file = f"COCO_train2014_{image_id:012d}.jpg"
        _write(folder / "coco_train2014" / file, _picture(image_id)[: -200 if image_id == 6 else None])
        cat = {
            "id": 10 * image_id,
            "category_id": 17,
            "bbox": [10.25, 5.13, 20.5, 20.07],
            "area": 400.5,
            "segmentation": [SQUARE],
        }
        toothbrush = {
            "id": 10 * image_id + 1,
            "category_id": 90,
            "bbox": [40.5, 2, 14.5, 28],
            "area": 200,
            "segmentation": [TRIANGLE],
        }
        said = [(cat, ["Left  cat"]), (toothbrush, ["the brush.", "thing", "thing"])] + [(cat, ["Right?"])] * (
            split == "val"
        )
        images[image_id] = {"info": {"file_name": file, "height": H, "width": W}, "anns": [toothbrush, cat]}
        for annotation, texts in said:
            sentences = [{"raw": text, "sent": "", "sent_id": i} for i, text in enumerate(texts)]
            ref = {
                "ref_id": len(refs),
                "dataset": "refcoco",
                "dataset_partition": "unc",
                "split": split,
                "image_id": image_id,
            }
            refs.append(ref | {"ann": annotation, "sentences": sentences})
    test = {
        "dataset": "refcoco",
        "dataset_partition": "unc",
        "image_id": 7,
        "ann": refs[0]["ann"] | {"id": 70},
        "sentences": [],
    }
    refs += [test | {"split": split, "ref_id": 99, "sentences": refs[0]["sentences"]} for split in ("testA", "testB")]
    _write(folder / "refcoco.json", {"ref": refs, "coco_anns": images})
    return make("ref_coco/refcoco_unc", folder), folder


def test_ref_coco_segments_match_coco_masks_boxes_and_class_names(ref_coco, tmp_path, capsys):
    data_dir, folder = ref_coco
    assert _prepare("ref_coco", data_dir, tmp_path, "train") == 0
    assert (
        "1 dropped" in (said := capsys.readouterr().out)
        and "file is truncated (COCO_train2014_000000000006.jpg)" in said
    )
    info, records = _records(tmp_path, "refcoco")
    assert list(records) == ["COCO_train2014_000000000005.jpg"] and not info.exhaustive
    record = records["COCO_train2014_000000000005.jpg"]
    assert record.image == (folder / "coco_train2014" / record.key).read_bytes() and record.origin == "coco/5"
    truth = {
        "cat": (SQUARE, (10.25, 5.13, 30.75, 25.2), ("Left cat",)),
        "toothbrush": (TRIANGLE, (40.5, 2, 55, 30), ("the brush.", "thing")),
    }
    assert {info.classes[s.class_id].name for s in record.segments} == truth.keys() and len(info.classes) == 80
    for segment in record.segments:
        polygon, box, texts = truth[info.classes[segment.class_id].name]
        assert segment.box == pytest.approx(box, abs=1e-3) and segment.texts == texts
        oracle = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], H, W)))
        np.testing.assert_array_equal(record.decode_mask(segment.mask), oracle)


def test_ref_coco_val_split_keeps_duplicate_expressions(ref_coco, tmp_path):
    assert _prepare("ref_coco/refcoco_unc", ref_coco[0], tmp_path, "val", name="other") == 0
    _, records = _records(tmp_path, "other", "val")
    assert sorted(s.texts for s in records["COCO_train2014_000000000007.jpg"].segments) == [
        ("Left cat", "Right?"),
        ("the brush.", "thing", "thing"),
    ]


def test_ref_coco_category_ids_match_coco(real_data):
    categories = json.loads((real_data / "coco" / "instances_train.json").read_text())["categories"]
    classes, class_of = tfds_sets._coco_ids({})
    assert {c["id"]: c["name"] for c in categories} == {i: classes[number].name for i, number in class_of.items()}


# ---- LVIS ----------------------------------------------------------------------------------------------------------


def test_lvis_keeps_masks_and_absent_and_partially_labeled_classes(make, tmp_path):
    files, annotations = tmp_path / "files", []
    fields = {"height": H, "width": W, "not_exhaustive_category_ids": []}
    images = [
        fields | {"id": i, "coco_url": f"http://x/train2017/{i:012d}.jpg", "neg_category_ids": []} for i in (9, 25, 30)
    ]
    images[0] |= {"neg_category_ids": [1, 1203], "not_exhaustive_category_ids": [2]}
    images[1] |= {"neg_category_ids": [3]}
    for i, category in enumerate((4, 2)):
        box = [10 + i, 5, 20, 20]
        square = [10 + i, 5, 30 + i, 5, 30 + i, 25, 10 + i, 25]
        annotations.append(
            {"id": i, "image_id": 9, "category_id": category, "bbox": box, "area": 400, "segmentation": [square]}
        )
    for name in ("lvis_v1_train", "lvis_v1_val", "lvis_v1_image_info_test_dev", "minival_annotation"):
        _write(files / f"{name}.json", {"images": images, "annotations": annotations})
    for image in images:
        _write(files / "train2017" / f"{image['id']:012d}.jpg", _picture(image["id"]))
    data_dir = make("lvis", files)
    assert _prepare("lvis", data_dir, tmp_path, "train") == 0
    info, records = _records(tmp_path, "lvis_v1")
    assert (len(info.classes), info.exhaustive, records.keys()) == (
        1203,
        False,
        {"000000000009.jpg", "000000000025.jpg"},
    )

    def names(ids):
        return [info.classes[i].name for i in ids]

    record = records["000000000009.jpg"]
    assert (names(record.absent_classes), names(record.partial_classes)) == (
        ["aerosol can", "zucchini"],
        ["air conditioner"],
    )
    assert (
        names(records["000000000025.jpg"].absent_classes) == ["airplane"] and not records["000000000025.jpg"].segments
    )
    assert record.origin == "coco/9" and record.image == (files / "train2017" / record.key).read_bytes()
    for i, segment in enumerate(record.segments):
        filled = np.zeros((H, W), bool)
        filled[5:26, 10 + i : 31 + i] = True  # the builder draws the outline too
        np.testing.assert_array_equal(record.decode_mask(segment.mask), filled)
        assert segment.box == (10 + i, 5, 30 + i, 25)
    assert names(s.class_id for s in record.segments) == ["alarm clock", "air conditioner"]


# ---- VOC, Cityscapes -----------------------------------------------------------------------------------------------


def test_voc_boxes_are_zero_based_and_difficult_objects_become_crowds(make, tmp_path):
    voc_2007 = tmp_path / "VOCdevkit" / "VOC2007"
    things = (("diningtable", 0, (1, 1, 30, 20)), ("tvmonitor", 1, (31, 11, 60, 40)), ("cat", 0, (7, 8, 8, 9)))
    objects = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult><bndbox>"
        f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, difficult, (x0, y0, x1, y1) in things
    )
    for number, split in enumerate(("train", "val", "test")):
        key = f"{number:06d}"
        size = f"<size><width>{W}</width><height>{H}</height><depth>3</depth></size>"
        _write(voc_2007 / "Annotations" / f"{key}.xml", f"<annotation>{size}{objects}</annotation>")
        _write(voc_2007 / "JPEGImages" / f"{key}.jpg", _picture(number))
        _write(voc_2007 / "ImageSets" / "Main" / f"{split}.txt", f"{key}\n")
    data_dir = make("voc/2007", tmp_path)
    for split in ("train", "val", "test"):
        assert _prepare("voc", data_dir, tmp_path, split) == 0
    info, records = _records(tmp_path, "voc_2007", "val")
    assert info.splits == {"train": 1, "val": 1, "test": 1} and info.exhaustive and len(info.classes) == 20
    record = records["000001.jpg"]
    assert record.image == _picture(1) and not record.partial_classes
    truth = {("dining table", False, (0, 0, 30, 20)), ("tv", True, (30, 10, 60, 40)), ("cat", False, (6, 7, 8, 9))}
    assert {(info.classes[s.class_id].name, s.crowd, s.box) for s in record.segments} == truth


def test_cityscapes_has_one_region_per_class_and_ignores_other_labels(make, tmp_path):
    labels = np.random.default_rng(1).choice([0, 7, 26, 33, 9], (H, W)).astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(labels).save(png, "PNG")
    for split in ("train", "val", "test"):
        name = f"{split}/bonn/bonn_000001_000019"
        _write(tmp_path / "leftImg8bit" / f"{name}_leftImg8bit.png", _picture(3, "PNG"))
        _write(tmp_path / "gtFine" / f"{name}_gtFine_labelIds.png", png.getvalue())
    for archive in ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"):
        _write(tmp_path / archive, b"")  # unpacked above
    data_dir = make("cityscapes", tmp_path)
    assert _prepare("cityscapes", data_dir, tmp_path, "val") == 0
    info, records = _records(tmp_path, "cityscapes_fine_sem_seg", "val")
    record = records["bonn_000001_000019"]
    assert record.image == _picture(3, "PNG") and info.exhaustive and all(c.is_region for c in info.classes)
    found = {info.classes[s.class_id].name: record.decode_mask(s.mask) for s in record.segments}
    assert found.keys() == {"road", "car", "bicycle"} and len(record.segments) == 3
    for name, label in (("road", 7), ("car", 26), ("bicycle", 33)):
        np.testing.assert_array_equal(found[name], labels == label)
    np.testing.assert_array_equal(record.decode_mask(record.ignore), (labels == 0) | (labels == 9))


# ---- Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "builder, split, reason",
    [
        ("imagenet2012", "train", "unknown builder 'imagenet2012'; give one of lvis, ref_coco/refcoco_unc, "),
        ("coco/2017", "train", "use mqformer prepare public coco_2017 or coco_2017_panoptic"),
        ("scene_parse150", "train", "use mqformer prepare public ade20k_panoptic"),
        ("voc/2012", "test", "voc/2012 has no split 'test' with labels; it has train, val"),
        ("lvis", "train", "apache-beam to make this data set; run pip install tensorflow apache-beam, or"),
        ("cityscapes", "train", "manual does not exist or is empty"),
    ],
)
def test_unavailable_data_set_is_a_one_line_error(builder, split, reason, tmp_path, monkeypatch, capsys):
    """As on a machine without TensorFlow, except for Cityscapes, whose builder then looks for what has to be got by
    hand.
    """
    for name, known in tfds_sets.SETS.items():
        monkeypatch.setitem(
            tfds_sets.SETS, name, dataclasses.replace(known, needs=() if builder == "cityscapes" else known.needs)
        )
    monkeypatch.setattr(tfds_sets.importlib.util, "find_spec", lambda name: None)
    assert _prepare(builder, tmp_path, tmp_path / "out", split) == 1
    said = capsys.readouterr().err
    assert reason in said and said.startswith("mqformer prepare: ") and said.count("\n") == 1


def test_missing_tensorflow_datasets_error_names_the_pip_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert _prepare("lvis", tmp_path, tmp_path / "out", "train") == 1
    assert (
        capsys.readouterr().err
        == "mqformer prepare: tensorflow-datasets is not installed; run pip install -e '.[tfds]'\n"
    )


def test_tfrecord_data_set_is_rejected_with_a_remedy(ref_coco, tmp_path, capsys):
    shutil.copytree(ref_coco[0], tmp_path / "sets")
    info = next((tmp_path / "sets").glob("ref_coco/*/*/dataset_info.json"))
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    assert _prepare("ref_coco", tmp_path / "sets", tmp_path / "out", "train") == 1
    said = capsys.readouterr().err
    assert f"{info.parent}: " in said and "delete this folder" in said and said.count("\n") == 1
