"""Write small annotation files, run `mqformer prepare` on them and read the records."""

from __future__ import annotations

import json

from PIL import Image

from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import cli

H, W = 40, 60
CATEGORIES = [{"id": 7, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky-other-merged", "isthing": 0}]
SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]


def write_png(path, array, palette=False):
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image = image.convert("P") if image.mode != "L" else image
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.save(path)


def write_json(path, data):
    path.write_text(json.dumps(data))
    return str(path)


def image_entries(*names, **fields):
    return [{"id": i, "file_name": name, "height": H, "width": W, **fields} for i, name in enumerate(names)]


def prepare(folder, kind, **options):
    """Run the command and return its exit status."""
    options = {
        "name": "toy",
        "split": "train",
        "images": folder / "images",
        "output": folder / "out",
        "workers": 1,
        **options,
    }
    words = [w for k, v in options.items() for w in (f"--{k}", *map(str, v if isinstance(v, list) else [v]))]
    return cli.main([kind, *words])


def read(folder, split="train", name="toy"):
    source = ShardSource(str(folder / "out"), name, split)
    return source.info, {r.key: r for r in (Record.from_bytes(source[i]) for i in range(len(source)))}


def prepare_instances(folder, annotations, images=None, **options):
    data = {"images": images or image_entries("a.jpg"), "annotations": annotations, "categories": CATEGORIES[:1]}
    return prepare(folder, "instances", json=write_json(folder / "ann.json", data), **options)
