"""The device mesh: data x fsdp x tensor, each 1 where unused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # images are split over both; parameters over fsdp and tensor


def make_mesh(shape: Sequence[int] = (-1, 1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices; one entry of `shape` (data, fsdp, tensor) may be -1: what is left."""
    devices = list(devices if devices is not None else jax.devices())
    fixed = int(np.prod([n for n in shape if n != -1]))
    if list(shape).count(-1) > 1 or len(devices) % fixed or (-1 not in shape and fixed != len(devices)):
        raise ValueError(f"config.mesh = {tuple(shape)} (data, fsdp, tensor) does not fit {len(devices)} devices.")
    full = tuple(len(devices) // fixed if n == -1 else n for n in shape)
    return jax.make_mesh(full, AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays laid out in any way on the mesh, gathered so that each host has all of them as numpy arrays."""
    gathered = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), gathered)


def local(mesh: Mesh) -> Callable[[Callable], Callable]:
    """Wrap a function of arrays with a leading batch axis so that every device runs it on its own images alone.

    A loop inside then ends on each device when that device is done; left to the partitioner, its condition would be an
    all-reduce over the pod in every iteration.
    """
    return lambda fn: jax.shard_map(fn, mesh=mesh, in_specs=BATCH, out_specs=BATCH, check_vma=False)
