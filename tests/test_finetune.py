"""configs/finetune.py: a recipe read off a prepared data set and the checkpoint to start from."""

import pytest
from tiny import get_config, recipe

from mqformer_jax import config as recipes
from mqformer_jax.input.record import ClassInfo, DatasetInfo
from mqformer_jax.main import next_commands


@pytest.fixture(autouse=True)
def prepared(tmp_path, monkeypatch):
    """Data sets `things`, `regions`, `phrases` and `mattes` under data/records of the working directory."""
    monkeypatch.chdir(tmp_path)
    sets = {"things": (ClassInfo(("cat",)),), "regions": (ClassInfo(("sky",), True),), "phrases": (), "mattes": ()}
    for name, classes in sets.items():
        folder = tmp_path / "data/records" / name
        folder.mkdir(parents=True)
        splits = {"train": 400, "val": 4} if name != "phrases" else {"train": 4}
        expressions = dict.fromkeys(splits, 9 * (name == "phrases"))
        DatasetInfo(name, classes, splits, expressions=expressions).save(str(folder))


TASKS = {"things": "instance", "regions": "semantic", "phrases": "referring", "mattes": "foreground"}


@pytest.mark.parametrize("name, task", TASKS.items())
def test_training_task_follows_the_data_set_annotations(name, task):
    config = recipe(name, "finetune")
    recipes.check(config)
    assert config.data.mixture[0]["tasks"] == (task,) and config.init_from == ("pretrained/lite",)
    assert [(e["split"], e["tasks"]) for e in config.eval.sets] == ([] if name == "phrases" else [("val", (task,))])
    assert config.steps == (300 if name == "phrases" else 1500)


def test_old_data_set_without_classes_trains_on_referring(tmp_path):
    DatasetInfo("phrases", (), {"train": 4}).save(str(tmp_path / "data/records/phrases"))
    assert recipe("phrases", "finetune").data.mixture[0]["tasks"] == ("referring",)


@pytest.mark.parametrize("name, task", TASKS.items())
def test_suggested_predict_command_matches_the_trained_task(name, task):
    predict = next(line for line in next_commands(recipe(name, "finetune"), "runs/it") if " predict " in line)
    task = {"semantic": "panoptic"}.get(task, task)
    prompts = {"things": "cat", "regions": "sky*", "phrases": "the person on the left"}.get(name)
    assert f"--task={task}" in predict
    assert predict.endswith(f' --prompts="{prompts}"') if prompts else "--prompts" not in predict


def test_quick_recipe_has_a_smaller_model_and_fixed_steps():
    config, longer = recipe("things,quick", "finetune"), recipe("things", "finetune")
    recipes.check(config)
    assert config.steps == 600 and config.batch_size == 2 and config.data.mixture == longer.data.mixture
    assert config.model.decoder_layers < longer.model.decoder_layers and config.init_from == longer.init_from


def test_synthesized_set_trains_with_expressions_and_evaluates_on_source(tmp_path):
    for name, made_from in (("things_syn_m", "things"), ("things_syn", "things_syn_m")):
        (tmp_path / "data/records" / name).mkdir()
        info = DatasetInfo(
            name,
            (ClassInfo(("cat",)),),
            {"train": 400},
            expressions={"train": 9 * name.endswith("syn")},
            made_from=made_from,
        )
        info.save(str(tmp_path / "data/records" / name))
    config = recipe("things_syn", "finetune")
    recipes.check(config)
    assert dict(config.data.mixture[0]) == dict(name="things_syn", split="train", tasks=("instance", "referring"))
    assert [dict(e) for e in config.eval.sets] == [dict(name="things", split="val", tasks=("instance",))]
    assert recipe("things_syn_m", "finetune").data.mixture[0]["tasks"] == ("instance",)


def test_model_and_canvas_come_from_the_checkpoint(monkeypatch):
    theirs = get_config()
    theirs.data.lattice_stride = 2
    monkeypatch.setattr("mqformer_jax.checkpoint.load_config", lambda path: theirs)
    config = recipe("things,runs/other", "finetune")
    recipes.check(config)
    assert (
        config.model == theirs.model
        and config.data.canvas == theirs.data.canvas
        and config.data.lattice_stride == 2
        and config.init_from == ("runs/other",)
    )


@pytest.mark.parametrize(
    "variant, says", [("", "finetune:balloon"), ("unknown", "'unknown' split 'train' is not in data/records")]
)
def test_missing_or_unknown_data_set_name_raises_one_line_error(variant, says):
    with pytest.raises(ValueError, match=says) as error:
        recipe(variant, "finetune")
    assert "\n" not in str(error.value)
