"""Training the matting refiner, and what comes of it."""

from __future__ import annotations

import json
import os

import jax
import jaxtyping
import numpy as np
import pytest
from tiny import get_config

from mqformer_jax import train_matting as refining
from mqformer_jax.checkpoint import Weights, save_weights
from mqformer_jax.evaluation.matting import compare
from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.matting.data import make_batches, mattes_of, open_mattes, rough_mask
from mqformer_jax.matting.refiner import FOLDER, Refiner, build_refiner
from mqformer_jax.train_matting import refine, table


def recipe(root: str, variant: str = "train"):
    config = get_config(variant)
    config.data.root = root
    config.checkpoint_every = 100
    config.matting.mixture = tuple(dict(name=name, split="train") for name in ("sample_scenes", "sample_mattes"))
    config.matting.sets = (dict(name="sample_mattes", split="val"),)
    return config


@pytest.fixture(scope="module")
def trained(sample_root, tmp_path_factory):
    """A tiny refiner's workdir and what was measured."""
    workdir = str(tmp_path_factory.mktemp("refined"))
    return workdir, refine(recipe(sample_root), workdir)


def test_refiner_encoder_is_initialized_from_a_checkpoint_backbone(sample_root, tmp_path):
    config, theirs = recipe(sample_root), get_config()
    theirs.model.text.embed_dim = 99  # has no part in it
    _, params, _ = build_refiner(config.matting, config.model.dtype, seed=1)
    save_weights(str(tmp_path), Weights(theirs, {**params, "text_encoder": {"tokens": np.ones(3)}}, {}), {})
    config.matting.init_from = (str(tmp_path),)
    (found, _), _, report = refining.RefineStep(config).init()
    _, fresh, _ = build_refiner(config.matting, config.model.dtype, config.seed)
    jax.tree.map(np.testing.assert_array_equal, found, {**fresh, "backbone": params["backbone"]})
    assert report[0].startswith(f"{tmp_path}: ") and report[-1].startswith("newly initialized: ")


@pytest.mark.slow
def test_short_training_improves_rough_masks_of_unseen_mattes(trained, sample_root):
    refiner, source = Refiner.load(trained[0]), ShardSource(sample_root, "sample_scenes", "val")
    mattes = [matte for i in range(len(source)) for matte in mattes_of(Record.from_bytes(source[i]), i)]
    for grow in (-1, 1, 4):
        results, _ = compare(refiner, mattes, lambda matte, grow=grow: rough_mask(matte.alpha, 0.5, grow), 0)
        assert (
            results["refined"]["sad"] < 0.95 * results["mask"]["sad"]
            and results["refined"]["mse"] < results["mask"]["mse"]
        )


@pytest.mark.slow
def test_evaluation_results_and_pictures_are_written(trained):
    workdir, results = trained
    assert json.load(open(f"{workdir}/refine_eval.json")) == results and set(results["sample_mattes/val"]) == {"rough"}
    assert "SAD" in table(results) and "->" in table(results)
    assert os.path.getsize(f"{workdir}/pictures/refine_sample_mattes_val_rough.jpg") > 1000


@pytest.mark.slow
def test_logged_loss_is_the_sum_of_its_terms_and_decreases(trained):
    lines = [json.loads(line) for line in open(f"{trained[0]}/refine_metrics.jsonl")]
    totals = [line["total"] for line in lines]
    assert lines[-1]["step"] == get_config().matting.steps and np.mean(totals[-50:]) < 0.95 * np.mean(totals[:50])
    assert all(
        line["total"] == pytest.approx(line["l1"] + line["laplacian"] + line["coarse"], rel=1e-4) for line in lines
    )


def test_saved_and_loaded_refiner_gives_the_same_alphas(sample_root, tmp_path):
    config, rng = recipe(sample_root), np.random.default_rng(0)
    graph, params, frozen = build_refiner(config.matting, config.model.dtype, seed=0)
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape).astype(np.float32)), params)
    save_weights(str(tmp_path / FOLDER), Weights(config, params, frozen), {})
    image, masks = rng.integers(0, 256, (70, 50, 3), np.uint8), np.zeros((2, 70, 50), np.float32)
    masks[0, 10:40, 5:30], masks[1, 50:, 40:] = 0.9, 1
    saved = Refiner(config.matting, graph, params, frozen)
    before, after = saved(image, masks), Refiner.load(str(tmp_path))(image, masks)
    np.testing.assert_array_equal(before, after)
    assert (
        after.shape == masks.shape
        and after.dtype == np.float32
        and 0 <= after.min()
        and after.max() <= 1
        and np.abs(after - masks).max() > 0.1
    )


