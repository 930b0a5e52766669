"""One training step: loss -> gradients -> update. The one place that calls `jax.jit` for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from mqformer_jax.input.batch import Batch, Room
from mqformer_jax.losses.criterion import Weights, criterion
from mqformer_jax.losses.denoising import noise_targets
from mqformer_jax.models.mqformer import MQFormer
from mqformer_jax.optimizer import make_optimizer
from mqformer_jax.parallel.mesh import batch_sharding, local, replicated
from mqformer_jax.parallel.rules import shardings


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and the constants it reads (`frozen`: statistics of frozen norms)."""

    step: Int[Array, ""]
    params: Any
    frozen: Any
    opt_state: Any


def build_model(config: ConfigDict, seed: Array | int = 0) -> tuple[nnx.GraphDef, Any, Any]:
    """The model as (graph, trained parameters, frozen constants); plain pytrees from here on."""
    graph, params, frozen = nnx.split(MQFormer(config.model, rngs=nnx.Rngs(seed)), nnx.Param, ...)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


class TrainStep:
    """The compiled step of a config on a mesh, with the layouts of all that goes in.

    `graph` is the model's structure, `init()` a fresh sharded state (or its shapes: `abstract`), and calling it takes a
    state and a Batch to the next state and metrics. The state is donated.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        key = jax.random.key(config.seed)
        self.mesh, self._init_key = mesh, jax.random.fold_in(key, 0)
        holder = {}

        def model(k):
            holder["graph"], params, frozen = build_model(config, k)
            return params, frozen

        params, _ = jax.eval_shape(model, self._init_key)
        self.graph = holder["graph"]
        optimizer = make_optimizer(config.optimizer, config.steps, params)

        def create(k):
            params, frozen = model(k)
            return TrainState(jnp.int32(0), params, frozen, optimizer.init(params))

        shapes = jax.eval_shape(create, self._init_key)
        self.layout = shardings(shapes, mesh, config.rules)
        self.abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.layout)
        self._create = jax.jit(create, out_shardings=self.layout)
        step = make_step(config, self.graph, optimizer, jax.random.fold_in(key, 1), local(mesh))
        self.compiled = jax.jit(
            step, in_shardings=(self.layout, batch_sharding(mesh)), out_shardings=(self.layout, replicated(mesh)), donate_argnums=0
        )

    def init(self) -> TrainState:
        return self._create(self._init_key)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self.compiled(state, batch)

    def put(self, batch: Batch) -> Batch:
        """This host's rows of a batch onto its devices, as a part of the global batch."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(self.mesh), x), batch)


def make_step(config: ConfigDict, graph: nnx.GraphDef, optimizer: optax.GradientTransformation, key: Array, local: Callable) -> Callable:
    """The pure function state, batch -> state, metrics. Randomness depends on the seed and the step alone."""
    weights, dn = Weights(**config.loss, noised_masks=config.denoising.masks), config.denoising

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(key, state.step)
        noise_key, point_key = jax.random.split(step_key)
        copies = noise_targets(noise_key, batch, dn.slots, dn.flip, dn.jitter) if dn.slots else None

        def loss_fn(params):
            model = nnx.merge(graph, params, state.frozen)
            text = model.embed_text(batch.tokens, batch.prompt_region)
            path_key = jax.random.fold_in(step_key, 2)
            outputs = model(batch.image, batch.size, text, batch.prompt_valid, copies and copies[0], path_key)
            return criterion(point_key, outputs, batch, copies, weights, local)

        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        metrics["source"] = batch.source
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    return step


def abstract_batch(config: ConfigDict) -> Batch:
    """The shapes of a config's global batch: what a step is traced and compiled for."""
    b, n, p, (h, w) = config.batch_size, config.data.max_targets, config.data.max_prompts, tuple(config.data.canvas)
    text = config.model.text
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((b, *shape), dtype)
    return Batch(
        image=array(jnp.uint8, h, w, 3),
        size=array(jnp.int32, 2),
        tokens=array(jnp.float32, p, text.embed_dim) if config.optimizer.text == 0 else array(jnp.int32, p, text.context),
        prompt_valid=array(bool, p),
        prompt_region=array(bool, p),
        prompt_exhaustive=array(bool, p),
        num_targets=array(jnp.int32),
        boxes=array(jnp.float32, n, 4),
        positive=array(bool, n, p),
        negative=array(bool, n, p),
        has_mask=array(bool, n),
        masks=array(jnp.uint8, Room.of(config.data).mask_bytes),
        windows=array(jnp.int32, n, 5),
        ignore=array(jnp.uint8, h, w // 8),
        source=array(jnp.int32),
    )
