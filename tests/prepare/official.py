"""Arrange the small real data in the layouts in which public data sets are downloaded, a few images per split.

The layouts follow the descriptions of the data sets, not mqformer_jax/prepare/datasets/catalog.py, which they test.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from pycocotools import mask as coco_mask

COUNT = 6  # images a split

# Folders of images and of masks of every split of the foreground sets; ThinObject5K has lists instead.
FOREGROUND = [
    ("HRSOD_release/HRSOD_train", "HRSOD_release/HRSOD_train_mask"),
    ("HRSOD_release/HRSOD_test", "HRSOD_release/HRSOD_test_mask"),
    ("MSRA10K_Imgs_GT/Imgs", "MSRA10K_Imgs_GT/Imgs"),
    ("COIFT/images", "COIFT/masks"),
    *((f"DIS5K/DIS-{part}/im", f"DIS5K/DIS-{part}/gt") for part in ("TR", "VD", "TE1", "TE2", "TE3", "TE4")),
    ("DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask"),
    ("DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask"),
    ("UHRSD_TR_2K/image", "UHRSD_TR_2K/mask"),
    ("UHRSD_TE_2K/image", "UHRSD_TE_2K/mask"),
]
# Folders of images, mattes and trimaps (training splits of two sets have none).
MATTES = [
    (
        "alphamatting/input_training_lowres",
        "alphamatting/gt_training_lowres",
        "alphamatting/trimap_training_lowres/Trimap1",
    ),
    ("AIM-500/original", "AIM-500/mask", "AIM-500/trimap"),
    ("AM-2k/train/original", "AM-2k/train/mask", None),
    ("AM-2k/validation/original", "AM-2k/validation/mask", "AM-2k/validation/trimap"),
    ("P3M-10k/train/blurred_image", "P3M-10k/train/mask", None),
    *(
        (f"P3M-10k/validation/{part}/{images}", f"P3M-10k/validation/{part}/mask", f"P3M-10k/validation/{part}/trimap")
        for part, images in (("P3M-500-P", "blurred_image"), ("P3M-500-NP", "original_image"))
    ),
]
REFER = {
    "refcoco/refs(unc).p": ("train", "val", "testA", "testB"),
    "refcoco/refs(google).p": ("train", "val", "test"),
    "refcoco+/refs(unc).p": ("train", "val", "testA", "testB"),
    "refcocog/refs(umd).p": ("train", "val", "test"),
    "refcocog/refs(google).p": ("train", "val"),
}


# What COCO's panoptic classes are in Cityscapes (label id) and BDD100K (category), by COCO's name.
STREET = {
    "person": (24, 31),
    "car": (26, 35),
    "truck": (27, 40),
    "road": (7, 7),
    "sky-other-merged": (23, 30),
    "tree-merged": (21, 29),
}
# ADE20K's classes in its semantic maps and in its instance maps (the benchmark's categoryMapping.txt).
ADE_THINGS = {8: 1, 9: 2, 11: 3, 13: 4, 15: 5, 16: 6, 19: 7, 20: 8, 21: 9}


def arrange(real: Path, root: Path) -> None:
    """Everything that the real data can feed, below `root`; images are links.

    The last four have no real annotations of their own: other real ones say the same in their formats.
    """
    coco_2017(real, root)
    lvis(real, root)
    refer(real, root)
    foreground(real, root)
    label_maps(real, root)
    mattes(real, root)
    objects365(real, root)
    seginw(real, root)
    street(real, root)
    ade_instances(real, root)
    pascal_context(real, root)
    visual_genome(real, root)


def coco_2017(real: Path, root: Path) -> None:
    for split in ("train", "val"):
        panoptic = _first(_load(real / f"coco/panoptic/{split}.json"))
        _dump(root / f"coco/annotations/panoptic_{split}2017.json", panoptic)
        for annotation in panoptic["annotations"]:
            name = annotation["file_name"]
            _link(real / f"coco/panoptic/{split}" / name, root / f"coco/panoptic_{split}2017" / name)
        instances = _first(_load(real / f"coco/instances_{split}.json"))
        _dump(root / f"coco/annotations/instances_{split}2017.json", instances)
        for entry in panoptic["images"] + instances["images"]:
            _link(real / "coco/images" / entry["file_name"], root / f"coco/{split}2017" / entry["file_name"])


def lvis(real: Path, root: Path) -> None:
    """LVIS v1 names no file, only COCO's address of it."""
    data = _load(real / "coco/lvis.json")
    for split, start in (("train", 0), ("val", COUNT)):
        part = _first({**data, "images": data["images"][start:]})
        for entry in part["images"]:
            _link(
                real / "coco/images" / entry.pop("file_name"),
                root / "coco" / "/".join(entry["coco_url"].split("/")[-2:]),
            )
        _dump(root / f"lvis/lvis_v1_{split}.json", part)


