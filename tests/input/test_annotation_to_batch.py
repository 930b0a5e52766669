"""From annotation files to a Batch, task by task, against pycocotools, PIL and the files' own words.

On a canvas as long as the images' longer side nothing is resized, so that every pixel must agree.
"""

import itertools
import json
import pathlib
import re

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import recipe

from mqformer_jax.input.batch import unpack
from mqformer_jax.input.mixture import make_loader
from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.models.tokenizer import WordTokenizer

ROWS = 12


def asked(root, name, split, tasks, side, **data):
    """File name → (prompts, ignored pixels) of the first images that fill the canvas: {(text, region, exhaustive):
    [mask or box]}.
    """
    config = recipe("small")
    config.batch_size = 4
    config.eval.sets = ()
    config.data.update(
        dict(
            root=root,
            canvas=(side, side),
            scale_range=(1.0, 1.0),
            flip=0.0,
            threads=0,
            max_targets=100,
            max_prompts=200,
        )
        | data
    )
    config.data.mixture = (dict(name=name, split=split, tasks=tasks),)
    config.data.lattice_stride = 1  # all pixels
    loader = make_loader(config, WordTokenizer(1 << 20, 8))
    source = ShardSource(root, name, split)
    longer_side = {
        r.key: max(r.height, r.width) for r in map(Record.from_bytes, map(source.__getitem__, range(len(source))))
    }
    found = {}
    for batch, notes in itertools.islice(loader.stream(), 20):
        masks, ignore = (unpack(bits, config.data.canvas) for bits in (batch.masks, batch.ignore))
        for i, note in enumerate(notes):
            h, w = batch.size[i]
            key = note.key.split("/", 1)[1]
            if longer_side[key] != side:
                continue
            prompts = {}
            for p, text in enumerate(note.texts):
                rows = np.flatnonzero(batch.positive[i, :, p])
                things = [
                    masks[i, n, :h, :w] if batch.has_mask[i, n] else np.round(batch.boxes[i, n] * side, 1).tolist()
                    for n in rows
                ]
                prompts[text, bool(batch.is_region[i, p]), bool(batch.prompt_exhaustive[i, p])] = things
            found[key] = prompts, ignore[i, :h, :w]
        if len(found) >= ROWS:
            return found
    return found


def load(path: pathlib.Path):
    return json.loads(path.read_text())


def decoded(annotation, image):
    rle = annotation["segmentation"]
    if isinstance(rle, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(rle, image["height"], image["width"]))
    elif isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, image["height"], image["width"])
    return coco_mask.decode(rle).astype(bool)


def visible(masks):
    """Masks of 4 pixels and more, in one order; smaller ones are no targets."""
    return sorted((m for m in masks if m.sum() >= 4), key=lambda m: m.tobytes())


def assert_same(found, wanted, what):
    for a, b in zip(visible(found), visible(wanted), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(what))


def test_panoptic_batch_matches_the_annotations(small_root, real_data):
    data = load(real_data / "coco/panoptic/val.json")
    category = {
        c["id"]: (re.sub("(-merged|-other|-stuff)+$", "", c["name"]).replace("-", " "), c["isthing"])
        for c in data["categories"]
    }
    category |= {c["id"]: (c["name"], 1) for c in data["categories"] if c["isthing"]}
    names = {i["id"]: i["file_name"] for i in data["images"]}
    of_file = {names[a["image_id"]]: a for a in data["annotations"]}
    found = asked(small_root, "coco_2017_panoptic", "val", ("panoptic",), 640)
    assert len(found) >= ROWS
    for key, (prompts, ignored) in found.items():
        rgb = np.array(Image.open(real_data / "coco/panoptic/val" / of_file[key]["file_name"]).convert("RGB")).astype(
            int
        )
        ids = rgb @ [1, 256, 65536]
        segments = of_file[key]["segments_info"]
        crowds = [s for s in segments if s["iscrowd"]]
        np.testing.assert_array_equal(ignored, np.isin(ids, [0] + [s["id"] for s in crowds]))
        unsure = {s["category_id"] for s in crowds}
        for category_id, (name, thing) in category.items():
            mine = [ids == s["id"] for s in segments if s["category_id"] == category_id and not s["iscrowd"]]
            wanted = mine if thing or not mine else [np.any(mine, axis=0)]
            if wanted or category_id not in unsure:
                assert_same(prompts[name, not thing, category_id not in unsure], wanted, (key, name))
        assert len(prompts) == len(category) - len(unsure - {s["category_id"] for s in segments if not s["iscrowd"]})


def test_instance_and_crowd_masks_match_the_annotations(small_root, real_data):
    data = load(real_data / "coco/instances_train.json")
    names = {c["id"]: c["name"] for c in data["categories"]}
    images = {i["file_name"]: i for i in data["images"]}
    found = asked(small_root, "coco_2017", "train", ("instance",), 640)
    assert len(found) >= ROWS
    for key, (prompts, ignored) in found.items():
        mine = [a for a in data["annotations"] if a["image_id"] == images[key]["id"]]
        crowds = [decoded(a, images[key]) for a in mine if a["iscrowd"]]
        np.testing.assert_array_equal(ignored, np.any([np.zeros_like(ignored), *crowds], axis=0))
        for (text, region, exhaustive), masks in prompts.items():
            of_class = [a for a in mine if names[a["category_id"]] == text]
            assert not region and exhaustive == (not any(a["iscrowd"] for a in of_class))
            assert_same(masks, [decoded(a, images[key]) for a in of_class if not a["iscrowd"]], (key, text))
        assert {names[a["category_id"]] for a in mine if not a["iscrowd"]} <= {text for text, _, _ in prompts}


