"""A small recipe compiled for a TPU pod slice that is not there."""

import json
import subprocess
import sys

import jax
import pytest
from mqformer_jax.configs import coco_ref
from tiny import get_config

from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.tools import compile_for_tpu as pods
from mqformer_jax.tools import hlo, jaxprs
from mqformer_jax.training.step import TrainStep


@pytest.fixture(scope="module")
def eight_chips():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install -e '.[tpu]'")
    return pods.get_topology("v5e:2x4")


@pytest.fixture(scope="module")
def report(eight_chips):
    """The tiny recipe on two data x four fsdp chips, one image each."""
    config = get_config()
    config.mesh = (2, 4, 1)
    config.model.dtype = "bfloat16"
    # what was compiled for chips that are not there cannot be read again
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return pods.measure(config, "v5e:2x4", eight_chips)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.tpu_compiler
def test_small_train_step_fits_and_is_reported_in_a_table(report):
    assert report["fits"] and report["devices"] == 8 and report["hosts"] == 2 and report["images"] == 8
    assert 0 < report["needed"] < 1e9 and report["available"] > 15e9
    told = pods.table(report)
    assert any(line.startswith("fits:") and "true" in line for line in told.splitlines()) and "v5e:2x4" in told
    assert json.loads(json.dumps(report)) == report


@pytest.mark.tpu_compiler
def test_train_state_buffers_are_donated(report):
    assert report["memory"]["output"] < 0.01 * report["memory"]["arguments"]


@pytest.mark.tpu_compiler
def test_no_collective_runs_in_a_loop(report):
    """Deformable attention, matcher, points and top-k stay on their device; weights are gathered once, gradients summed
    once.
    """
    assert {"all-gather", "all-reduce"} <= set(report["collectives"])
    assert {kind: entry["in_loops"] for kind, entry in report["collectives"].items() if entry["in_loops"]} == {}


@pytest.mark.tpu_compiler
def test_devices_send_gradients_and_weights_but_no_activations(report):
    """Two bytes of gradients and one of weights for each of theirs, and hardly anything else: no activation travels."""
    config = get_config()
    config.mesh = (2, 4, 1)
    parameters = sum(x.size * 4 for x in jax.tree.leaves(TrainStep(config, make_mesh(config.mesh)).abstract.params))
    assert sum(entry["sent"] for entry in report["collectives"].values()) < 3.2 * parameters


@pytest.mark.tpu_compiler
def test_step_time_estimate_uses_the_slower_of_compute_and_memory(report):
    seconds = report["estimate"]
    assert seconds["step"] == max(seconds["compute"], seconds["memory"]) + seconds["network"]
    assert seconds["images_per_second"] == pytest.approx(8 / seconds["step"])
    assert 0 < seconds["irregular"] == pytest.approx(seconds["step_at_most"] - seconds["step"])


@pytest.mark.tpu_compiler
def test_needed_memory_is_parsed_from_the_out_of_memory_error(eight_chips):
    one = jax.sharding.SingleDeviceSharding(eight_chips[0])
    x = jax.ShapeDtypeStruct((1 << 16, 1 << 16), "float32", sharding=one)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: (x @ x.T) @ (x + 1)).lower(x).compile()
    assert pods._needed(str(error.value)) > pods.memory_of(eight_chips[0]) > 15e9


@pytest.mark.tpu_compiler
def test_table_of_oversized_step_lists_the_largest_arrays(report):
    refused = {k: v for k, v in report.items() if k not in ("memory", "estimate", "bytes_accessed", "collectives")}
    told = pods.table(refused | {"fits": False, "needed": 4e10}).splitlines()
    sizes = [entry["bytes"] for entry in report["largest"]]  # few: of so small a step, most lies on the chip
    assert sizes == sorted(sizes, reverse=True) and 0 < len(sizes) <= 5 and sizes[0] > 100
    assert any(line.startswith("fits:") and "false" in line for line in told)
    assert sum(line.startswith("largest") for line in told) == len(sizes)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["v5e", "v3:2x2", "v5e:two", "v5e:9x9", ""])
def test_unknown_topology_gives_one_line_error(eight_chips, name):
    with pytest.raises(ValueError) as error:
        pods.get_topology(name)
    assert f"--topology={name}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "name, devices", [("v5e:1x1", 1), ("v4:2x2x1", 4), ("v5p:2x2x2", 8), ("v6e:4x4", 16), ("tpu7x:2x2x1", 8)]
)
def test_topologies_of_every_tpu_generation_are_available(eight_chips, name, devices):
    assert len(pods.get_topology(name)) == devices and name.partition(":")[0] in pods.CHIPS


def test_indivisible_batch_size_is_raised_to_one_image_per_device():
    config = get_config()
    assert pods.adapted(config, 8)[0].batch_size == 8 and pods.adapted(config, 8)[1] == ""
    adapted, note = pods.adapted(config, 256)
    assert adapted.batch_size == 256 and "batch_size 8" in note and config.batch_size == 8


def test_memory_advice_stops_at_the_first_fitting_config(monkeypatch):
    """Each is tried on top of those before it; recomputation that is on already, and parts of one image, are not."""
    config, seen = get_config(), []
    config.batch_size = 16

    def measure(config, topology, devices):
        seen.append((config.model.remat, config.grad_accum_steps, tuple(config.mesh), config.batch_size))
        return {"fits": len(seen) == 4, "needed": 1.0}

    monkeypatch.setattr(pods, "measure", measure)
    tried = [change for change, _ in pods.advice(config, "v5e:2x4", jax.devices())]
    assert seen[-1] == ("layers", 2, (1, -1, 1), 16) and len(tried) == 4
    assert tried[-1] == (
        '--config.model.remat="dots" --config.model.remat="layers" --config.grad_accum_steps=2 --config.mesh=(1, -1, 1)'
    )


def test_command_with_unknown_topology_fails_without_traceback():
    command = [sys.executable, "-m", "mqformer_jax", "compile", "--config=tests/tiny.py:train", "--topology=v9:2x2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=hlo.__file__.split("mqformer_jax")[0])
    assert done.returncode == 1 and "Traceback" not in done.stderr and "--topology=v9:2x2" in done.stderr


def test_full_recipe_has_few_scalar_gathers_scatters_and_sorts():
    """Deformable attention reads rows. The rest of the step has no gather, scatter or sort of millions of numbers."""
    config = coco_ref.full()
    config.batch_size = 1
    step = TrainStep(config, make_mesh((1, 1, 1), jax.devices()[:1]))
    found = jaxprs.irregular(step.compiled.trace(*step.arguments).jaxpr.jaxpr)
    assert found["gathered_numbers"] <= 100_000 and found["scattered_numbers"] <= 100_000
    assert found["sorted_numbers"] <= 100_000 and found["random_numbers"] <= 1e6 and found["open_loops"] == 1
    assert found["gathered_rows"] < 60e6 and found["scattered_rows"] < 20e6
