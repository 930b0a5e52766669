import jax
import numpy as np
import pytest
from originals import assert_agrees
from scipy.optimize import linear_sum_assignment

from mqformer_jax.losses.matcher import match

batched = jax.jit(jax.vmap(match))


def total(cost, assignment):
    return cost[np.arange(len(assignment)), assignment].sum()


@pytest.mark.parametrize("n, q, ties", [(6, 40, False), (20, 30, True), (30, 30, False)])
def test_total_assignment_cost_matches_scipy(n, q, ties):
    rng = np.random.default_rng(n)
    cost = rng.normal(size=(16, n, q)).astype(np.float32)
    if ties:
        cost = np.round(2 * cost) / 2
    counts = rng.integers(0, n + 1, 16)
    for c, count, found in zip(cost, counts, np.array(batched(cost, counts))):
        rows, columns = linear_sum_assignment(c[:count])
        assert len(set(found[:count])) == count and found[:count].min(initial=0) >= 0
        assert_agrees(
            "matching, total cost (SciPy)", "forward", total(c[:count], found[:count]), c[rows, columns].sum(), 1e-6
        )
        if not ties:
            np.testing.assert_array_equal(found[:count], columns)


@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-3])
def test_assignment_with_heavily_contested_queries_matches_scipy(spread):
    """Queries that are nearly alike: most targets lose their first choice, and paths are long."""
    rng = np.random.default_rng(2)
    cost = rng.normal(size=(8, 24, 1)) + rng.normal(size=(8, 1, 40)) + spread * rng.normal(size=(8, 24, 40))
    cost = cost.astype(np.float32)
    for c, found in zip(cost, np.array(batched(cost, np.full(8, 24)))):
        assert len(set(found)) == 24
        expected = total(c.astype(np.float64), linear_sum_assignment(c)[1])
        assert_agrees("matching, total cost (SciPy)", "forward", total(c.astype(np.float64), found), expected, 1e-6)


def test_batched_assignment_matches_single_assignment():
    rng = np.random.default_rng(3)
    cost, counts = rng.normal(size=(6, 20, 25)).astype(np.float32), np.array([20, 1, 0, 7, 20, 13])
    together = batched(cost, counts)
    for c, count, found in zip(cost, counts, together):
        np.testing.assert_array_equal(batched(c[None], count[None])[0], found)


def test_padded_rows_are_unassigned_and_ignored():
    cost = np.random.default_rng(0).normal(size=(1, 8, 12)).astype(np.float32)
    poisoned = cost.copy()
    poisoned[:, 3:] = np.nan
    np.testing.assert_array_equal(batched(cost, np.array([3])), batched(poisoned, np.array([3])))
    assert (np.array(batched(cost, np.array([3])))[0, 3:] == -1).all()


def test_nan_and_infinite_costs_are_assigned_last():
    cost = np.random.default_rng(1).normal(size=(1, 5, 9)).astype(np.float32)
    cost[0, 0, :] = np.nan
    cost[0, 1, 2:] = np.inf
    found = np.array(batched(cost, np.array([5])))[0]
    assert len(set(found)) == 5 and found.min() >= 0
    assert found[1] in (0, 1)
    rows, columns = linear_sum_assignment(np.nan_to_num(cost[0], nan=1e6, posinf=1e6))
    np.testing.assert_array_equal(found[1:], columns[1:])


def test_more_rows_than_queries_is_refused():
    with pytest.raises(ValueError, match="more target rows"):
        match(np.zeros((5, 4), np.float32), 4)
