"""The recipe at full size, traced and not compiled: R50, 1024 x 1024, 400 queries, 9 layers, 100 targets."""

import jax
import pytest
from tiny import recipe

from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.training.step import TrainStep


@pytest.mark.slow
def test_full_recipe_step_traces_with_expected_parameter_count():
    config = recipe("full")
    step = TrainStep(config, make_mesh((8, 1, 1)))
    state, metrics = jax.eval_shape(step.compiled, *step.arguments)
    assert jax.tree.structure(state) == jax.tree.structure(step.abstract)
    assert metrics["per_image"].shape == (config.batch_size,)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    without_text = count(state.params) - count(state.params["text_encoder"])
    assert 45e6 < without_text + count(state.frozen) < 62e6  # Mask DINO with R50 has 52 M; the exchanges add 4.7 M
