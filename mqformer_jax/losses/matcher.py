"""Exact minimum-cost bipartite matching inside a jitted step, on any device.

This is the shortest-augmenting-path form of the Hungarian algorithm (Jonker and Volgenant 1987; also SciPy's), adapted
to batches of problems:

- Padded targets take no iterations, and each problem of a batch advances to its next row without waiting for others.
- First, every target claims its cheapest query. The targets that get theirs are matched optimally; only the other
  targets, which are few once the model is trained, search for an augmenting path.
- The search is one loop without branches or inner loops. `vmap` would run both cases of a branch, and an inner
  loop would run until its slowest problem ends. One iteration either scans all queries from one row, or flips one edge
  of an augmenting path.
- Row duals are not stored. A matched pair has zero slack, so the dual of its row is its cost minus the column's dual.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mqformer_jax.arrays import Array

INVALID_COST = 1e6  # replaces NaN and infinite costs; such a pair is matched only if no other is left


def match(cost: Float[Array, "n q"], num_targets: Int[Array, ""] | int) -> Int[Array, " n"]:
    """Return a different query for each target, with the least total cost over the first `num_targets` rows.

    cost: n targets x q queries, n <= q. Rows from `num_targets` on are ignored and get -1. NaN and infinite costs count
    as a large finite cost. On the first `num_targets` rows, the result equals `scipy.optimize.linear_sum_assignment`.
    Raises ValueError if n > q.
    """
    n, q = cost.shape
    if n > q:
        raise ValueError(
            f"more target rows ({n}) than queries ({q}): raise the number of queries or lower data.max_targets."
        )
    cost = cost.astype(jnp.float32)
    rows, columns = jnp.arange(n, dtype=jnp.int32), jnp.arange(q, dtype=jnp.int32)
    row, waiting = _claims(cost, rows < num_targets)

    # `waiting`: targets without a query. `row` and `v`: owner (or -1) and dual of each column. The current search has a
    # `target`, its current column `at` (or -1) and the distance of that column, `reach`. For each column it has the
    # least `distance`, the previous column on that path, `before` (or -1), and whether it was `visited`. `turning`: the
    # column of the augmenting path whose owner changes next, or -1.
    start = {
        "waiting": waiting, "target": _first(waiting), "at": jnp.int32(-1), "reach": jnp.float32(0),
        "turning": jnp.int32(-1), "row": row, "v": jnp.zeros(q), "distance": jnp.full(q, jnp.inf),
        "before": jnp.full(q, -1, jnp.int32), "visited": jnp.zeros(q, bool),
    }  # fmt: skip

    def step(s):
        turning, at, v, row = s["turning"] >= 0, s["at"], s["v"], s["row"]

        # Scan: relax the distance of each column from the row that owns `at`.
        line = _finite(cost[_or_else(row, at, s["target"])]) - v
        length = s["reach"] + (line - _or_else(line, at, 0.0))
        open_ = ~s["visited"]
        distance = jnp.where(open_, jnp.minimum(length, s["distance"]), s["distance"])
        before = jnp.where(open_ & (length < s["distance"]) & ~turning, at, s["before"])
        reach = jnp.min(jnp.where(open_, distance, jnp.inf))
        # Among equally near columns, prefer a free one, as in SciPy. Ranks are floats, whose minimum is faster on CPU.
        rank = jnp.where(row < 0, columns, columns + q).astype(jnp.float32)
        nearest = jnp.min(jnp.where(open_ & (distance <= reach), rank, 2 * q)).astype(jnp.int32)
        free = nearest < q
        nearest = jnp.where(free, nearest, nearest - q)
        visited = s["visited"] | (columns == nearest)
        v = jnp.where(visited & free & ~turning, v - (reach - distance), v)

        # Flip: a column on the path gets the owner of the previous column; the path's first column gets the target.
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
    """Let each valid target claim its cheapest query; of several targets that claim a query, the first gets it.

    real: which targets are valid. Returns each query's owner (or -1) and the targets that are still without a query.
    """
    n, q = cost.shape
    rows = jnp.arange(n, dtype=jnp.int32)
    # on CPU, six times as fast as `argmin`
    cheapest = jnp.where(cost <= cost.min(1, keepdims=True), jnp.arange(q, dtype=jnp.float32), q)
    best = jnp.where(real, cheapest.min(1).astype(jnp.int32), q)  # no claim for a row with a NaN
    row = jnp.full(q, n, jnp.int32).at[best].min(rows, mode="drop")
    return jnp.where(row < n, row, -1), real & (row.at[best].get(mode="fill", fill_value=n) != rows)


def _finite(cost: Float[Array, " q"]) -> Float[Array, " q"]:
    return jnp.where(jnp.isnan(cost), INVALID_COST, jnp.clip(cost, -INVALID_COST, INVALID_COST))


def _or_else(values: Array, index: Int[Array, ""], otherwise: Array | float) -> Array:
    """Return values[index], or `otherwise` if the index is -1."""
    return jnp.where(index < 0, otherwise, values[jnp.maximum(index, 0)])


def _first(flags: Array) -> Int[Array, ""]:
    return jnp.argmax(flags).astype(jnp.int32)
