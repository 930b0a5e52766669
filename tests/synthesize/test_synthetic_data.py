"""What the loader makes of synthetic parts: they are trained on as the truth is, and can be filtered or dropped."""

import numpy as np
import pytest
import tiny
from sets import CLASSES, H, W, record, write_set

from mqformer_jax import config as recipes
from mqformer_jax.input.mixture import make_loader
from mqformer_jax.input.record import DatasetInfo, Record, Segment, encode_rle
from mqformer_jax.input.tasks import needs_whole_image, to_example

MASK = encode_rle(np.ones((H, W), bool))
MADE = Segment(
    0,
    ("mine",),
    (1.0, 1.0, 20.0, 20.0),
    MASK,
    mask_by="t",
    mask_score=0.7,
    captions=(("a cat", 0.9), ("a pet", 0.4)),
    captions_by="c",
)


def test_synthetic_captions_form_one_prompt_beside_human_expressions():
    info = DatasetInfo("toy", CLASSES, {}, unique_texts=False)
    example = to_example(record(0, MADE), info, ("referring",), "toy/0")
    assert [p.texts for p in example.prompts] == [("mine",), ("a cat", "a pet")]
    assert not any(p.exhaustive for p in example.prompts)
    (target,) = example.targets
    assert target.prompts == (0, 1) and target.mask is not None
    silent = record(0, Segment(0, box=(1.0, 1.0, 20.0, 20.0), captions=(("a cat", 0.9),)))
    assert needs_whole_image(silent, ("referring",)) and not needs_whole_image(silent, ("instance",))


def test_low_score_synthetic_parts_are_dropped_and_human_ones_kept():
    people = Segment(1, ("yours",), (1.0, 1.0, 20.0, 20.0), MASK)
    made = record(0, MADE, people)
    assert made.trusting(0.0, 0.0) == made and made.trusting(0.7, 0.4) == made
    cat, dog = made.trusting(0.0, 0.5).segments
    assert (cat.captions, cat.mask, dog) == ((("a cat", 0.9),), MASK, people)
    cat, dog = made.trusting(0.8, 0.0).segments
    assert (cat.mask, cat.mask_by, cat.box, cat.texts, dog) == (None, "", MADE.box, ("mine",), people)
    assert len(cat.captions) == 2 and not made.trusting(0.0, 1.1).segments[0].captions


def test_old_records_without_synthetic_fields_are_read():
    import msgpack

    old = msgpack.unpackb(record(0, MADE).to_bytes(), raw=False)
    for name in ("mask_by", "mask_score", "captions", "captions_by"):
        del old["segments"][0][name]
    found = Record.from_bytes(msgpack.packb(old)).segments[0]
    assert (found.mask, found.mask_by, found.captions, found.expressions) == (MASK, "", (), ("mine",))


@pytest.mark.parametrize(("least", "masks"), [(None, True), (0.5, True), (0.8, False)])
def test_mixture_min_mask_score_filters_synthetic_masks(tmp_path, least, masks):
    write_set(tmp_path, "toy_syn", [record(i, MADE) for i in range(4)])
    entry = dict(name="toy_syn", split="train", tasks=("instance",)) | (
        {} if least is None else dict(min_mask_score=least)
    )
    config = tiny.get_config("train")
    config.data.update(root=str(tmp_path), mixture=(entry,), threads=1)
    config.batch_size = 4
    recipes.check(config)
    batch = next(make_loader(config, lambda texts: np.zeros((len(texts), 1), np.int32)).batches())
    assert (batch.num_targets == 1).all() and (batch.has_mask[:, 0] == masks).all()
