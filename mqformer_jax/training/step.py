"""One training step: loss -> gradients -> update. Only this module calls `jax.jit` for training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

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
from mqformer_jax.input.batch import Batch, BatchSpec
from mqformer_jax.losses.costs import LossWeights
from mqformer_jax.losses.criterion import Normalizers, criterion, image_keys
from mqformer_jax.losses.denoising import DenoisingTargets, noise_targets
from mqformer_jax.models.build import abstract_model, build_model
from mqformer_jax.parallel.mesh import (
    BATCH,
    IMAGES,
    batch_sharding,
    check_batch_size,
    gather_slices,
    replicated,
    shard_map_batch,
    sum_over_images,
)
from mqformer_jax.parallel.rules import shardings
from mqformer_jax.training.optimizer import make_optimizer


@no_type_check  # see `Batch`
@flax.struct.dataclass
class TrainState:
    """The variables that a step updates, and the constants that it reads (`frozen`: values of frozen BatchNorms)."""

    step: Int[Array, ""]
    params: Any
    frozen: Any
    opt_state: Any


class TrainStep:
    """The compiled training step of a config on a mesh, with the shardings of its arguments.

    `graph` is the model's structure, and `abstract` has the shapes of the state. `init()` returns a new sharded state.
    A call takes a state and a Batch and returns the next state and the metrics. The given state is donated (its memory
    is reused). Randomness depends only on the seed and the step.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        check_batch_size(config, math.prod(mesh.shape[axis] for axis in IMAGES))
        key = jax.random.key(config.seed)
        self.mesh = mesh
        self._init_key, self._step_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        self._model, self._denoising = config.model, config.denoising
        self.graph, params, _ = abstract_model(config.model)
        self._optimizer = make_optimizer(config.optimizer, config.steps, params)

        shapes = jax.eval_shape(self._fresh, self._init_key)
        self.layout = shardings(shapes, mesh, config.sharding_rules)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.layout
        )
        self._init = jax.jit(self._fresh, out_shardings=self.layout)
        specs = jax.tree.map(lambda sharding: sharding.spec, self.layout.params)
        weights = LossWeights(**config.loss, denoising_masks=config.denoising.masks)
        self._gradients = LossGradients(self.graph, weights, config.grad_accum_steps, specs).on(mesh)
        on_all = replicated(mesh)
        self.compiled = jax.jit(
            self._train_step,
            in_shardings=(self.layout, batch_sharding(mesh), on_all),
            out_shardings=(self.layout, on_all),
            donate_argnums=0,
        )
        encoded = config.optimizer.text_lr_mult == 0
        batch = abstract_batch(config, encoded)
        self.arguments = self.abstract, batch, jax.ShapeDtypeStruct((), bool)  # the shapes to compile for

    def init(self) -> TrainState:
        """Return a newly initialized state, sharded over the mesh."""
        return self._init(self._init_key)

    def center_prompts(self, state: TrainState, batch: Batch) -> TrainState:
        """Subtract the mean prompt embedding of a batch from the region embeddings, and return the changed state.

        A region embedding is added to every prompt, so the prompts of the batch then have a mean of zero. The reason:
        the embeddings of any two texts have a large part in common, from the start and end tokens, from common words
        and from what the layers add to every text. This part hides the words that distinguish prompts
        (docs/benchmarks.md). Without it, class scores depend only on what differs. A model without region embeddings
        stays unchanged. The paper does not mention this.
        """
        center = jax.jit(
            self._center_prompts, in_shardings=(self.layout, batch_sharding(self.mesh)), out_shardings=self.layout
        )
        return center(state, batch)

    def __call__(
        self, state: TrainState, batch: Batch, alive: Bool[Array, ""] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """Return the next state and the metrics.

        alive: the metric "alive" of the previous step, which is False after a step that was not finite. If it is False,
        this step leaves the weights unchanged. None means True.
        """
        if alive is None:  # sharded like the metric, to avoid a second compilation
            alive = jax.device_put(np.bool_(True), replicated(self.mesh))
        return self.compiled(state, batch, alive)

    def put(self, batch: Batch) -> Batch:
        """Copy this host's images to its devices and return the batch of all hosts, as sharded arrays.

        batch: numpy arrays with only the images of this host.
        """
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(self.mesh), x), batch)

    def _fresh(self, key: Array) -> TrainState:
        _, params, frozen = build_model(self._model, key)
        return TrainState(jnp.int32(0), params, frozen, self._optimizer.init(params))

    def _center_prompts(self, state: TrainState, batch: Batch) -> TrainState:
        model = nnx.merge(self.graph, state.params, state.frozen)
        if model.region_embedding is None:
            return state
        embeddings = model.embed_text(batch.tokens, batch.is_region).astype(jnp.float32)
        mean = embeddings.mean((0, 1), where=batch.prompt_valid[..., None])
        return state.replace(params={**state.params, "region_embedding": model.region_embedding[...] - mean})

    def _train_step(
        self, state: TrainState, batch: Batch, alive: Bool[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        """Return the next state and the metrics.

        If the loss or the gradient is not finite, the step leaves the weights unchanged. If its metric "alive" is
        passed to the next step, and so on, later steps leave them unchanged too. This preserves the weights that caused
        the failure.
        """
        images = self._images(batch, jax.random.fold_in(self._step_key, state.step))
        normalizers = Normalizers.of(batch, images.denoising)
        gradients, metrics, by_image = self._gradients(state.params, state.frozen, images, normalizers)

        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        finite = jnp.isfinite(metrics["total"]) & jnp.isfinite(metrics["gradient_norm"])
        new = TrainState(state.step, optax.apply_updates(state.params, updates), state.frozen, opt_state)
        new = jax.tree.map(lambda new, old: jnp.where(finite & alive, new, old), new, state)
        status = {"source": batch.source, "finite": finite, "alive": finite & alive}
        return new.replace(step=state.step + 1), metrics | by_image | status

    def _images(self, batch: Batch, key: Array) -> Images:
        """Return the batch with the denoising queries and random keys of this step."""
        noise_key, point_key = jax.random.split(key)
        config, denoising, count = self._denoising, None, len(batch.size)
        if config.num_queries:
            denoising = noise_targets(noise_key, batch, config.num_queries, config.label_noise, config.box_noise)
        path_keys = jax.random.split(jax.random.fold_in(key, 2), count)
        return Images(batch, denoising, image_keys(point_key, count), path_keys)


class Images(NamedTuple):
    """The images of a batch, with the denoising queries and random keys of a step. Each array has one row per image.

    loss_keys: random keys to draw the pixels at which masks are compared (see `image_keys`). path_keys: random keys for
    the backbone's drop path.
    """

    batch: Batch
    denoising: DenoisingTargets | None
    loss_keys: Array
    path_keys: Array


@dataclasses.dataclass(frozen=True)
class LossGradients:
    """The gradient of the loss over all images of a global batch.

    Each device computes the loss of its own images, in `num_parts` parts one after the other. The loss is divided by
    the number of targets in the global batch. Gradients can therefore be summed over devices only once, at the end.
    Sharded parameters (fsdp) are gathered only once, at the start: a full copy fits in the memory that the activations
    of one image need.

    specs: the PartitionSpec of each parameter.
    """

    graph: nnx.GraphDef
    weights: LossWeights
    num_parts: int
    specs: Any

    def on(self, mesh: Mesh) -> Callable:
        """Return `__call__` as a function of global arrays, mapped over the devices of the mesh."""
        slices = jax.tree.map(lambda spec: P(*(axis if axis in IMAGES else None for axis in spec)), self.specs)
        return shard_map_batch(self, mesh, (slices, P(), BATCH, P()), (slices, P(), BATCH))

    def __call__(
        self, params: Any, frozen: Any, images: Images, normalizers: Normalizers
    ) -> tuple[Any, dict[str, Array], dict[str, Array]]:
        """Return the gradient, the metrics of the global batch, and the metrics of each image.

        images: the images of this device. The gradient is this device's slice, summed over all images. The metrics of
        each image cover the images of this device only.
        """
        params = gather_slices(params, self.specs)
        gradient = jax.grad(self._loss, has_aux=True)
        parts = jax.tree.map(lambda x: x.reshape(self.num_parts, -1, *x.shape[1:]), images)

        def add(total: Any, part: Images) -> tuple[Any, Any]:
            gradients, metrics = gradient(params, frozen, part, normalizers)
            return jax.tree.map(jnp.add, total, gradients), metrics

        if self.num_parts == 1:  # saves the loop and the accumulator
            gradients, metrics = gradient(params, frozen, jax.tree.map(lambda x: x[0], parts), normalizers)
            metrics = jax.tree.map(lambda x: x[None], metrics)
        else:
            gradients, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        of_all, by_image = metrics
        of_all = jax.tree.map(lambda x: jax.lax.psum(x.sum(0), IMAGES), of_all)
        by_image = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_image)
        return jax.tree.map(sum_over_images, gradients, self.specs), of_all, by_image

    def _loss(self, params: Any, frozen: Any, images: Images, normalizers: Normalizers) -> tuple[Array, Any]:
        model = nnx.merge(self.graph, params, frozen)
        batch, denoising, loss_keys, path_keys = images
        queries = None if denoising is None else denoising.queries
        prompts = model.embed_text(batch.tokens, batch.is_region)
        outputs = model(batch.image, batch.size, prompts, batch.prompt_valid, queries, path_keys)
        return criterion(loss_keys, outputs, batch, denoising, normalizers, self.weights)


def abstract_batch(config: ConfigDict, encoded: bool) -> Batch:
    """Return the shapes and dtypes of a global batch, which are needed to compile a step.

    encoded: whether `tokens` are the outputs of a frozen text encoder instead of token ids.
    """
    spec, text = BatchSpec.of(config.data), config.model.text
    n, p, (h, w) = spec.targets, spec.prompts, spec.canvas
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
    return Batch(
        image=array(jnp.uint8, h, w, 3),
        size=array(jnp.int32, 2),
        tokens=array(jnp.float32, p, text.embed_dim) if encoded else array(jnp.int32, p, text.context),
        prompt_valid=array(bool, p),
        is_region=array(bool, p),
        prompt_exhaustive=array(bool, p),
        num_targets=array(jnp.int32),
        boxes=array(jnp.float32, n, 4),
        positive=array(bool, n, p),
        negative=array(bool, n, p),
        has_mask=array(bool, n),
        offset=array(jnp.int32, 2),
        masks=array(jnp.uint8, n, *spec.bits),
        ignore=array(jnp.uint8, *spec.bits),
        source=array(jnp.int32),
    )