def test_lvis_prompts_follow_its_federated_labels(small_root, real_data):
    data = load(real_data / "coco/lvis.json")
    texts = {c["id"]: {s.replace("_", " ") for s in (c["name"], *c["synonyms"])} for c in data["categories"]}
    images = {i["file_name"]: i for i in data["images"]}
    found = asked(small_root, "lvis_v0.5", "train", ("instance",), 640)
    assert len(found) >= ROWS
    for key, (prompts, _) in found.items():
        image = images[key]
        mine = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        present, partial = {a["category_id"] for a in mine}, set(image["not_exhaustive_category_ids"])
        absent = {c for c in image["neg_category_ids"] if c in texts} - present
        assert len(prompts) == len(present | absent), "a class that nobody checked is not asked"
        for (text, region, exhaustive), masks in prompts.items():
            (category,) = [c for c in present | absent if text in texts[c]]
            assert not region and exhaustive == (category not in partial)
            assert_same(masks, [decoded(a, image) for a in mine if a["category_id"] == category], (key, text))


def test_expressions_with_mask_box_or_no_target_match_the_annotations(small_root, real_data):
    data = load(real_data / "coco/referring.json")
    images = {i["file_name"]: i for i in data["images"]}
    found = asked(small_root, "refcoco", "train", ("referring",), 640) | asked(
        small_root, "refcoco", "val", ("referring",), 640
    )
    kinds = set()
    for key, (prompts, _) in found.items():
        mine = [r for r in data["refs"] if r["image_id"] == images[key]["id"]]
        for (text, region, exhaustive), targets in prompts.items():
            (ref,) = [r for r in mine if text in [" ".join(s.split()) for s in r["sentences"]]]
            assert region and exhaustive
            if ref.get("no_target"):
                assert targets == []
                kinds.add("nothing")
            elif ref["has_mask"]:
                np.testing.assert_array_equal(targets[0], decoded(ref, images[key]))
                kinds.add("mask")
            else:
                x, y, w, h = ref["bbox"]
                np.testing.assert_allclose(targets[0], [x + w / 2, y + h / 2, w, h], atol=0.06)
                kinds.add("box")
    assert kinds == {"nothing", "mask", "box"}


def test_semantic_batch_matches_the_annotations(small_root, real_data):
    names = load(real_data / "camvid/classes.json")["classes"][:11]  # 11 is "unlabelled"
    found = asked(small_root, "camvid", "train", ("semantic",), 480)
    assert len(found) >= ROWS
    for key, (prompts, ignored) in found.items():
        index = np.array(Image.open(real_data / "camvid/trainannot" / f"{key}.png"))
        np.testing.assert_array_equal(ignored, index == 11)
        assert {text.replace(" ", "") for text, _, _ in prompts} == {
            n.replace("_", "").replace(" ", "").lower() for n in map(str.lower, names)
        }
        for value, name in enumerate(names):
            (masks,) = [m for (text, region, sure), m in prompts.items() if region and sure and same_words(text, name)]
            assert_same(masks, [index == value] if (index == value).any() else [], (key, name))


def same_words(a, b):
    return a.replace(" ", "").lower() == b.replace("_", "").replace(" ", "").lower()


def test_foreground_mask_is_the_union_of_its_instances(small_root, real_data):
    items = {i["image_id"]: i["ann_ids"] for i in load(real_data / "coco/foreground.json")["items"]}
    instances = [load(real_data / f"coco/instances_{split}.json") for split in ("train", "val")]
    shapes = {a["id"]: a for data in instances for a in data["annotations"]}
    images = {i["file_name"]: i for data in instances for i in data["images"]}
    found = asked(small_root, "foreground", "train", ("foreground",), 640)
    assert len(found) >= 6
    for key, (prompts, _) in found.items():
        union = np.any([decoded(shapes[a], images[key]) for a in items[images[key]["id"]]], axis=0)
        ((prompt, (mask,)),) = prompts.items()
        assert prompt == ("foreground", True, True)
        np.testing.assert_array_equal(mask, union)


def test_matte_target_is_the_alpha_thresholded_at_one_half(small_root, real_data):
    alphas = {path.stem: np.array(Image.open(path).convert("L")) for path in (real_data / "matting/alpha").iterdir()}
    sides = {max(alpha.shape) for alpha in alphas.values() if max(alpha.shape) % 32 == 0}
    found = asked(small_root, "mattes", "train", ("foreground",), max(sides))
    assert found
    for key, (prompts, _) in found.items():
        assert list(prompts) == [("foreground", True, True)]
        np.testing.assert_array_equal(prompts["foreground", True, True][0], alphas[key] > 127)


def test_box_only_targets_match_the_annotations(small_root, real_data):
    data = load(real_data / "boxonly/raccoon.json")
    images = {i["file_name"]: i for i in data["images"]}
    side = max(max(i["width"], i["height"]) for i in data["images"] if max(i["width"], i["height"]) % 32 == 0)
    found = asked(small_root, "raccoon", "train", ("detection",), side)
    assert found
    for key, (prompts, _) in found.items():
        boxes = [a["bbox"] for a in data["annotations"] if a["image_id"] == images[key]["id"]]
        ((prompt, targets),) = prompts.items()
        assert prompt == ("raccoon", False, True)
        wanted = sorted([x + w / 2, y + h / 2, w, h] for x, y, w, h in boxes)
        # boxes that leave the image by a pixel are clipped
        np.testing.assert_allclose(sorted(targets), wanted, atol=1.1)
