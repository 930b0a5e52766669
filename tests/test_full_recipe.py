"""The recipe at full size, traced and not compiled: R50, 1024 x 1024, 400 queries, 9 layers, 100 targets."""

import jax
import jax.numpy as jnp
from tiny import recipe

from mqformer_jax.input.batch import Batch
from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.train_step import TrainStep


def test_the_full_step_traces_with_the_originals_sizes():
    config = recipe("full")
    b, n, p, side = config.batch_size, config.data.max_targets, config.data.max_prompts, config.data.canvas[0]
    array = lambda kind, *shape: jax.ShapeDtypeStruct((b, *shape), kind)
    batch = Batch(
        image=array(jnp.uint8, side, side, 3),
        size=array(jnp.int32, 2),
        tokens=array(jnp.int32, p, config.model.text.context),
        prompt_valid=array(bool, p),
        prompt_region=array(bool, p),
        prompt_exhaustive=array(bool, p),
        num_targets=array(jnp.int32),
        boxes=array(jnp.float32, n, 4),
        positive=array(bool, n, p),
        has_mask=array(bool, n),
        masks=array(jnp.uint8, n, side, side // 8),
        ignore=array(jnp.uint8, side, side // 8),
        source=array(jnp.int32),
    )
    step = TrainStep(config, make_mesh((8, 1, 1)))
    state, metrics = jax.eval_shape(step.compiled, step.abstract, batch)
    assert jax.tree.structure(state) == jax.tree.structure(step.abstract)
    assert metrics["per_image"].shape == (b,)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    without_text = count(state.params) - count(state.params["text_encoder"])
    assert 45e6 < without_text + count(state.frozen) < 62e6  # Mask DINO with R50 has 52 M; the exchanges add 4.7 M
