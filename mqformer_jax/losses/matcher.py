"""Minimum-cost bipartite matching inside a jitted step, exact, on any device.

The shortest-augmenting-path form of the Hungarian algorithm (Jonker and Volgenant 1987; what SciPy runs), written for
many problems at once:

- A target that is padding costs nothing, and problems of a batch do not wait for each other's rows.
- Every target first claims its cheapest query, all at once. That is an optimal matching of those that get theirs, so
only the
  others search for a path: few, where queries know what they see.
- The search is one loop without branches and without a loop inside; under `vmap` both sides of a branch are run, and an
  inner loop runs as long as its longest lane. A turn of it scans the queries from one row, or turns one edge of a path
  that was found.
- Row duals are not kept: a matched pair has no slack, so that of a row is its pair's cost less the column's dual.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mqformer_jax.arrays import Array

INVALID_COST = 1e6  # stands for NaN and infinite costs: such a pair is taken only where nothing else is left


def match(cost: Float[Array, "n q"], num_targets: Int[Array, ""] | int) -> Int[Array, " n"]:
    """The query of each target, all different, with the least total cost over the first `num_targets` rows.

    cost: n targets x q queries, n <= q. Rows from `num_targets` on are never read and get -1. NaN and infinities never
    spread: they count as a large finite cost. Equal to `scipy.optimize.linear_sum_assignment` on the real rows.
    """
    n, q = cost.shape
    if n > q:
        raise ValueError(
            f"more target rows ({n}) than queries ({q}): raise the number of queries or lower data.max_targets."
        )
    cost = cost.astype(jnp.float32)
    rows, columns = jnp.arange(n, dtype=jnp.int32), jnp.arange(q, dtype=jnp.int32)
    row, waiting = _claims(cost, rows < num_targets)

    # `waiting`: targets without a query. `row` and `v`: each column's owner (or -1) and dual. Of the search under way:
    # its `target`; the column it has come to (`at`, or -1) and how far that is; each column's least distance, the
    # column before it on the way, and whether it was visited. `turning`: the column of a found path whose owner changes
    # next, or -1.
    start = {
        "waiting": waiting, "target": _first(waiting), "at": jnp.int32(-1), "reach": jnp.float32(0),
        "turning": jnp.int32(-1), "row": row, "v": jnp.zeros(q), "distance": jnp.full(q, jnp.inf),
        "before": jnp.full(q, -1, jnp.int32), "visited": jnp.zeros(q, bool),
    }  # fmt: skip

    def step(s):
        turning, at, v, row = s["turning"] >= 0, s["at"], s["v"], s["row"]

        # scan: the slack of each column from the row that owns `at`
        line = _finite(cost[_or_else(row, at, s["target"])]) - v
        length = s["reach"] + (line - _or_else(line, at, 0.0))
        open_ = ~s["visited"]
        distance = jnp.where(open_, jnp.minimum(length, s["distance"]), s["distance"])
        before = jnp.where(open_ & (length < s["distance"]) & ~turning, at, s["before"])
        reach = jnp.min(jnp.where(open_, distance, jnp.inf))
        # of equally near columns a free one ends the search, as it does in SciPy; floats, since CPUs find their least
        # faster
        rank = jnp.where(row < 0, columns, columns + q).astype(jnp.float32)
        nearest = jnp.min(jnp.where(open_ & (distance <= reach), rank, 2 * q)).astype(jnp.int32)
        free = nearest < q
        nearest = jnp.where(free, nearest, nearest - q)
        visited = s["visited"] | (columns == nearest)
        v = jnp.where(visited & free & ~turning, v - (reach - distance), v)

        # turn: a column on the path goes to the owner of the one before; the first one to the target
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
    """Every real target claims its cheapest query, and the first to do so has it: each query's owner or -1; who
    waits.
    """
    n, q = cost.shape
    rows = jnp.arange(n, dtype=jnp.int32)
    # `argmin` takes six times as long on CPU
    cheapest = jnp.where(cost <= cost.min(1, keepdims=True), jnp.arange(q, dtype=jnp.float32), q)
    best = jnp.where(real, cheapest.min(1).astype(jnp.int32), q)  # none where a cost is NaN
    row = jnp.full(q, n, jnp.int32).at[best].min(rows, mode="drop")
    return jnp.where(row < n, row, -1), real & (row.at[best].get(mode="fill", fill_value=n) != rows)


def _finite(cost: Float[Array, " q"]) -> Float[Array, " q"]:
    return jnp.where(jnp.isnan(cost), INVALID_COST, jnp.clip(cost, -INVALID_COST, INVALID_COST))


def _or_else(values: Array, index: Int[Array, ""], otherwise: Array | float) -> Array:
    """values[index], or `otherwise` for the index -1."""
    return jnp.where(index < 0, otherwise, values[jnp.maximum(index, 0)])


def _first(flags: Array) -> Int[Array, ""]:
    return jnp.argmax(flags).astype(jnp.int32)
