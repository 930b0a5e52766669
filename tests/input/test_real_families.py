"""Every family of real data, prepared as a user prepares it, through the `:small` recipe's own pipeline into
batches.
"""

import numpy as np
import pytest
from tiny import recipe

from mqformer_jax.input.batch import unpack
from mqformer_jax.input.mixture import make_loader
from mqformer_jax.models.tokenizer import make_tokenizer

BOX_ONLY = {"raccoon", "kangaroo"}
REGIONS_ONLY = {"refcoco", "camvid", "ade20k_sem_seg", "foreground", "mattes"}


@pytest.fixture(scope="module")
def rows(small_root):
    """Name of a data set → its rows among 24 batches of the mixture."""
    config = recipe("small")
    config.data.root = small_root
    config.data.lattice_stride = 1  # all pixels
    loader = make_loader(config, make_tokenizer(config.model.text))
    batches, found = loader.batches(), {entry["name"]: [] for entry in config.data.mixture}
    for _ in range(24):
        batch = next(batches)
        unpacked = unpack(batch.masks, config.data.canvas)
        for i, source in enumerate(batch.source):
            row = {k: v[i] for k, v in vars(batch).items()}
            found[config.data.mixture[source]["name"]].append(row | {"masks": unpacked[i]})
    assert not any(loader.bad.values())
    return found


def test_every_data_set_of_the_mixture_yields_rows_with_targets(rows):
    assert all(len(examples) > 0 for examples in rows.values())
    for name, examples in rows.items():
        assert sum(row["num_targets"] for row in examples) > 0, name


def test_mask_and_region_flags_match_each_data_set(rows):
    for name, examples in rows.items():
        for row in examples:
            n = row["num_targets"]
            assert row["positive"][:n].any(1).all() and not row["positive"][:, ~row["prompt_valid"]].any()
            if name in BOX_ONLY:
                assert not row["has_mask"].any()
            if name in REGIONS_ONLY:
                assert row["is_region"][row["prompt_valid"]].all()
            if name in ("coco_2017", "balloon", *BOX_ONLY):
                assert not row["is_region"].any()


def test_boxes_tightly_enclose_their_masks(rows):
    for examples in rows.values():
        for row in examples:
            h, w = row["masks"].shape[1:]
            for box, has, mask in zip(row["boxes"][: row["num_targets"]], row["has_mask"], row["masks"]):
                if has:
                    y, x = np.nonzero(mask)
                    tight = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / [w, h, w, h]
                    found = np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
                    np.testing.assert_allclose(found, tight, atol=1e-5)
