"""The loop: the same run on one device and eight, stopped and resumed, through a loss that is not finite."""

import collections
import contextlib
import json
import math
import os

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mqformer_jax.checkpoint import Checkpoints, load_weights
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.input.batch import Batch
from mqformer_jax.input.mixture import Loader
from mqformer_jax.models.tokenizer import make_tokenizer
from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.parallel.rules import flatten_paths, path_name
from mqformer_jax.train import train
from mqformer_jax.training.metrics import Metrics
from mqformer_jax.training.step import TrainStep


def lines_of(workdir) -> list[dict[str, float]]:
    with open(os.path.join(workdir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def losses(workdir) -> dict[int, float]:
    return {line["step"]: line["loss/total"] for line in lines_of(workdir) if "loss/total" in line}


def final_state(config, workdir):
    state, data = Checkpoints(workdir).restore(TrainStep(config, make_mesh(config.mesh)).abstract)
    return jax.device_get(state), data


@pytest.fixture(scope="module")
def whole_run(sample_root, tmp_path_factory):
    """A run nobody disturbed, on a 2 x 4 x 1 mesh: (config, workdir, its evaluation)."""
    from tiny import get_config

    config = get_config()
    config.data.root = sample_root
    config.mesh = (2, 4, 1)
    workdir = str(tmp_path_factory.mktemp("whole"))
    with counted() as events:
        results = train(config, workdir)
    assert events["steps compiled"] == 1, "one compilation serves the whole run and all its data sets"
    return config, workdir, results


@contextlib.contextmanager
def counted():
    """How often the train step was compiled (or found in the cache), and how many programs came out of the compilation
    cache.
    """
    events = collections.Counter()
    duration = lambda name, _, **about: events.update(
        {
            "steps compiled": name == "/jax/core/compile/backend_compile_duration"
            and about.get("fun_name") == "jit(_train_step)"
        }
    )
    hits = lambda name, **_: events.update({"cache hits": name == "/jax/compilation_cache/cache_hits"})
    jax.monitoring.register_event_duration_secs_listener(duration)
    jax.monitoring.register_event_listener(hits)
    yield events
    jax.monitoring.unregister_event_duration_listener(duration)
    jax.monitoring.unregister_event_listener(hits)


def test_a_small_run_trains_resumes_and_evaluates(tiny_run, tmp_path):
    """The whole path, for the fast tests; those below look closer, at a model that has everything."""
    config = tiny_run
    config.steps = 2
    assert train(config, str(tmp_path)) == {} and list(losses(tmp_path)) == [1, 2]
    config.steps, config.eval.sets = 3, (dict(name="sample_scenes", split="val", tasks=("panoptic", "referring")),)
    results = train(config, str(tmp_path))
    assert list(losses(tmp_path)) == [1, 2, 3] and {"panoptic.pq", "referring.miou"} <= set(results)
    assert (tmp_path / "eval.json").exists() and Checkpoints(str(tmp_path)).latest() == 3


@pytest.mark.slow
def test_a_run_leaves_metrics_evaluation_pictures_and_a_checkpoint(whole_run):
    config, workdir, results = whole_run
    found = losses(workdir)
    assert list(found) == [1, 2, 3, 4, 5, 6] and all(np.isfinite(v) for v in found.values())
    images = [{k: v for k, v in line.items() if k.startswith("images/")} for line in lines_of(workdir)]
    assert [sum(counts.values()) for counts in images[:6]] == [8, 16, 24, 32, 40, 48] and images[5][
        "images/sample_scenes/train"
    ] > 30
    with open(os.path.join(workdir, "eval.json")) as f:
        assert json.load(f) == results
    wanted = {"panoptic.pq", "instance.mask_ap", "semantic.miou", "referring.miou", "referring.ciou", "foreground.mae"}
    assert wanted <= set(results) and all(0 <= results[k] <= 100 for k in wanted)
    assert {"sample_scenes_val.png", "sample_mattes_val.png", "checkpoints", "config.json"} <= set(os.listdir(workdir))


@pytest.mark.slow
def test_predictor_from_checkpoint_matches_the_trained_model(whole_run):
    config, workdir, _ = whole_run
    state, _ = final_state(config, workdir)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    prompts = ["sky", "the red star"]
    answer = lambda predictor: predictor.predict_raw([image], [predictor.embed(prompts, [True, True])])[0]
    loaded, trained = (
        answer(Predictor.from_checkpoint(workdir)),
        answer(Predictor(config, state.params, state.frozen, make_tokenizer(config.model.text))),
    )
    np.testing.assert_allclose(loaded.class_probs, trained.class_probs, atol=1e-6)
    np.testing.assert_allclose(loaded.masks.logits, trained.masks.logits, atol=1e-4)


@pytest.mark.slow
def test_resumed_run_matches_an_uninterrupted_run(whole_run, tmp_path, monkeypatch):
    config, whole, _ = whole_run

    write = Metrics.write

    def interrupted(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return write(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Metrics, "write", interrupted)
        train(config, str(tmp_path))  # the checkpoint of step 2 is the newest
    with counted() as events:
        train(config, str(tmp_path))
    assert events["cache hits"] >= 1, "a run that goes on does not compile its step again"
    assert losses(tmp_path) == losses(whole)
    assert [line.get("images/sample_scenes/train") for line in lines_of(tmp_path)] == [
        line.get("images/sample_scenes/train") for line in lines_of(whole)
    ]
    ours, theirs = (jax.tree.leaves(final_state(config, w)[0]) for w in (str(tmp_path), whole))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))


def test_center_prompts_makes_the_mean_prompt_embedding_zero(tiny_run, tiny_batch):
    config = tiny_run
    step = TrainStep(config, make_mesh(config.mesh))
    fresh = jax.device_get(step.init())
    state = jax.device_get(step.center_prompts(step.init(), step.put(tiny_batch)))
    embed = lambda state: nnx.merge(step.graph, state.params, state.frozen).embed_text(
        tiny_batch.tokens, tiny_batch.is_region
    )[tiny_batch.prompt_valid]
    before, after = embed(fresh), embed(state)
    assert np.abs(before.mean(0)).max() > 0.1 > 1e-5 > np.abs(after.mean(0)).max()
    np.testing.assert_allclose(before - before[:1], after - after[:1], atol=1e-5, err_msg="all move alike")
    others = lambda state: [x for k, x in flatten_paths(state.params).items() if k != "region_embedding"]
    assert all(map(np.array_equal, others(fresh), others(state)))


def first_step(config, shape, batch) -> dict:
    """The metrics of a run's first step on a mesh."""
    step = TrainStep(config, make_mesh(shape, jax.devices()[: math.prod(shape)]))
    state, metrics = step(step.center_prompts(step.init(), step.put(batch)), step.put(batch))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    return jax.device_get(metrics)


@pytest.mark.slow
def test_first_step_on_eight_devices_matches_one_device(whole_run, tiny_batch):
    config, workdir, _ = whole_run
    metrics, first = first_step(config, (1, 1, 1), tiny_batch), lines_of(workdir)[0]
    assert float(metrics["total"]) == pytest.approx(first["loss/total"], rel=1e-4)
    assert float(metrics["gradient_norm"]) == pytest.approx(first["gradient_norm"], rel=1e-4)


def one_layer_each(root: str):
    """No loop over layers: where loops hold collectives, XLA's devices on a CPU can wait for each other for ever."""
    from tiny import get_config

    config = get_config("train")
    config.data.root = root
    config.model.update(encoder_layers=1, decoder_layers=1, strides=(8,))
    config.model.backbone.widths = (8, 8, 16)
    config.model.text.layers = 1
    return config


SUMS = ("total", "gradient_norm", "class", "mask", "box")


@pytest.mark.slow
def test_sharded_step_matches_gradient_accumulation(sample_root, tiny_batch):
    """Heads and channels split over devices, and a batch in four parts one after the other: two programs that have no
    axis in common. Losses are divided by what the whole batch holds, so its parts add up to it, whatever each holds.
    """
    config = one_layer_each(sample_root)
    split = first_step(config, (1, 4, 2), tiny_batch)
    config.grad_accum_steps = 4
    parts = first_step(config, (2, 1, 1), tiny_batch)
    np.testing.assert_allclose([split[name] for name in SUMS], [parts[name] for name in SUMS], rtol=1e-4)
    assert parts["per_image"].shape == (8,) and parts["taken"][:, 1].sum() == tiny_batch.num_targets.sum()


@pytest.fixture
def broken_at_step_3(monkeypatch):
    """The fifth image of that batch has a box that is nowhere."""
    stream = Loader.stream

    def broken(self, start_step=0, host=0, num_hosts=1):
        for step, (batch, notes) in enumerate(stream(self, start_step, host, num_hosts), start_step):
            if step == 3:
                batch.boxes[5, 0] = np.nan
            yield batch, notes

    monkeypatch.setattr(Loader, "stream", broken)


@pytest.mark.slow
def test_non_finite_loss_stops_the_run_and_saves_a_reproducible_batch(whole_run, tmp_path, broken_at_step_3):
    config, whole, _ = whole_run
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan.* images \S+; .*not_finite_3") as error:
        train(config, str(tmp_path))
    assert "\n" not in str(error.value)
    assert list(losses(tmp_path)) == [1, 2, 3] and Checkpoints(str(tmp_path)).latest() == 2
    folder = tmp_path / "not_finite_3"
    rows = json.loads((folder / "0.json").read_text())["rows"]
    assert [i for i, row in enumerate(rows) if row["loss"] == "nan"] == [5] and rows[5]["image"] in str(error.value)
    assert {row["data"].split("/")[0] for row in rows} <= {"sample_scenes", "sample_boxes", "sample_mattes"}

    kept, step = load_weights(str(folder)), TrainStep(config, make_mesh(config.mesh))
    with np.load(folder / "0.npz") as arrays:
        batch = Batch(**arrays)
    # the step is given copies
    named = {path_name(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(kept.params)}
    params = lambda: jax.tree_util.tree_map_with_path(
        lambda path, place: jax.device_put(named[path_name(path)], place), step.layout.params
    )
    fresh = lambda: step.init().replace(params=params())
    state, again = step(fresh(), step.put(batch))
    assert not again["finite"] and np.isnan(again["total"])
    after = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    assert all(np.array_equal(after[name], leaf) for name, leaf in named.items()), "such a step changes nothing"
    _, mended = step(fresh(), step.put(batch.replace(boxes=np.nan_to_num(batch.boxes, nan=0.5))))
    assert mended["finite"]


@pytest.mark.slow
def test_non_finite_loss_step_is_skipped_when_configured(whole_run, tmp_path, broken_at_step_3, caplog):
    config, _, _ = whole_run
    config = config.copy_and_resolve_references()
    config.not_finite, config.eval.sets = "skip", ()
    train(config, str(tmp_path))
    assert "step 3: the loss is nan" in caplog.text and "the step is skipped (1 so far)" in caplog.text
    lines = lines_of(tmp_path)
    assert [line.get("skipped", 0) for line in lines[:6]] == [0, 0, 0, 1, 0, 0]
    state, _ = final_state(config, str(tmp_path))
    assert int(state.step) == 6 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert (tmp_path / "not_finite_3" / "0.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size, grad_accum_steps", [(6, 1), (8, 4)])
def test_batch_size_not_divisible_by_devices_and_accum_steps_is_rejected(whole_run, batch_size, grad_accum_steps):
    config = whole_run[0].copy_and_resolve_references()
    config.batch_size, config.grad_accum_steps = batch_size, grad_accum_steps
    message = f"config.batch_size = {batch_size} .* 8 .*grad_accum_steps = {grad_accum_steps}"
    with pytest.raises(ValueError, match=message):
        TrainStep(config, make_mesh(config.mesh))


@pytest.mark.slow
def test_parameters_and_moments_are_sharded_by_the_rules(whole_run):
    config, _, _ = whole_run
    layout = TrainStep(config, make_mesh(config.mesh)).layout
    specs = {path_name(path): sharding.spec for path, sharding in jax.tree_util.tree_leaves_with_path(layout)}
    ffn = [spec for name, spec in specs.items() if name.endswith("/decoder/layers/ffn/layers/0/kernel")]
    assert ffn == [P(None, "fsdp", "tensor")] * 3  # the parameter and both moments
    assert specs["params/heads/norm/scale"] == P()


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_in_one_line(whole_run, tmp_path):
    config, workdir, _ = whole_run
    other = config.copy_and_resolve_references()
    other.model.ffn = 48
    with pytest.raises(ValueError, match="does not fit this config") as error:
        train(other, workdir)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_resuming_with_a_different_batch_size_is_rejected(whole_run):
    config, workdir, _ = whole_run
    other = config.copy_and_resolve_references()
    other.batch_size, other.steps = 16, 8
    with pytest.raises(ValueError, match="batch_size"):
        train(other, workdir)
