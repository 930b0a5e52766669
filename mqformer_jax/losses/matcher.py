"""Exact minimum-cost bipartite matching inside a jitted step, on any device.

The rows of a cost matrix are targets, and its columns are queries. The algorithm is the shortest-augmenting-path form
of the Hungarian algorithm (Jonker and Volgenant 1987), which SciPy also uses. It is adapted to batches of problems:

- Padded targets take no iterations. Each problem of a batch advances to its next target without waiting for the other
  problems.
- First, each target is matched to its cheapest query, unless an earlier target has the same cheapest query. This is
  optimal for the matched targets. Only the remaining targets, which are few once the model is trained, search for an
  augmenting path.
- The search is one loop without branches or inner loops. Under `vmap`, both cases of a branch would run, and an inner
  loop would run until the slowest problem of the batch ends. One iteration either scans all columns from one row, or
  flips one edge of an augmenting path.
- Row duals are not stored. A matched pair has zero slack, so the dual of its row is its cost minus the column's dual.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mqformer_jax.arrays import Array

INVALID_COST = 1e6  # replaces NaN and infinite costs; such a pair is matched only if no other pair is possible


def match(cost: Float[Array, "n q"], num_targets: Int[Array, ""] | int) -> Int[Array, " n"]:
    """Return the index of a different query for each of the first `num_targets` targets, with the least total cost.

    cost: one row per target and one column per query, n <= q. Rows from `num_targets` on are padding and get -1. Costs
    are clipped to plus or minus INVALID_COST, which also replaces NaN. For the first `num_targets` rows, the result
    equals that of `scipy.optimize.linear_sum_assignment`. Raises ValueError if n > q.
    """
    n, q = cost.shape
    if n > q:
        raise ValueError(
            f"more target rows ({n}) than queries ({q}): raise config.model.num_learnable or num_conditional, "
            "or lower config.data.max_targets."
        )
    cost = cost.astype(jnp.float32)
    rows, columns = jnp.arange(n, dtype=jnp.int32), jnp.arange(q, dtype=jnp.int32)
    row, waiting = _claims(cost, rows < num_targets)

    # `waiting`: whether each target still has no query. `row` and `v`: the target of each column (or -1), and its dual.
    # State of the current search: `target`, the target it starts from; `at`, the column visited last (or -1), and
    # `reach`, its distance; `turning`, the column of the augmenting path whose target changes next (or -1). For each
    # column: `distance`, the least distance found; `before`, the previous column on that path (or -1); `visited`.
    start = {
        "waiting": waiting, "target": _first(waiting), "at": jnp.int32(-1), "reach": jnp.float32(0),
        "turning": jnp.int32(-1), "row": row, "v": jnp.zeros(q), "distance": jnp.full(q, jnp.inf),
        "before": jnp.full(q, -1, jnp.int32), "visited": jnp.zeros(q, bool),
    }  # fmt: skip

    def step(s):
        turning, at, v, row = s["turning"] >= 0, s["at"], s["v"], s["row"]

        # Scan: shorten the distances of all columns by paths through the row matched to `at` (at first, `target`).
        line = _finite(cost[_or_else(row, at, s["target"])]) - v
        length = s["reach"] + (line - _or_else(line, at, 0.0))
        open_ = ~s["visited"]
        distance = jnp.where(open_, jnp.minimum(length, s["distance"]), s["distance"])
        before = jnp.where(open_ & (length < s["distance"]) & ~turning, at, s["before"])
        reach = jnp.min(jnp.where(open_, distance, jnp.inf))
        # Among equally near columns, prefer an unmatched one, as in SciPy. Ranks are floats because their minimum is
        # faster on CPU than that of integers.
        rank = jnp.where(row < 0, columns, columns + q).astype(jnp.float32)
        nearest = jnp.min(jnp.where(open_ & (distance <= reach), rank, 2 * q)).astype(jnp.int32)
        free = nearest < q
        nearest = jnp.where(free, nearest, nearest - q)
        visited = s["visited"] | (columns == nearest)
        v = jnp.where(visited & free & ~turning, v - (reach - distance), v)

        # Flip: match a column on the path to the target of the previous column, and the first column to `target`.
        turn = free | turning
        column = jnp.where(turning, s["turning"], nearest)
        previous = before[column]
        row = jnp.where(turn & (columns == column), _or_else(row, previous, s["target"]), row)
        over = turn & (previous < 0)
        waiting = s["waiting"] & ~(over & (rows == s["target"]))
        return {
            "waiting": waiting,
            "target": jnp.where(over, _first(waiting), s["target"]),
            "at": jnp.where(over, -1, jnp.where(turn, at, nearest)),
            "reach": jnp.where(over, 0.0, reach),
            "turning": jnp.where(turn & ~over, previous, -1),
            "row": row,
            "v": v,
            "distance": jnp.where(over, jnp.inf, distance),
            "before": jnp.where(over, -1, before),
            "visited": visited & ~over,
        }

    row = jax.lax.while_loop(lambda s: s["waiting"].any(), step, start)["row"]
    return jnp.full(n, -1, jnp.int32).at[jnp.where(row >= 0, row, n)].set(columns, mode="drop")


def _claims(cost: Float[Array, "n q"], real: Array) -> tuple[Int[Array, " q"], Array]:
    """Match each valid target to its cheapest query, unless an earlier target has the same cheapest query.

    real: which targets are valid. Returns the target of each query (or -1), and which valid targets have no query.
    """
    n, q = cost.shape
    rows = jnp.arange(n, dtype=jnp.int32)
    # on CPU, six times as fast as `argmin`
    cheapest = jnp.where(cost <= cost.min(1, keepdims=True), jnp.arange(q, dtype=jnp.float32), q)
    best = jnp.where(real, cheapest.min(1).astype(jnp.int32), q)  # a row with a NaN is not matched here
    row = jnp.full(q, n, jnp.int32).at[best].min(rows, mode="drop")
    return jnp.where(row < n, row, -1), real & (row.at[best].get(mode="fill", fill_value=n) != rows)


def _finite(cost: Float[Array, " q"]) -> Float[Array, " q"]:
    return jnp.where(jnp.isnan(cost), INVALID_COST, jnp.clip(cost, -INVALID_COST, INVALID_COST))


def _or_else(values: Array, index: Int[Array, ""], otherwise: Array | float) -> Array:
    """Return values[index], or `otherwise` if the index is -1."""
    return jnp.where(index < 0, otherwise, values[jnp.maximum(index, 0)])


def _first(flags: Array) -> Int[Array, ""]:
    return jnp.argmax(flags).astype(jnp.int32)
