import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tiny import get_config

from mqformer_jax import tasks as registry
from mqformer_jax.checkpoint import Weights, save_weights
from mqformer_jax.evaluation.evaluate import evaluate, explain, ignored_fields, named, table
from mqformer_jax.evaluation.instance import InstanceEvaluator
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.models.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def predictor(tiny_weights):
    config = get_config()
    return Predictor(config, *tiny_weights, make_tokenizer(config.model.text))


def test_damaged_record_is_skipped_with_a_warning(predictor, tiny_config, sample_root, tmp_path, caplog):
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
    tiny_config.eval.max_images = 3
    found = evaluate(predictor, tiny_config, str(tmp_path))
    assert {"semantic.miou", "sample_scenes/train/semantic.miou"} <= set(found)
    assert json.loads((tmp_path / "eval.json").read_text()) == found
    assert np.isfinite(list(found.values())).all() and "miou" in table(found)


TASKS = {"sample_scenes": ("panoptic", "instance", "semantic", "referring"), "sample_mattes": ("foreground", "matting")}
IMAGES = {"sample_scenes/val": 4, "sample_mattes/val": 1}


def every_task(config):
    config.eval.sets = tuple(dict(name=name, split="val", tasks=tasks) for name, tasks in TASKS.items())
    return config


def test_details_list_classes_and_worst_images_of_every_task(predictor, tiny_config, tmp_path):
    assert {task for tasks in TASKS.values() for task in tasks} == set(registry.EVALUATED)
    found = evaluate(predictor, every_task(tiny_config), str(tmp_path))
    details = json.loads((tmp_path / "eval_details.json").read_text())
    assert {name: tuple(tasks) for name, tasks in details.items()} == {
        f"{name}/val": tasks for name, tasks in TASKS.items()
    }
    for name, tasks in details.items():
        for task, detail in tasks.items():
            assert all(set(image) > {"key"} and image["key"] for image in detail["worst_images"])
            assert task == "instance" or len(detail["worst_images"]) == IMAGES[name]
            assert bool(detail.get("classes")) == (task in ("panoptic", "instance", "semantic"))
    assert {"instance.mask_ar_100", "foreground.s_measure", "foreground.mean_e", "matting.sad", "matting.conn"} <= set(
        found
    )


def test_refined_mattes_have_separate_metrics(predictor, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor, "refiner", lambda image, masks: np.zeros_like(masks))
    tiny_config.eval.sets = (dict(name="sample_mattes", split="val", tasks=("matting",)),)
    found = evaluate(predictor, tiny_config, str(tmp_path))
    source = ShardSource(tiny_config.data.root, "sample_mattes", "val")
    records = [Record.from_bytes(source[i]) for i in range(len(source))]
    alphas = [r.decode_alpha(s.alpha) / 255 for r in records for s in r.segments if s.foreground]
    assert found["matting.refined_sad"] == pytest.approx(np.mean([a.sum() / 1000 for a in alphas]))
    assert found["matting.sad"] != found["matting.refined_sad"] and "refined_sad" in table(found)


@pytest.mark.slow
def test_augmentation_changes_only_region_and_semantic_results(predictor, tiny_config, tmp_path):
    plain = evaluate(predictor, every_task(tiny_config), str(tmp_path))
    tiny_config.eval.update(scales=(1.0, 1.25), flip=True)
    found = evaluate(predictor, tiny_config, str(tmp_path))
    assert found.keys() == plain.keys()
    changed = {key.split(".")[0] for key in found if found[key] != plain[key]}
    assert {"semantic", "foreground", "matting"} <= changed and not changed & {"panoptic", "instance"}


def test_predictions_are_saved_in_benchmark_formats(predictor, tiny_config, tmp_path):
    tiny_config.eval.object_mask_threshold = 0.0
    evaluate(predictor, every_task(tiny_config), str(tmp_path), save_predictions=True)
    scenes, mattes = (tmp_path / "predictions" / f"{name}_val" for name in TASKS)
    lists = {path.stem: json.loads(path.read_text()) for path in scenes.glob("*.json")}
    assert set(lists) == {"bbox", "segm", "panoptic", "referring", "categories"}
    assert len(lists["segm"]) == len(lists["bbox"]) > 0 and len(lists["referring"]) > 0
    assert {a["file_name"] for a in lists["panoptic"]["annotations"]} == {
        path.name for path in (scenes / "panoptic").glob("*.png")
    }
    for folder, count in (
        (scenes / "panoptic", 4),
        (scenes / "semantic", 4),
        (mattes / "foreground", 1),
        (mattes / "matting", 1),
    ):
        assert len(list(folder.glob("*.png"))) == count


