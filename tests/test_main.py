"""What a user reads when something is wrong with the command: one line, no traceback."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from mqformer_jax import cli
from mqformer_jax.__main__ import COMMANDS
from mqformer_jax.__main__ import main as mqformer

REPOSITORY = pathlib.Path(__file__).parent.parent
RECIPE = f"--config={REPOSITORY}/configs/coco_ref.py:sample"


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line of `train`; ml_collections finds its overrides in `sys.argv`."""

    def run(*arguments):
        values = flags.FlagValues()
        cli.define_recipe(values)
        argv = ["train", *cli.find_recipe(arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        cli.parse_flags(argv, "mqformer train", values)
        return values.config

    return run


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([RECIPE, "--config.zzqq=1"], ["--config.zzqq=1", "config.py"]),
        ([RECIPE, "--config.model.widht=3"], ["--config.model.widht=3", "did you mean 'model.width'"]),
        ([RECIPE, "--config.steps=many"], ["config.steps", "many"]),
        ([RECIPE, "--confg=1"], ["confg", "Did you mean"]),
        ([f"--config={REPOSITORY}/configs/coco_ref.py:huge"], ["huge", "full, gpu, sample, small"]),
        (["--config=configs/none.py"], ["configs/none.py", "coco_ref, finetune"]),
    ],
)
def test_invalid_train_arguments_are_reported_in_one_line(arguments, words, parse):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    message = str(stopped.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "value, valid", [("0", True), ("0.37", True), ("1", True), ("37", False), ("-0.1", False), ("nan", False)]
)
def test_a_score_is_a_number_from_0_to_1(value, valid):
    values = flags.FlagValues()
    flags.DEFINE_float("score", None, "Lowest score.", flag_values=values)
    cli.require_fractions("score", values=values)
    if valid:
        cli.parse_flags(["predict", f"--score={value}"], "mqformer predict", values)
        assert values.score == float(value)
    else:
        with pytest.raises(SystemExit, match=r"^mqformer predict: flag --score=.*: give a number from 0 to 1\.$"):
            cli.parse_flags(["predict", f"--score={value}"], "mqformer predict", values)


def test_any_field_of_a_recipe_can_be_overridden(parse):
    for recipe in (RECIPE, "--config=coco_ref:sample"):  # a path, or the name of an installed recipe
        config = parse(recipe, "--config.model.queries=learnable", "--config.data.canvas=(64, 64)")
        assert config.model.queries == "learnable" and tuple(config.data.canvas) == (64, 64)
        assert config.steps == 1300


@pytest.mark.parametrize(
    "options, status, words",
    [
        (["--check_only"], 0, ["valid", "data/records"]),
        (["--check_only", "--num_devices=4"], 0, ["valid for 4 devices, 2 image(s) each"]),
        (["--check_only", "--num_devices=4", "--config.mesh=(1,2,-1)"], 0, ["valid for 4 devices, 4 image(s) each"]),
        (["--check_only", "--num_devices=16"], 1, ["config.batch_size = 8", "the 16 devices"]),
        (["--check_only", "--num_devices=4", "--config.grad_accum_steps=4"], 1, ["4 devices", "grad_accum_steps = 4"]),
        (["--check_only", "--num_devices=4", "--config.mesh=(8,1,1)"], 1, ["config.mesh = (8, 1, 1)", "4 devices"]),
        (["--check_only", "--num_devices=4", "--config.steps=0"], 1, ["config.steps = 0"]),
        (["--check_only", "--num_devices=0"], 1, ["num_devices"]),
        (["--num_devices=4"], 1, ["--num_devices needs --check_only"]),
    ],
)
def test_check_only_validates_a_recipe_without_the_devices(options, status, words, tmp_path):
    command = [sys.executable, "-m", "mqformer_jax.main", RECIPE, f"--workdir={tmp_path}/run", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "absent"})
    assert done.returncode == status, done.stderr
    said = done.stderr if status else done.stdout
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_help_lists_every_command_in_24_lines_without_importing_jax(capsys):
    code = "import sys; from mqformer_jax.__main__ import main; main(['--help']); assert 'jax' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(said.splitlines()) <= 24 and all(f"\n  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example_and_its_own_options(command):
    done = subprocess.run([sys.executable, "-m", "mqformer_jax", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"mqformer {command} " in done.stdout, done.stderr
    assert "--" in done.stdout and not {"alsologtostderr", "showprefixforinfo"} & set(done.stdout.split())


def test_unknown_command_error_suggests_the_closest_command():
    with pytest.raises(SystemExit, match="unknown command 'predcit'; did you mean 'predict'"):
        mqformer(["predcit"])


def test_the_public_api_is_imported_on_first_use():
    code = "import sys, mqformer_jax; assert 'jax' not in sys.modules; from mqformer_jax import Predictor"
    subprocess.run([sys.executable, "-c", code], check=True)
