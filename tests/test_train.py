"""The loop: the same run on one device and eight, stopped and resumed, killed and resumed."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mqformer_jax.checkpoint import Checkpoints, load_weights
from mqformer_jax.models.tokenizer import make_tokenizer
from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.parallel.rules import path_name
from mqformer_jax.predict import Predictor
from mqformer_jax.train import Metrics, train
from mqformer_jax.train_step import TrainStep

REPOSITORY = pathlib.Path(__file__).parent.parent


def metrics(workdir) -> list[dict[str, float]]:
    with open(os.path.join(workdir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def losses(workdir) -> dict[int, float]:
    return {line["step"]: line["loss/total"] for line in metrics(workdir) if "loss/total" in line}


def final_state(config, workdir):
    state, data = Checkpoints(workdir).restore(TrainStep(config, make_mesh(config.mesh)).abstract)
    return jax.device_get(state), data


@pytest.fixture(scope="module")
def whole_run(sample_root, tmp_path_factory):
    """A run nobody disturbed, on a 2 x 2 x 2 mesh: (config, workdir, its evaluation)."""
    from tiny import get_config

    config = get_config()
    config.data.root = sample_root
    config.mesh = (2, 2, 2)
    config.rules = [("kernel", ("fsdp", "tensor"))]
    workdir = str(tmp_path_factory.mktemp("whole"))
    return config, workdir, train(config, workdir)


def test_a_run_leaves_metrics_evaluation_pictures_and_a_checkpoint(whole_run):
    config, workdir, results = whole_run
    found = losses(workdir)
    assert list(found) == [1, 2, 3, 4, 5, 6] and all(np.isfinite(v) for v in found.values())
    images = [{k: v for k, v in line.items() if k.startswith("images/")} for line in metrics(workdir)]
    assert [sum(counts.values()) for counts in images[:6]] == [8, 16, 24, 32, 40, 48] and images[5]["images/sample_scenes/train"] > 30
    with open(os.path.join(workdir, "eval.json")) as f:
        assert json.load(f) == results
    wanted = {"panoptic.pq", "instance.mask_ap", "semantic.miou", "referring.miou", "referring.ciou", "foreground.mae"}
    assert wanted <= set(results) and all(0 <= results[k] <= 100 for k in wanted)
    assert {"sample_scenes_val.png", "sample_mattes_val.png", "checkpoints", "config.json"} <= set(os.listdir(workdir))


def test_a_predictor_from_the_checkpoint_answers_as_the_trained_model(whole_run):
    config, workdir, _ = whole_run
    state, _ = final_state(config, workdir)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    answer = lambda predictor: predictor.ask([image], [predictor.embed(["sky", "the red star"], [True, True])])[0]
    loaded, trained = (
        answer(Predictor.from_checkpoint(workdir)),
        answer(Predictor(config, state.params, state.frozen, make_tokenizer(config.model.text))),
    )
    np.testing.assert_allclose(loaded.class_probs, trained.class_probs, atol=1e-6)
    np.testing.assert_allclose(loaded.masks.logits, trained.masks.logits, atol=1e-4)


def test_stopped_and_resumed_is_the_run_that_was_not(whole_run, tmp_path, monkeypatch):
    config, whole, _ = whole_run

    write = Metrics.write

    def interrupted(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return write(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Metrics, "write", interrupted)
        train(config, str(tmp_path))  # the checkpoint of step 2 is the newest
    train(config, str(tmp_path))
    assert losses(tmp_path) == losses(whole)
    assert [line.get("images/sample_scenes/train") for line in metrics(tmp_path)] == [
        line.get("images/sample_scenes/train") for line in metrics(whole)
    ]
    ours, theirs = (jax.tree.leaves(final_state(config, w)[0]) for w in (str(tmp_path), whole))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))


def test_losses_on_eight_devices_are_those_of_one(whole_run, tiny_batch):
    config, workdir, _ = whole_run
    step = TrainStep(config, make_mesh((1, 1, 1), jax.devices()[:1]))
    state, metrics = step(step.init(), step.put(tiny_batch))
    assert float(metrics["total"]) == pytest.approx(losses(workdir)[1], rel=1e-4)
    assert np.isfinite([float(x.sum()) for x in jax.tree.leaves(state.params)]).all()


def test_parameters_are_spread_over_the_mesh_as_the_rules_say(whole_run):
    config, _, _ = whole_run
    layout = TrainStep(config, make_mesh(config.mesh)).layout
    specs = {path_name(path): sharding.spec for path, sharding in jax.tree_util.tree_leaves_with_path(layout)}
    ffn = [spec for name, spec in specs.items() if name.endswith("/decoder/layers/ffn/layers/0/kernel")]
    assert ffn == [P(None, "fsdp", "tensor")] * 3  # the parameter and both moments
    assert specs["params/heads/norm/scale"] == P()


def test_a_checkpoint_of_another_model_is_refused_in_one_line(whole_run, tmp_path):
    config, workdir, _ = whole_run
    other = config.copy_and_resolve_references()
    other.model.ffn = 48
    with pytest.raises(ValueError, match="does not fit this config") as error:
        train(other, workdir)
    assert "\n" not in str(error.value)


def test_other_data_than_the_checkpoints_is_refused(whole_run):
    config, workdir, _ = whole_run
    other = config.copy_and_resolve_references()
    other.batch_size, other.steps = 16, 8
    with pytest.raises(ValueError, match="batch_size"):
        train(other, workdir)


def test_killed_at_random_moments_it_ends_where_the_undisturbed_run_ends(sample_root, tmp_path):
    command = [sys.executable, "-m", "mqformer_jax.main", f"--config={REPOSITORY}/tests/tiny.py:train", f"--config.data.root={sample_root}"]
    command += ["--config.steps=60"]
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests",
    }
    start = lambda name: subprocess.Popen(
        [*command, f"--workdir={tmp_path / name}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert start("whole").wait() == 0
    rng = random.Random(0)
    for _ in range(2):
        process = start("killed")
        metrics = tmp_path / "killed" / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= before):
            time.sleep(0.01)  # it trains again
        time.sleep(rng.uniform(0, 0.4))
        assert process.poll() is None, "it came to its end before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait() == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ours, theirs = (jax.tree.leaves(load_weights(str(tmp_path / name)).params) for name in ("killed", "whole"))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))