def test_untrained_refiner_returns_the_masks_at_any_image_size(sample_root, monkeypatch):
    config = recipe(sample_root)
    refiner = Refiner(config.matting, *build_refiner(config.matting, config.model.dtype, seed=0))
    for h, w in ((70, 50), (64, 64), (300, 20), (1, 1)):
        mask = np.zeros((2, h, w), np.float32)
        mask[0, : (h + 1) // 2] = 1
        alphas = refiner(np.zeros((h, w, 3), np.uint8), mask)
        assert alphas.shape == (2, h, w) and np.abs(alphas[0] - mask[0]).mean() < 0.05 and not alphas[1].any()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotation would refuse them before
    with pytest.raises(ValueError, match="image's size"):
        refiner(np.zeros((8, 9, 3), np.uint8), np.zeros((1, 9, 8)))


@pytest.mark.slow
def test_pixels_far_from_the_mask_are_neither_used_nor_changed(trained, sample_root):
    record = Record.from_bytes(ShardSource(sample_root, "sample_mattes", "val")[0])
    (matte,) = mattes_of(record, 0)
    (h, w), refiner = matte.alpha.shape, Refiner.load(trained[0])
    image, mask = np.zeros((3 * h, 3 * w, 3), np.uint8), np.zeros((3 * h, 3 * w), np.float32)
    image[h : 2 * h, w : 2 * w], mask[h : 2 * h, w : 2 * w] = matte.image, rough_mask(matte.alpha, 0.5, 2)
    first = refiner(image, mask[None])[0]
    image[:10], image[:, -10:] = 200, 90
    np.testing.assert_array_equal(first, refiner(image, mask[None])[0])
    assert first[h : 2 * h, w : 2 * w].any() and not first[:10].any() and not first[:, -10:].any()


def test_batches_are_deterministic_per_seed(sample_root):
    config = recipe(sample_root)
    sources = open_mattes(sample_root, config.matting.mixture, "mixture")
    first, again = (next(make_batches(config, sources, [{}, {}])) for _ in range(2))
    assert all(np.array_equal(first[k], again[k]) for k in first) and first["image"].shape == (8, 64, 64, 3)
    config.seed = 1
    assert not np.array_equal(first["guidance"], next(make_batches(config, sources, [{}, {}]))["guidance"])


@pytest.mark.slow
def test_refiner_is_trained_and_evaluated_on_model_masks_when_given(sample_root, tmp_path):
    from mqformer_jax.train import train

    config = recipe(sample_root, "process")
    config.steps, config.matting.steps, config.matting.own = 1, 1, 1.0
    train(config, str(tmp_path / "model"))
    results = refine(config, str(tmp_path / "model"), str(tmp_path / "model"))
    assert set(results["sample_mattes/val"]) == {"rough", "own"}
    assert Refiner.load(str(tmp_path / "model")) is not None


@pytest.mark.slow
def test_interrupted_save_keeps_the_previous_refiner(trained, monkeypatch):
    workdir, _ = trained
    folder, before = os.path.join(workdir, FOLDER), Refiner.load(workdir)

    def fail(path, *_):
        os.makedirs(os.path.join(path, "checkpoints", "0.part"))
        raise OSError("no space left")

    monkeypatch.setattr(refining, "save_weights", fail)
    with pytest.raises(OSError, match="no space"):
        refining._replace(folder, Weights(get_config(), {}, {}), {})
    after = Refiner.load(workdir)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params)))
    assert Refiner.load(f"{workdir}/{FOLDER}.new") is None


def test_load_returns_none_without_a_saved_refiner(tmp_path):
    assert Refiner.load(str(tmp_path)) is None and Refiner.load(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize(
    "change, checkpoint, words",
    [
        (dict(mixture=()), None, "config.matting.mixture"),
        (dict(mixture=(dict(name="sample_boxes", split="train"),)), None, "'sample_boxes' split 'train' have no matte"),
        (dict(mixture=(dict(name="p3m", split="train"),)), None, "mqformer prepare"),
        (dict(sets=(dict(name="sample_boxes", split="train"),)), None, "config.matting.sets"),
        (dict(init_from=("nowhere",)), None, "nowhere: no checkpoint found"),
        (dict(), "nowhere", "nowhere: no checkpoint found"),
    ],
)
def test_missing_mixture_mattes_or_checkpoint_is_a_one_line_error(sample_root, tmp_path, change, checkpoint, words):
    config = recipe(sample_root)
    config.matting.update(change)
    with pytest.raises((ValueError, OSError), match=words) as error:
        refine(config, str(tmp_path), checkpoint)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


@pytest.mark.slow
def test_training_over_an_existing_refiner_is_rejected(trained, sample_root):
    with pytest.raises(FileExistsError, match="a refiner already exists there"):
        refine(recipe(sample_root), trained[0])
