"""One training step: loss -> gradients -> update. The one place that calls `jax.jit` for training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.input.batch import Batch, Room
from mqformer_jax.losses.criterion import Counts, Weights, criterion, image_keys
from mqformer_jax.losses.denoising import noise_targets
from mqformer_jax.models.build import build_model
from mqformer_jax.parallel.mesh import (
    BATCH,
    IMAGES,
    batch_sharding,
    gather_slices,
    over_images,
    replicated,
    sum_over_images,
)
from mqformer_jax.parallel.rules import shardings
from mqformer_jax.training.optimizer import make_optimizer


@no_type_check  # see `Batch`
@flax.struct.dataclass
class TrainState:
    """All that a step changes, and the constants it reads (`frozen`: statistics of frozen norms)."""

    step: Int[Array, ""]
    params: Any
    frozen: Any
    opt_state: Any


class TrainStep:
    """The compiled step of a config on a mesh, with the layouts of all that goes in.

    `graph` is the model's structure, `init()` a fresh sharded state (or its shapes: `abstract`), and calling it takes a
    state and a Batch to the next state and metrics. The state is donated.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        shares = math.prod(mesh.shape[axis] for axis in IMAGES)
        if config.batch_size % (shares * config.accumulate):
            raise ValueError(
                f"config.batch_size = {config.batch_size}: it must divide by the {shares} devices that share it "
                f"(config.mesh: data x fsdp) times config.accumulate {config.accumulate}."
            )
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
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.layout
        )
        self._create = jax.jit(create, out_shardings=self.layout)
        step = make_step(config, self.graph, optimizer, jax.random.fold_in(key, 1), mesh, self.layout.params)
        whole = replicated(mesh)
        self.compiled = jax.jit(
            step,
            in_shardings=(self.layout, batch_sharding(mesh), whole),
            out_shardings=(self.layout, whole),
            donate_argnums=0,
        )
        # what the step is compiled for
        self.arguments = (
            self.abstract,
            abstract_batch(config),
            jax.ShapeDtypeStruct((), bool),
        )

    def init(self) -> TrainState:
        return self._create(self._init_key)

    def __call__(
        self, state: TrainState, batch: Batch, alive: Bool[Array, ""] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """alive: the metric of that name of the step before; where it is false, the weights stay as they are. None: it
        is true.
        """
        if alive is None:  # laid out like the metric: another layout would be another compilation
            alive = jax.device_put(np.bool_(True), replicated(self.mesh))
        return self.compiled(state, batch, alive)

    def put(self, batch: Batch) -> Batch:
        """This host's rows of a batch onto its devices, as a part of the global batch."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(self.mesh), x), batch)


def make_step(
    config: ConfigDict,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    key: Array,
    mesh: Mesh,
    layout: Any,
) -> Callable:
    """The pure function state, batch, alive -> state, metrics. Randomness depends on the seed and the step alone.

    Each device computes the loss of its own images, `config.accumulate` parts of them one after the other, divided by
    what the whole global batch holds; so gradients are summed over devices once, at the end. Parameters that live in
    slices (fsdp) are gathered
    once, before: one whole copy fits where the activations of one image do.

    A step whose loss or gradient is not finite changes no weights. Handed on as `alive`, that keeps later steps from
    changing them, too: the weights stay what they were when the batch came that broke them.
    """
    weights, dn = Weights(**config.loss, noised_masks=config.denoising.masks), config.denoising
    specs = jax.tree.map(lambda sharding: sharding.spec, layout)

    def gradients_of(params, frozen, images, counts):
        params = gather_slices(params, specs)

        def loss_fn(params, batch, copies, keys, path_keys):
            model = nnx.merge(graph, params, frozen)
            text = model.embed_text(batch.tokens, batch.prompt_region)
            outputs = model(batch.image, batch.size, text, batch.prompt_valid, copies and copies[0], path_keys)
            return criterion(keys, outputs, batch, copies, counts, weights)

        def add(total, part):
            gradients, metrics = jax.grad(loss_fn, has_aux=True)(params, *part)
            return jax.tree.map(jnp.add, total, gradients), metrics

        parts = jax.tree.map(lambda x: x.reshape(config.accumulate, -1, *x.shape[1:]), images)
        if config.accumulate == 1:  # no loop, and no zeros to add to
            gradients, metrics = jax.grad(loss_fn, has_aux=True)(params, *jax.tree.map(lambda x: x[0], parts))
            metrics = jax.tree.map(lambda x: x[None], metrics)
        else:
            gradients, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        sums = jax.tree.map(lambda x: jax.lax.psum(x.sum(0), IMAGES), metrics[0])
        by_image = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), metrics[1])
        return jax.tree.map(sum_over_images, gradients, specs), sums, by_image

    slices = jax.tree.map(lambda spec: P(*(axis if axis in IMAGES else None for axis in spec)), specs)
    gradients_of = over_images(gradients_of, mesh, (slices, P(), BATCH, P()), (slices, P(), BATCH))

    def step(state: TrainState, batch: Batch, alive: Bool[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(key, state.step)
        noise_key, point_key = jax.random.split(step_key)
        copies = noise_targets(noise_key, batch, dn.slots, dn.flip, dn.jitter) if dn.slots else None
        path_keys = jax.random.split(jax.random.fold_in(step_key, 2), len(batch.size))
        images = batch, copies, image_keys(point_key, len(batch.size)), path_keys
        gradients, metrics, by_image = gradients_of(state.params, state.frozen, images, Counts.of(batch, copies))

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        finite = jnp.isfinite(metrics["total"]) & jnp.isfinite(metrics["gradient_norm"])
        new = TrainState(state.step, optax.apply_updates(state.params, updates), state.frozen, opt_state)
        new = jax.tree.map(lambda new, old: jnp.where(finite & alive, new, old), new, state)
        return new.replace(step=state.step + 1), {
            **metrics,
            **by_image,
            "source": batch.source,
            "finite": finite,
            "alive": finite & alive,
        }

    return step


def abstract_batch(config: ConfigDict) -> Batch:
    """The shapes of a config's global batch: what a step is traced and compiled for."""
    b, n, p, (h, w) = config.batch_size, config.data.max_targets, config.data.max_prompts, tuple(config.data.canvas)
    text = config.model.text
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((b, *shape), dtype)
    return Batch(
        image=array(jnp.uint8, h, w, 3),
        size=array(jnp.int32, 2),
        tokens=array(jnp.float32, p, text.embed_dim)
        if config.optimizer.text == 0
        else array(jnp.int32, p, text.context),
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
