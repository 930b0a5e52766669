"""The device mesh with the axes data, fsdp and tensor. An unused axis has size 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array

AXES = ("data", "fsdp", "tensor")
IMAGES = ("data", "fsdp")  # images are split over these axes, parameters over fsdp and tensor
BATCH = P(IMAGES)


def mesh_shape(shape: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Return the sizes (data, fsdp, tensor) of a mesh. One entry of `shape` may be -1 for all remaining devices.

    Raises ValueError if the product of the sizes cannot be `num_devices`.
    """
    fixed = math.prod(n for n in shape if n != -1)
    if fixed < 1 or list(shape).count(-1) > 1 or num_devices % fixed or (-1 not in shape and fixed != num_devices):
        raise ValueError(
            f"config.mesh = {tuple(shape)} (data, fsdp, tensor) does not fit {num_devices} devices: "
            "the product of the three sizes must be the number of devices; one size may be -1 for all other devices."
        )
    return tuple(num_devices // fixed if n == -1 else n for n in shape)


def check_batch_size(config: ConfigDict, shares: int) -> None:
    """Raise ValueError if `shares` devices (data x fsdp) cannot split each accumulated part of a batch equally."""
    if config.batch_size % (shares * config.grad_accum_steps):
        raise ValueError(
            f"config.batch_size = {config.batch_size} must be divisible by the {shares} devices that split a batch "
            f"(config.mesh: data x fsdp) times config.grad_accum_steps = {config.grad_accum_steps}."
        )


def make_mesh(shape: Sequence[int] = (-1, 1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of all devices. One entry of `shape` (data, fsdp, tensor) may be -1 for all remaining devices.

    Raises ValueError if the shape does not fit the devices, or if the tensor axis spans several hosts.
    """
    devices = list(devices if devices is not None else jax.devices())
    full = mesh_shape(shape, len(devices))
    mesh = jax.make_mesh(full, AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)
    if any(len({device.process_index for device in group}) > 1 for group in mesh.devices.reshape(-1, full[2])):
        raise ValueError(
            f"config.mesh = {tuple(shape)}: the devices along the tensor axis share their images, "
            "so they must belong to one host. Use a smaller third size (tensor)."
        )
    return mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def gather_to_host(tree: Any, mesh: Mesh) -> Any:
    """Return the arrays of `tree`, sharded over the mesh in any way, as full numpy arrays on every host."""
    gathered = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), gathered)


def shard_map_batch(fn: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """Return `fn` mapped over the devices: each device calls it with its own images.

    Devices communicate only where `fn` itself sums over the axes IMAGES. Without this mapping, XLA's partitioner would
    add communication to gathers, sorts and the conditions of search loops, such as one all-reduce over all devices in
    every iteration of a loop. in_specs, out_specs: partition specs that name only axes of IMAGES; the partitioner
    handles the tensor axis.
    """
    return jax.shard_map(fn, mesh=mesh, axis_names=set(IMAGES), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def over_heads(fn: Callable, heads: int) -> Callable:
    """Return `fn` split by attention heads over the tensor axis of the current mesh.

    `fn` takes arrays [b, n, heads, ...] and returns [b, n, heads * d]. Use this for operations that XLA's partitioner
    does not split by heads, such as one gather for all heads. If the tensor axis has size 1, or a size that does not
    divide `heads`, `fn` itself is returned.
    """
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if tensor == 1 or heads % tensor:
        return fn
    return jax.shard_map(
        fn, axis_names={"tensor"}, in_specs=P(None, None, "tensor"), out_specs=P(None, None, "tensor"), check_vma=False
    )


def gather_slices(params: Any, specs: Any) -> Any:
    """Return the full parameters, gathered along fsdp once, before the computation that uses them.

    params, specs: each device's slices of the parameters, and their partition specs. Without the optimization barrier,
    XLA for TPU moves a gather into the loop over layers and repeats it in each iteration.
    """

    def gather(param: Array, spec: P) -> Array:
        return jax.lax.all_gather(param, "fsdp", axis=spec.index("fsdp"), tiled=True) if "fsdp" in spec else param

    return jax.lax.optimization_barrier(jax.tree.map(gather, params, specs))


def sum_over_images(gradient: Array, spec: P) -> Array:
    """Return a parameter's gradient summed over the images of all devices.

    If the parameter is sharded along fsdp, each device returns only its own slice of the sum.
    """
    if "fsdp" not in spec:
        return jax.lax.psum(gradient, IMAGES)
    return jax.lax.psum(
        jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True), "data"
    )