def refer(real: Path, root: Path) -> None:
    """The REFER toolkit's folders: pickled refs without shapes, which instances.json has under COCO 2014's file names.

    Every file lacks other refs, so that none is taken for another.
    """
    data = _load(real / "coco/referring.json")
    shown = [ref for ref in data["refs"] if ref["has_mask"] and not ref.get("uncertain")]
    annotations = [
        {"id": 1000 + i, "iscrowd": 0, **{k: ref[k] for k in ("image_id", "category_id", "bbox", "segmentation")}}
        for i, ref in enumerate(shown)
    ]
    names = {entry["id"]: f"COCO_train2014_{entry['id']:012d}.jpg" for entry in data["images"]}
    entries = [
        {**e, "file_name": names[e["id"]]} for e in data["images"] if e["id"] in {ref["image_id"] for ref in shown}
    ]
    for entry in data["images"]:
        _link(real / "coco/images" / entry["file_name"], root / "coco/train2014" / names[entry["id"]])
    for number, (file, splits) in enumerate(REFER.items()):
        refs = [
            {
                "ref_id": i,
                "ann_id": 1000 + i,
                "image_id": ref["image_id"],
                "category_id": ref["category_id"],
                "split": splits[ref["image_id"] % len(splits)],
                "file_name": names[ref["image_id"]].replace(".jpg", f"_{i}.jpg"),
                "sent_ids": list(range(len(ref["sentences"]))),
                "sentences": [
                    {"sent_id": k, "sent": s, "raw": s, "tokens": s.split()} for k, s in enumerate(ref["sentences"])
                ],
            }
            for i, ref in enumerate(shown)
            if i % len(REFER) != number
        ]
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(refs, protocol=2))
        _dump(
            path.parent / "instances.json",
            {"images": entries, "annotations": annotations, "categories": data["categories"]},
        )


def foreground(real: Path, root: Path) -> None:
    """One image with its mask in every folder, another in each; COIFT's masks hold 0 and 1, ThinObject5K's lists name
    its masks.
    """
    files = {name: _load(real / f"coco/{name}.json") for name in ("instances_train", "instances_val")}
    items = _load(real / "coco/foreground.json")["items"]
    for split in ("train", "val", "test"):
        _foreground(
            real,
            root,
            files,
            items.pop(),
            "ThinObject5K/images",
            "ThinObject5K/masks",
            f"ThinObject5K/list/{split}.txt",
        )
    for images, masks in FOREGROUND:
        _foreground(real, root, files, items.pop(), images, masks)


def _foreground(
    real: Path, root: Path, files: dict, item: dict, images: str, masks: str, listed: str | None = None
) -> None:
    data = files[item["instances"]]
    entry = next(e for e in data["images"] if e["id"] == item["image_id"])
    wanted = [a for a in data["annotations"] if a["id"] in item["ann_ids"]]
    mask = np.any([decoded(a["segmentation"], entry["height"], entry["width"]) for a in wanted], axis=0)
    name = Path(entry["file_name"]).stem + ".png"
    _link(real / "coco/images" / entry["file_name"], root / images / entry["file_name"])
    _save(Image.fromarray(mask.astype(np.uint8) * (1 if "COIFT" in masks else 255)), root / masks / name)
    if listed:
        (root / listed).parent.mkdir(exist_ok=True)
        (root / listed).write_text(f"{name}\n")


def label_maps(real: Path, root: Path) -> None:
    """ADE20K's benchmark and SegNet's CamVid."""
    ade = root / "ADEChallengeData2016"
    for number, name in enumerate(sorted(p.stem for p in (real / "ade20k/images").iterdir())):
        split = "training" if number else "validation"
        _link(real / f"ade20k/images/{name}.jpg", ade / f"images/{split}/{name}.jpg")
        _link(real / f"ade20k/annotations/{name}.png", ade / f"annotations/{split}/{name}.png")
    _link(real / "ade20k/objectInfo150.txt", ade / "objectInfo150.txt")
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        for path in sorted((real / "camvid" / source).iterdir())[:COUNT]:
            _link(path, root / f"CamVid/{split}/{path.name}")
            _link(real / f"camvid/{source}annot/{path.stem}.png", root / f"CamVid/{split}annot/{path.stem}.png")


