"""Digests of the first batches of a loader, for `test_mixture`: worker processes want a main module of their own.

python streams.py ROOT '[{"workers": 2, "start_step": 0, "host": 0, "num_hosts": 1, "count": 4}, ...]'
"""

import hashlib
import itertools
import json
import sys

from absl import app, logging
from ml_collections import ConfigDict

from mqformer_jax.input.mixture import make_loader
from mqformer_jax.models.tokenizer import WordTokenizer


def config(root: str, workers: int) -> ConfigDict:
    data = dict(
        root=root, size_exponent=0.5, canvas=(64, 64), max_targets=10, max_prompts=16, lattice_stride=4,
        scale_range=(0.5, 2.0), flip=0.5, color_jitter=0.2, templates=("{}",), leak_guard=True,
        max_corrupt_fraction=0.5, workers=workers, threads=2,
        mixture=[
            dict(name="sample_scenes", split="train", tasks=("panoptic", "referring")),
            dict(name="sample_boxes", split="train", tasks=("instance",)),
        ],
    )  # fmt: skip
    return ConfigDict(dict(seed=3, batch_size=4, data=data, eval=dict(sets=())))


def digests(batches, count: int) -> list[list[str]]:
    """Of each batch, the hash of each row."""
    return [
        [
            hashlib.sha256(b"".join(vars(batch)[k][i].tobytes() for k in sorted(vars(batch)))).hexdigest()
            for i in range(len(batch.size))
        ]
        for batch in itertools.islice(batches, count)
    ]


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    found = []
    for where in json.loads(argv[2]):
        count = where.pop("count")
        loader = make_loader(config(argv[1], where.pop("workers")), WordTokenizer(512, 8))
        found.append([digests(loader.batches(**where), count), loader.bad])
    print(json.dumps(found))


if __name__ == "__main__":
    app.run(main, sys.argv)
