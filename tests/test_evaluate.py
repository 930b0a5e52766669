import json

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mqformer_jax.evaluate import evaluate, table
from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.models.tokenizer import make_tokenizer
from mqformer_jax.predict import Predictor
from mqformer_jax.train_step import build_model


@pytest.fixture
def predictor(tiny_config):
    params, frozen = jax.jit(lambda k: build_model(tiny_config, k)[1:])(jax.random.key(0))
    return Predictor(tiny_config, params, frozen, make_tokenizer(tiny_config.model.text))


def test_a_damaged_record_is_named_counted_and_left_out(predictor, tiny_config, sample_root, tmp_path, caplog):
    """The held-out scenes with one cut short in the middle are evaluated like the other three alone."""
    source = ShardSource(sample_root, "sample_scenes", "val")
    whole = [source[i] for i in range(len(source))]
    cut = Record.from_bytes(whole[1])
    cut = Record(cut.key, cut.image[: len(cut.image) // 2], cut.height, cut.width, cut.segments).to_bytes()
    for name, records in (("cut", [whole[0], cut, *whole[2:]]), ("three", [whole[0], *whole[2:]])):
        folder = tmp_path / name
        folder.mkdir()
        writer = ArrayRecordWriter(str(folder / "val-00000-of-00001.array_record"), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        DatasetInfo(name, source.info.classes, {"val": len(records)}).save(str(folder))
    tiny_config.data.root = str(tmp_path)
    results = {}
    for name in ("cut", "three"):
        tiny_config.eval.sets = (dict(name=name, split="val", tasks=("panoptic", "semantic", "referring")),)
        with caplog.at_level("WARNING", logger="absl"):
            results[name] = evaluate(predictor, tiny_config, str(tmp_path / "out"))
    assert results["cut"] == pytest.approx(results["three"])
    assert sum("record 1 is left out" in r.getMessage() for r in caplog.records) == 1


def test_a_second_set_of_a_task_does_not_overwrite_the_first(predictor, tiny_config, tmp_path):
    entry = dict(name="sample_scenes", tasks=("semantic",))
    tiny_config.eval.sets = (dict(entry, split="val"), dict(entry, split="train"))
    tiny_config.eval.limit = 3
    found = evaluate(predictor, tiny_config, str(tmp_path))
    assert {"semantic.miou", "sample_scenes/train/semantic.miou"} <= set(found)
    assert json.loads((tmp_path / "eval.json").read_text()) == found
    assert np.isfinite(list(found.values())).all() and "miou" in table(found)
