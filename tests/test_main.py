"""What a user reads when something is wrong with the command: one line, no traceback."""

import pathlib
import sys

import pytest

from mqformer_jax import main
from mqformer_jax.command_line import parse_flags

REPOSITORY = pathlib.Path(__file__).parent.parent
RECIPE = f"--config={REPOSITORY}/configs/coco_ref.py:sample"


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line; ml_collections finds its overrides in `sys.argv`."""

    def run(*arguments):
        argv = ["main", "--workdir=unused", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        return parse_flags(argv, "mqformer_jax")

    return run


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([RECIPE, "--config.model.nope=1"], ["--config.model.nope=1", "config.py"]),
        ([RECIPE, "--config.steps=many"], ["config.steps", "many"]),
        ([RECIPE, "--confg=1"], ["confg", "Did you mean"]),
        ([f"--config={REPOSITORY}/configs/coco_ref.py:huge"], ["huge", "full, sample, small"]),
        (["--config=configs/none.py"], ["configs/none.py"]),
    ],
)
def test_a_wrong_command_is_one_line(arguments, words, parse):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    message = str(stopped.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_any_field_can_be_overridden(parse):
    parse(RECIPE, "--config.model.queries=learnable", "--config.data.canvas=(64, 64)")
    config = main._CONFIG.value
    assert config.model.queries == "learnable" and tuple(config.data.canvas) == (64, 64)
