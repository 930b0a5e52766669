"""A run starts from converted weights: several checkpoints, each by the parts it has."""

import jax
import numpy as np
import pytest
from tiny import get_config

from mqformer_jax.checkpoint import Weights, load_weights, save_weights
from mqformer_jax.convert.rules import leaves
from mqformer_jax.models.build import build_model
from mqformer_jax.models.swin import resize_table
from mqformer_jax.train import train
from mqformer_jax.training.warm_start import bring_tokenizer, initialize


def model(seed: int, **changes):
    config = get_config()
    config.model.update(**changes)
    return config, *jax.jit(lambda: build_model(config.model, seed)[1:])()


def start(params, frozen, config):
    return initialize(params, frozen, config.model, config.init_from, config.init_skip)[:3]


@pytest.fixture(scope="module")
def built():
    return model(0)


@pytest.fixture
def fresh(built):
    return get_config(), *built[1:]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another seed's weights in two folders: backbone and text encoder, and the rest."""
    config, params, frozen = model(1)
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("parts", "rest")]
    encoders = {name: params[name] for name in ("backbone", "text_encoder")}
    save_weights(folders[0], Weights(config, encoders, {}), {})
    save_weights(
        folders[1], Weights(config, {name: tree for name, tree in params.items() if name not in encoders}, frozen), {}
    )
    return params, folders


def test_model_is_initialized_from_several_checkpoints(fresh, other):
    config, params, frozen = fresh
    wanted, folders = other
    config.init_from = tuple(folders)
    found, _, lines = start(params, frozen, config)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert not any(line.startswith("newly initialized") for line in lines)


def test_missing_and_skipped_parameters_stay_fresh_and_are_reported(fresh, other):
    config, params, frozen = fresh
    wanted, folders = other
    config.init_from, config.init_skip = tuple(folders[:1]), ("^backbone/stem",)
    found, _, lines = start(params, frozen, config)
    np.testing.assert_array_equal(found["text_encoder"]["tokens"], wanted["text_encoder"]["tokens"])
    jax.tree.map(np.testing.assert_array_equal, found["decoder"], params["decoder"])
    jax.tree.map(np.testing.assert_array_equal, found["backbone"]["stem"], params["backbone"]["stem"])
    assert "backbone/stem" in lines[-1] and "decoder/layers" in lines[-1] and lines[-1].startswith("newly initialized")


def test_region_embedding_is_zero_only_with_pretrained_heads(fresh, other, tmp_path):
    config, params, frozen = fresh
    wanted, folders = other
    save_weights(str(tmp_path), Weights(get_config(), {"heads": wanted["heads"]}, {}), {})
    for folder, zero in ((str(tmp_path), True), (folders[0], False)):
        config.init_from = (folder,)
        assert (not np.any(start(params, frozen, config)[0]["region_embedding"])) == zero


def test_parameters_of_incompatible_parts_are_skipped_and_reported(fresh, other, tmp_path):
    config, params, frozen = fresh
    theirs = get_config()
    theirs.model.backbone.name, theirs.model.text.embed_dim = "resnet50", 99
    changed = {
        "backbone": {"stem": {"kernel": np.ones(3)}},
        "denoising_embedding": {"kernel": np.ones((99, 32))},
        "learnable": {"content": np.ones((6, 32))},
    }
    save_weights(str(tmp_path), Weights(theirs, changed, {}), {})
    config.init_from = (str(tmp_path),)
    found, _, lines = start(params, frozen, config)
    assert (np.array(found["learnable"]["content"]) == 1).all()
    jax.tree.map(np.testing.assert_array_equal, found["denoising_embedding"], params["denoising_embedding"])
    assert "resnet50" in lines[0] and "text encoder" in lines[0] and lines[0].startswith(f"{tmp_path}: 1 of 3")


def test_shape_mismatch_is_rejected_with_an_init_skip_hint(fresh, tmp_path):
    config, params, frozen = fresh
    save_weights(str(tmp_path), Weights(get_config(), {"learnable": {"content": np.ones((7, 32))}}, {}), {})
    config.init_from = (str(tmp_path),)
    with pytest.raises(ValueError, match=r"learnable/content is \(7, 32\).*\(6, 32\).*init_skip"):
        start(params, frozen, config)


