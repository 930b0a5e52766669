"""Parity tests bring an original's weights in through the converter, so that both are tested at once."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from mqformer_jax.convert.rules import Plan, apply, fill, leaves


def build(make) -> nnx.Module:
    """A module made under jit: one compilation instead of one an operation."""
    return nnx.merge(*jax.jit(lambda: nnx.split(make(nnx.Rngs(0))))())


def load(module: nnx.Module, plan: Plan, tensors: dict[str, np.ndarray], part: str | None = None) -> nnx.Module:
    """`module` with all its variables read from `tensors` by the plan; nothing may be missing, unused or mismatched.

    part: the module's path where the plan is of a larger model; entries of other parts are then left out.
    """
    prefix = plan.part if part is None else part
    shapes = leaves(nnx.to_pure_dict(nnx.split(module)[1]))
    values, report = apply(
        plan, tensors, {f"{prefix}/{path}" if prefix else path: leaf for path, leaf in shapes.items()}
    )
    assert not report.missing and not report.mismatched, report.table()
    assert part is not None or not report.unused, report.table()
    return fill(module, values, prefix)


def state_dict(torch_module) -> dict[str, np.ndarray]:
    """A torch module's tensors as arrays, by name."""
    return {key: value.detach().cpu().numpy() for key, value in torch_module.state_dict().items()}


MEASURED: dict[
    str, dict[str, tuple[float, float]]
] = {}  # component: {"forward" or "gradient": largest difference, largest value}


def measure(component: str, kind: str, difference: float, largest: float) -> None:
    row = MEASURED.setdefault(component, {})
    row[kind] = max(row.get(kind, (0.0, 0.0)), (difference, largest))


def assert_agrees(
    component: str, kind: str, ours, theirs, tolerance: float = 1e-4, told: str = "", scale: float = 0
) -> None:
    """Ours equals theirs within `tolerance` of theirs' largest value, or of a tenth of `scale` where that is more.

    component, kind ("forward", "gradient"): the row and column of the table that the test run prints at its end.
    scale: of gradients, the largest value of all of the component's. Some gradients are zero in truth (a bias before a
    norm, the bias of keys), and what is computed of them is the rounding of sums on that scale.
    told: which of the component's arrays these are, for the error.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (component, kind, told, ours.shape, theirs.shape)
    difference, largest = (float(np.abs(x).max(initial=0)) for x in (ours - theirs, theirs))
    measure(component, kind, difference, largest)
    assert difference <= tolerance * max(largest, scale / 10, 1e-3), (component, kind, told, difference, largest)
