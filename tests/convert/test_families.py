"""Damaged checkpoints of every family: whatever a file lacks, its plan is made or refused in one line."""

from __future__ import annotations

import layouts
import pytest

from mqformer_jax.convert.families import find_family
from mqformer_jax.convert.rules import Plan, count, prefix_of, shape_of


def damaged(shapes: dict[str, tuple[int, ...]], key: str) -> list[dict[str, tuple[int, ...]]]:
    """Without the key, as a scalar, a dimension short, and a dimension too many."""
    rest = {name: shape for name, shape in shapes.items() if name != key}
    return [rest, *(shapes | {key: shape} for shape in ((), shapes[key][1:], (*shapes[key], 1)))]


def planned(shapes: dict[str, tuple[int, ...]]) -> Plan | str:
    """The plan, or the error's text."""
    try:
        return find_family(shapes, None, "the file").plan(shapes)
    except ValueError as e:
        return str(e)


@pytest.mark.parametrize("name", layouts.NAMES)
def test_a_damaged_checkpoint_is_planned_or_refused_in_one_line(name):
    """Every key of the first layer of each kind, from which sizes are read, and some of the others."""
    shapes = {key: shape for key, (shape, _) in layouts.load(name).items()}
    read = {entry.theirs for entry in planned(shapes).entries}
    first = [key for key in shapes if key in read and set(filter(str.isdigit, key.split("."))) <= {"0", "1"}]
    refused = 0
    for key in {*first[:: 1 + len(first) // 60], *list(read)[::40]}:
        for file in damaged(shapes, key):
            outcome = planned(file)
            assert isinstance(outcome, Plan) or (outcome and "\n" not in outcome), (key, outcome)
            refused += not isinstance(outcome, Plan)
    assert refused
