"""The device mesh: data x fsdp x tensor, each 1 where unused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mqformer_jax.arrays import Array

AXES = ("data", "fsdp", "tensor")
IMAGES = ("data", "fsdp")  # images are split over both; parameters over fsdp and tensor
BATCH = P(IMAGES)


def make_mesh(shape: Sequence[int] = (-1, 1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices; one entry of `shape` (data, fsdp, tensor) may be -1: what is left."""
    devices = list(devices if devices is not None else jax.devices())
    fixed = int(np.prod([n for n in shape if n != -1]))
    if list(shape).count(-1) > 1 or len(devices) % fixed or (-1 not in shape and fixed != len(devices)):
        raise ValueError(f"config.mesh = {tuple(shape)} (data, fsdp, tensor) does not fit {len(devices)} devices.")
    full = tuple(len(devices) // fixed if n == -1 else n for n in shape)
    mesh = jax.make_mesh(full, AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)
    if any(len({device.process_index for device in group}) > 1 for group in mesh.devices.reshape(-1, full[2])):
        raise ValueError(
            f"config.mesh = {tuple(shape)}: the devices along tensor share their images, and must be one host's, "
            "which reads them."
        )
    return mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays laid out in any way on the mesh, gathered so that each host has all of them as numpy arrays."""
    gathered = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), gathered)


def over_images(fn: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`fn` on every device's own images alone: what must be summed over devices, it sums itself (over IMAGES).

    So nothing in it can meet the other devices by accident: not a gather, not a sort, not the condition of a search
    loop, which the partitioner would make an all-reduce over the pod in every iteration. The specs speak of IMAGES;
    what lies on the tensor axis is left to the partitioner.
    """
    return jax.shard_map(fn, mesh=mesh, axis_names=set(IMAGES), in_specs=in_specs, out_specs=out_specs, check_vma=False)


def over_heads(fn: Callable, heads: int) -> Callable:
    """`fn` of arrays [b, n, heads, ...] (and to [b, n, heads * d]) on every device's own heads, where the mesh around
    has a tensor axis.

    For what the partitioner would not split by heads, such as one gather for all of them.
    """
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if tensor == 1 or heads % tensor:
        return fn
    return jax.shard_map(
        fn, axis_names={"tensor"}, in_specs=P(None, None, "tensor"), out_specs=P(None, None, "tensor"), check_vma=False
    )


def gather_slices(params: Any, specs: Any) -> Any:
    """Whole parameters on every device, of those that live in slices along fsdp; before anything else happens, and
    once.

    Without the barrier, XLA for TPU moves a gather into the loop over layers that reads it, and repeats it there.
    """

    def gather(param: Array, spec: P) -> Array:
        return jax.lax.all_gather(param, "fsdp", axis=spec.index("fsdp"), tiled=True) if "fsdp" in spec else param

    return jax.lax.optimization_barrier(jax.tree.map(gather, params, specs))


def sum_over_images(gradient: Array, spec: P) -> Array:
    """A parameter's gradient over the images of all devices; of one that lives in slices (fsdp), each device keeps its
    own slice.
    """
    if "fsdp" not in spec:
        return jax.lax.psum(gradient, IMAGES)
    return jax.lax.psum(
        jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True), "data"
    )
