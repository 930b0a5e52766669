"""Checkpoints through what happens to files: cut short, damaged, no room; and onto other meshes."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mqformer_jax.checkpoint import Checkpoints, Weights, config_from_json, load_weights, save_weights
from mqformer_jax.config import base
from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.training.step import TrainState

SPEC = P(None, ("fsdp", "tensor"))


def state(step: int, mesh=None) -> TrainState:
    kernel = jnp.arange(3200.0).reshape(40, 80) + step
    if mesh is not None:
        kernel = jax.device_put(kernel, NamedSharding(mesh, SPEC))
    return TrainState(
        jnp.int32(step), {"kernel": kernel, "layers": [jnp.ones(3)]}, {"mean": jnp.zeros(7)}, (jnp.zeros(2),)
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def files(folder) -> list[pathlib.Path]:
    return [path for path in pathlib.Path(folder).rglob("*") if path.is_file() and path.stat().st_size > 100]


@pytest.fixture
def workdir(tmp_path) -> str:
    with Checkpoints(str(tmp_path), keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), base(), {"step": step})
    return str(tmp_path)


def restore(workdir):
    with Checkpoints(workdir, keep=3) as checkpoints:
        return checkpoints.restore(abstract(state(0)))


@pytest.mark.parametrize("kept", [0.5, 0])
def test_truncated_checkpoint_file_falls_back_to_previous_checkpoint(workdir, kept, caplog):
    """Each file of the newest checkpoint in turn: the newest or, if that cannot be read, the one before; never anything
    else.
    """
    newest = pathlib.Path(workdir, "checkpoints", "3")
    whole = {path.relative_to(newest): path.read_bytes() for path in files(newest)}
    went_back = 0
    for name, data in whole.items():
        (newest / name).write_bytes(data[: int(len(data) * kept)])
        caplog.clear()
        found, data_position = restore(workdir)
        step = int(found.step)
        assert data_position == {"step": step} and step in (2, 3)
        np.testing.assert_array_equal(found.params["kernel"], state(step).params["kernel"])
        if step == 2:
            went_back += 1
            assert "checkpoint of step 3 is damaged" in caplog.text
            (aside,) = pathlib.Path(workdir).glob("damaged_3_*")
            aside.rename(newest)
        (newest / name).write_bytes(data)
    assert went_back >= 3
    assert int(restore(workdir)[0].step) == 3


def test_step_with_damaged_checkpoint_can_be_saved_again(workdir):
    for path in files(pathlib.Path(workdir, "checkpoints", "3")):
        path.write_bytes(b"")
    with Checkpoints(workdir, keep=3) as checkpoints:
        found, _ = checkpoints.restore(abstract(state(0)))
        checkpoints.save(3, state(3), base(), {"step": 3})
    assert int(found.step) == 2 and int(restore(workdir)[0].step) == 3


def test_all_checkpoints_unreadable_raises_and_keeps_them(workdir):
    for path in files(pathlib.Path(workdir, "checkpoints")):
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match="no checkpoint can be read.*step 3.*step 2.*step 1.*Restore a backup"
    ) as error:
        restore(workdir)
    assert "\n" not in str(error.value) and len(os.listdir(os.path.join(workdir, "checkpoints"))) == 3


def test_shape_mismatch_is_reported_and_checkpoint_is_kept(workdir):
    other = state(0).replace(params={"kernel": jnp.zeros((40, 81)), "layers": [jnp.ones(3)]})
    with (
        Checkpoints(workdir) as checkpoints,
        pytest.raises(ValueError, match=r"kernel: \(40, 80\) in the checkpoint, \(40, 81\) in this config"),
    ):
        checkpoints.restore(abstract(other))
    assert not list(pathlib.Path(workdir).glob("damaged*"))


@pytest.mark.parametrize(
    "before, after", [((2, 2, 2), (1, 8, 1)), ((8, 1, 1), (1, 2, 4)), ((2, 2, 2), None), (None, (4, 2, 1))]
)
def test_checkpoint_is_restored_onto_a_different_mesh(tmp_path, before, after):
    place = lambda shape: None if shape is None else make_mesh(shape)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(5, state(5, place(before)), base(), {"step": 5})
    wanted = abstract(state(0, place(after)))
    with Checkpoints(str(tmp_path)) as checkpoints:
        found, _ = checkpoints.restore(wanted)
    assert found.params["kernel"].sharding == wanted.params["kernel"].sharding
    np.testing.assert_array_equal(found.params["kernel"], state(5).params["kernel"])


def test_full_disk_is_reported_in_one_line_and_last_checkpoint_is_kept(tmp_path):
    """Files may not grow past 64 kB from the second save on, which writes more: as on a disk that fills up."""
    program = """
import resource, sys
import jax.numpy as jnp, numpy as np
from mqformer_jax.checkpoint import Checkpoints
from mqformer_jax.config import base
noise = lambda n: jnp.asarray(np.random.default_rng(0).normal(size=n).astype(np.float32))
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"kernel": noise(10)}, base(), {"step": 1})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    checkpoints.save(2, {"kernel": noise(1 << 20)}, base(), {"step": 2})
    try:
        checkpoints.wait()
    except OSError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    (line,) = done.stdout.splitlines()
    assert "checkpoint of step 2 could not be written" in line and "Free disk space" in line
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.latest() == 1


def test_damaged_weights_raise_one_line_error(tmp_path):
    save_weights(str(tmp_path), Weights(base(), {"kernel": jnp.ones((8, 8))}, {}), {})
    (manifest,) = pathlib.Path(tmp_path, "checkpoints", "0", "state").glob("manifest.ocdbt")
    manifest.write_bytes(manifest.read_bytes()[:50])
    with pytest.raises(ValueError, match="the checkpoint of step 0 cannot be read") as error:
        load_weights(str(tmp_path))
    assert "\n" not in str(error.value)


def test_boolean_remat_of_old_configs_is_converted():
    old = base().to_dict()
    for value, name in ((True, "layers"), (False, "none")):
        old["model"]["remat"] = value
        assert config_from_json(json.dumps(old)).model.remat == name