def test_text_positions_are_truncated_to_the_context(fresh, tmp_path):
    config, params, frozen = fresh
    table = np.random.default_rng(0).normal(size=(77, 16)).astype(np.float32)
    save_weights(str(tmp_path), Weights(get_config(), {"text_encoder": {"positions": table}}, {}), {})
    config.init_from = (str(tmp_path),)
    np.testing.assert_array_equal(start(params, frozen, config)[0]["text_encoder"]["positions"], table[:12])


def test_swin_position_bias_tables_are_resized_to_a_new_window(tmp_path):
    """Window 12 pre-trained weights serve a window of 7."""
    config = get_config()
    table = np.random.default_rng(0).normal(size=(1, 23 * 23, 3)).astype(np.float32)
    tree = {"backbone": {"stages": {"0": {"plain": {"position_bias": table}}}}}
    save_weights(str(tmp_path), Weights(config, tree, {}), {})
    config.init_from = (str(tmp_path),)
    zeros = {"backbone": {"stages": {"0": {"plain": {"position_bias": jax.numpy.zeros((1, 169, 3))}}}}}
    found, _, _ = start(zeros, {}, config)
    np.testing.assert_array_equal(leaves(found)["backbone/stages/0/plain/position_bias"], resize_table(table, 7))


def test_weights_with_another_tokenizer_or_level_order_are_rejected(fresh, tmp_path):
    """They fit by their shapes: another tokenizer, another order of levels, other classes in the rows of a table."""
    config, params, frozen = fresh
    theirs = get_config()
    theirs.model.update(level_order="fine_to_coarse")
    theirs.model.text.tokenizer = "clip"
    for name, field in (("text_encoder", "text.tokenizer"), ("decoder", "level_order")):
        folder = str(tmp_path / name)
        save_weights(folder, Weights(theirs, {name: params[name]}, {}), {})
        config.init_from = (folder,)
        with pytest.raises(ValueError, match=f"set config.model.{field} = .*init_skip") as error:
            start(params, frozen, config)
        assert "\n" not in str(error.value)


def test_checkpoint_without_any_matching_array_is_rejected(fresh, tmp_path):
    config, params, frozen = fresh
    save_weights(str(tmp_path), Weights(get_config(), {"elsewhere": np.ones(3)}, {}), {})
    config.init_from = (str(tmp_path),)
    with pytest.raises(ValueError, match="no array of this checkpoint fits"):
        start(params, frozen, config)


@pytest.mark.slow
def test_run_starts_from_init_from_and_resumes_without_it(tiny_run, tmp_path):
    """The first step of the warm-up moves no weight by 0.001. A resumed run needs its own checkpoint alone."""
    config = tiny_run
    wanted, frozen = jax.jit(lambda: build_model(config.model, 1)[1:])()
    fresh = leaves(jax.jit(lambda: build_model(config.model, 0)[1:])()[0])
    save_weights(str(tmp_path / "other"), Weights(config, wanted, frozen), {})
    config.init_from, config.steps = (str(tmp_path / "other"),), 1
    train(config, str(tmp_path / "run"))
    trained = leaves(load_weights(str(tmp_path / "run")).params)
    for path, value in leaves(wanted).items():
        np.testing.assert_allclose(trained[path], value, atol=1e-3, err_msg=path)
    random = [path for path, value in leaves(wanted).items() if not np.array_equal(value, fresh[path])]
    assert len(random) > 20 and all(np.abs(trained[path] - fresh[path]).max() > 0.002 for path in random)
    config.init_from, config.steps = ("deleted since",), 2
    train(config, str(tmp_path / "run"))


def test_run_copies_the_tokenizer_of_its_initial_text_encoder(tmp_path):
    config = get_config()
    config.model.text.tokenizer = "clip"
    for name, kind in (("a", "clip"), ("b", "wordpiece"), ("c", "words")):
        theirs = get_config()
        theirs.model.text.tokenizer = kind
        save_weights(str(tmp_path / name), Weights(theirs, {"region_embedding": np.ones(1)}, {}), {})
        (tmp_path / name / "tokenizer.json").write_text(name)
    config.init_from = tuple(str(tmp_path / name) for name in "abc")
    (tmp_path / "run").mkdir()
    bring_tokenizer(config.init_from, config.model.text.tokenizer, str(tmp_path / "run"))
    assert (tmp_path / "run" / "tokenizer.json").read_text() == "a"
    config.init_from = ("nowhere",)
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint"):
        bring_tokenizer(config.init_from, config.model.text.tokenizer, str(tmp_path / "run"))