def test_seginw_reports_mean_and_median_ap(predictor, tiny_config, sample_root, tmp_path, monkeypatch):
    for name in ("seginw_a", "seginw_b", "seginw_c"):
        shutil.copytree(f"{sample_root}/sample_scenes", tmp_path / name)
    measured = iter([10.0, 20.0, 60.0])
    monkeypatch.setattr(InstanceEvaluator, "result", lambda self: {"mask_ap": next(measured)})
    tiny_config.data.root, tiny_config.eval.max_images = str(tmp_path), 1
    tiny_config.eval.sets = tuple(dict(name=f"seginw_{c}", split="val", tasks=("instance",)) for c in "abc")
    found = evaluate(predictor, tiny_config, str(tmp_path / "out"))
    assert found["seginw.mean_mask_ap"] == 30 and found["seginw.median_mask_ap"] == 20
    assert found["instance.mask_ap"] == 10 and found["seginw_c/val/instance.mask_ap"] == 60


def test_missing_data_set_is_reported_before_evaluation_starts(predictor, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor, "predict_raw", None)
    tiny_config.eval.sets = (*every_task(tiny_config).eval.sets, dict(name="cocoa", split="val", tasks=("semantic",)))
    with pytest.raises(FileNotFoundError, match="data set 'cocoa' split 'val' is not in"):
        evaluate(predictor, tiny_config, str(tmp_path))


def test_only_the_named_sets_are_evaluated(tiny_config):
    sets = every_task(tiny_config).eval.sets
    assert named(sets, ["sample_mattes/val"]) == sets[1:] and named(sets, []) == tuple(sets)
    with pytest.raises(ValueError, match="--datasets=sample_mattes/test: .* has sample_scenes/val, sample_mattes/val"):
        named(sets, ["sample_mattes/test"])


def command(*arguments) -> subprocess.CompletedProcess:
    recipe = pathlib.Path(__file__).parents[1] / "tiny.py"
    given = [sys.executable, "-m", "mqformer_jax", "evaluate", f"--config={recipe}", *arguments]
    return subprocess.run(
        given, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(recipe.parent.parent)}
    )


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_from_the_command_line(predictor, tiny_config, sample_root, tmp_path):
    save_weights(str(tmp_path), Weights(tiny_config, predictor.params, predictor.frozen), {})
    options = ["--datasets=sample_mattes/val", f"--config.data.root={sample_root}", "--config.eval.max_images=2"]
    done = command(f"--checkpoint={tmp_path}", *options, "--config.data.canvas=(96,96)")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ignored, because the checkpoint has other values: config.data.canvas\n") == 1
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert done.stdout.startswith(table(found)) and {key.split(".")[0] for key in found} == {"foreground", "matting"}
    assert (tmp_path / "eval" / "eval_details.json").exists() and (tmp_path / "eval" / "sample_mattes_val.png").exists()


def test_config_fields_ignored_by_evaluation_are_reported(tiny_config):
    other = get_config()
    assert ignored_fields(tiny_config, other) == []
    other.data.update(canvas=(96, 64), templates=("a {}", "{}"))
    assert ignored_fields(tiny_config, other) == ["config.data.canvas", "config.data.templates"]


def test_task_without_evaluation_code_is_rejected(predictor, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TASKS, "saliency", registry.TASKS["foreground"])
    tiny_config.eval.sets = (dict(name="sample_mattes", split="val", tasks=("foreground", "saliency")),)
    with pytest.raises(NotImplementedError, match="no code for the task 'saliency'"):
        evaluate(predictor, tiny_config, str(tmp_path))


def test_metrics_with_the_same_name_are_explained_per_task():
    results = {"foreground.mse": 1.0, "matting.mse": 2.0, "scenes/val/referring.miou/relation": 3.0, "matting.x": 0.0}
    foreground, matting, referring = explain(results)
    assert foreground.split()[:2] == ["foreground", "mse"] and "0 to 100" in foreground
    assert matting.split()[:2] == ["matting", "mse"] and "thousandths" in matting
    assert referring.split()[:2] == ["referring", "miou"]


def test_missing_checkpoint_error_has_no_traceback(tmp_path):
    done = command(f"--checkpoint={tmp_path}/none")
    assert (
        done.returncode == 1
        and f"{tmp_path}/none: no checkpoint found" in done.stderr
        and "Traceback" not in done.stderr
    )