def mattes(real: Path, root: Path) -> None:
    names = sorted(p.stem for p in (real / "matting/images").iterdir())
    for number, folders in enumerate(MATTES):
        for name in names[2 * number : 2 * number + 2]:
            for kind, folder in zip(("images", "alpha", "trimap"), folders):
                if folder:
                    end = "jpg" if kind == "images" else "png"
                    _link(real / f"matting/{kind}/{name}.{end}", root / folder / f"{name}.{end}")


def objects365(real: Path, root: Path) -> None:
    """File names begin with images/v1 or v2, which the patches unpack without."""
    for split in ("train", "val"):
        data: dict[str, list] = {"images": [], "annotations": [], "categories": []}
        for category, (name, version, patch) in enumerate((("raccoon", "v1", 3), ("kangaroo", "v2", 16)), 1):
            part = _first(_load(real / f"boxonly/{name}.json"))
            data["categories"].append({"id": category, "name": name.title()})
            for entry in part["images"]:
                _link(
                    real / "boxonly" / name / entry["file_name"],
                    root / f"objects365v2/{split}/patch{patch}" / entry["file_name"],
                )
                place = f"images/{version}/patch{patch}/{entry['file_name']}"
                data["images"].append({**entry, "id": entry["id"] + 1000 * category, "file_name": place})
            for annotation in part["annotations"]:
                ids = {"image_id": annotation["image_id"] + 1000 * category, "id": annotation["id"] + 1000 * category}
                data["annotations"].append(
                    {**annotation, **ids, "category_id": category, "isfake": 0, "isreflected": 0}
                )
        _dump(root / f"objects365v2/annotations/zhiyuan_objv2_{split}.json", data)


def seginw(real: Path, root: Path, name: str = "Puppies") -> None:
    """Somebody's COCO json in the folder of its images; category ids start at 0."""
    data = _load(real / "balloon/instances.json")
    data["categories"] = [{"id": 0, "name": "balloon", "supercategory": "none"}]
    data["annotations"] = [{**a, "category_id": 0} for a in data["annotations"]]
    for split, start in (("train", 0), ("valid", COUNT)):
        part = _first({**data, "images": data["images"][start:]})
        _dump(root / f"seginw/{name}/{split}/_annotations_min1cat.coco.json", part)
        for entry in part["images"]:
            _link(real / "balloon/images" / entry["file_name"], root / f"seginw/{name}/{split}/{entry['file_name']}")


def street(real: Path, root: Path) -> None:
    """Cityscapes and BDD100K: COCO's panoptic street scenes with their numbers."""
    for split in ("train", "val"):
        data = _load(real / f"coco/panoptic/{split}.json")
        name_of = {c["id"]: c["name"] for c in data["categories"]}
        scenes = [
            a for a in data["annotations"] if {"car", "road"} <= {name_of[s["category_id"]] for s in a["segments_info"]}
        ]
        for annotation in scenes[:2]:
            stem = Path(annotation["file_name"]).stem
            ids = panoptic_ids(real / f"coco/panoptic/{split}" / annotation["file_name"])
            city, bits = np.zeros(ids.shape, np.uint16), np.zeros((*ids.shape, 4), np.uint8)
            for number, segment in enumerate(annotation["segments_info"]):
                label, category = STREET.get(name_of[segment["category_id"]], (0, 0))
                thing, mask = label >= 24, ids == segment["id"]
                city[mask] = label * 1000 + number if thing and not segment["iscrowd"] else label
                bits[mask] = category, 2 * segment["iscrowd"], number + 1 >> 8, number + 1 & 255
            image = Image.open(real / f"coco/images/{stem}.jpg").convert("RGB")
            place = f"{split}/aachen/aachen_{int(stem):06d}_000019"
            _save(image, root / f"cityscapes/leftImg8bit/{place}_leftImg8bit.png")
            _save(Image.fromarray(city), root / f"cityscapes/gtFine/{place}_gtFine_instanceIds.png")
            _save(Image.fromarray(city.astype(np.uint8)), root / f"cityscapes/gtFine/{place}_gtFine_labelIds.png")
            _link(real / f"coco/images/{stem}.jpg", root / f"bdd100k/images/10k/{split}/{stem}.jpg")
            _save(Image.fromarray(bits, "RGBA"), root / f"bdd100k/labels/pan_seg/bitmasks/{split}/{stem}.png")


