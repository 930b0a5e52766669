import time

import jax.numpy as jnp
import pytest

from mqformer_jax.training.progress import Progress, duration


@pytest.mark.parametrize(
    "seconds, said", [(40, "40 s"), (420, "7 min"), (12_600, "3.5 h"), (181_440, "2.1 days"), (89.6, "90 s")]
)
def test_durations_are_formatted_in_readable_units(seconds, said):
    assert duration(seconds) == said


def test_progress_bar_shows_compilation_and_remaining_time(monkeypatch, capsys):
    with Progress(100, 0, shown=True) as progress:
        written = []
        monkeypatch.setattr(progress.bar, "write", written.append)
        for step in range(6):
            with progress.compiling(step):
                time.sleep(1.2 if step == 0 else 0.01)
            progress.update(step + 1, {"loss": jnp.float32(1)})
    assert "compiling the first step, 1 s" in capsys.readouterr().err
    (line,) = written
    assert "s a step: about" in line and line.endswith("for 95 more steps")


def test_hidden_progress_prints_nothing(capsys):
    with Progress(100, 0, shown=False) as progress:
        for step in range(6):
            with progress.compiling(step):
                pass
            progress.update(step + 1, {"loss": jnp.float32(1)})
    assert capsys.readouterr() == ("", "")