def ade_instances(real: Path, root: Path) -> None:
    """ADE20K's instance maps: here each class of things is one thing."""
    for path in (root / "ADEChallengeData2016/annotations").glob("*/*.png"):
        index = np.array(Image.open(path))
        rgb = np.zeros((*index.shape, 3), np.uint8)
        for value, category in ADE_THINGS.items():
            rgb[index == value] = category, value, 0
        _save(Image.fromarray(rgb), root / f"ADEChallengeData2016/annotations_instance/{path.parent.name}/{path.name}")


def pascal_context(real: Path, root: Path) -> None:
    """VOC 2010's folders and MATLAB files, with ADE20K's labels."""
    voc = root / "VOCdevkit/VOC2010"
    names = [
        line.split("\t")[-1].split(",")[0] for line in (real / "ade20k/objectInfo150.txt").read_text().splitlines()[1:]
    ]
    for folder in ("trainval", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    (voc / "labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(names, 1)))
    (voc / "59_labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(["background", *names[:59]])))
    stems = sorted(p.stem for p in (real / "ade20k/images").iterdir())
    for split, listed in (("train", stems[1:]), ("val", stems[:1])):
        (voc / f"ImageSets/Main/{split}.txt").write_text("".join(f"{stem}\n" for stem in listed))
    for stem in stems:
        _link(real / f"ade20k/images/{stem}.jpg", voc / f"JPEGImages/{stem}.jpg")
        label_map = np.array(Image.open(real / f"ade20k/annotations/{stem}.png")).astype(np.uint16)
        scipy.io.savemat(voc / f"trainval/{stem}.mat", {"LabelMap": label_map}, do_compression=True)


def visual_genome(real: Path, root: Path) -> None:
    """COCO's people, in enough images to be a class, as objects and as regions with a phrase."""
    data = _load(real / "coco/instances_train.json")
    person = next(c["id"] for c in data["categories"] if c["name"] == "person")
    people = [a for a in data["annotations"] if a["category_id"] == person and not a["iscrowd"]]
    entries = [e for e in data["images"] if e["id"] in {a["image_id"] for a in people}][:52]
    about: dict[str, list] = {"image_data": [], "objects": [], "region_descriptions": []}
    for image_id, entry in enumerate(entries, 2300000):
        _link(
            real / "coco/images" / entry["file_name"],
            root / f"visual_genome/VG_100K{'_2' * (image_id % 2)}/{image_id}.jpg",
        )
        about["image_data"].append(
            {"image_id": image_id, "width": entry["width"], "height": entry["height"], "coco_id": entry["id"]}
        )
        objects, regions = [], []
        for annotation in (a for a in people if a["image_id"] == entry["id"]):
            x, y, w, h = map(round, annotation["bbox"])
            objects.append(
                {
                    "object_id": annotation["id"],
                    "x": x,
                    "y": y,
                    "w": w,
                    "h": h,
                    "names": ["person"],
                    "synsets": ["person.n.01"],
                }
            )
            phrase = f"The person {annotation['id']}."
            regions.append({"region_id": annotation["id"], "x": x, "y": y, "width": w, "height": h, "phrase": phrase})
        about["objects"].append({"image_id": image_id, "objects": objects})
        about["region_descriptions"].append({"id": image_id, "regions": regions})
    for name, content in about.items():
        _dump(root / f"visual_genome/{name}.json", content)
    (root / "visual_genome/object_alias.txt").write_text("person,human\ntv,television\n")


def panoptic_ids(path: Path) -> np.ndarray:
    """The segment ids of a COCO panoptic PNG, by PIL."""
    return np.array(Image.open(path).convert("RGB")).astype(int) @ [1, 256, 65536]


def decoded(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons or run-length codes as bool [height, width], by pycocotools."""
    rle = coco_mask.frPyObjects(segmentation, height, width) if isinstance(segmentation, list) else segmentation
    if isinstance(rle, dict) and isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, height, width)
    return coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle).astype(bool)


def _first(data: dict) -> dict:
    """A COCO json of the first images of another."""
    images = [dict(entry) for entry in data["images"][:COUNT]]
    ids = {entry["id"] for entry in images}
    return {**data, "images": images, "annotations": [a for a in data["annotations"] if a["image_id"] in ids]}


def _load(path: Path) -> dict:
    return json.loads(path.read_text())


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _dump(path: Path, data: dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        os.symlink(source, target)
