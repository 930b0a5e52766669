"""Minimum-cost bipartite matching inside a jitted step, exact, on any device.

The shortest-augmenting-path form of the Hungarian algorithm (Jonker and Volgenant 1987; what SciPy runs), written so
that a target that is padding costs nothing and problems of a batch do not wait for each other's rows: the whole search
is one loop whose body scans one column of one path, and each problem leaves it when its own targets are done.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

UNUSABLE = 1e6  # stands for NaN and infinite costs: such a pair is taken only where nothing else is left


def match(cost: Float[Array, "n q"], num_targets: Int[Array, ""]) -> Int[Array, "n"]:
    """The query of each target, all different, with the least total cost over the first `num_targets` rows.

    cost: n targets x q queries, n <= q. Rows from `num_targets` on are never read and get -1. NaN and infinities never
    spread: they count as a large finite cost. Equal to `scipy.optimize.linear_sum_assignment` on the real rows.
    """
    n, q = cost.shape
    if n > q:
        raise ValueError(f"more target rows ({n}) than queries ({q}): raise the number of queries or lower data.max_targets.")
    cost = jnp.nan_to_num(cost.astype(jnp.float32), nan=UNUSABLE, posinf=UNUSABLE, neginf=-UNUSABLE)
    cost = jnp.clip(cost, -UNUSABLE, UNUSABLE)
    num_targets = jnp.minimum(num_targets, n).astype(jnp.int32)

    # One path search a target. State: duals u (rows), v (columns); `row` of each column or -1; and of the search under
    # way: `target`, the row being scanned, shortest distance and previous column of each column, columns done.
    state = {
        "target": jnp.int32(0),
        "scan": jnp.int32(0),
        "from": jnp.int32(-1),
        "reach": jnp.float32(0),
        "u": jnp.zeros(n, jnp.float32),
        "v": jnp.zeros(q, jnp.float32),
        "row": jnp.full(q, -1, jnp.int32),
        "shortest": jnp.full(q, jnp.inf, jnp.float32),
        "previous": jnp.full(q, -1, jnp.int32),
        "done": jnp.zeros(q, bool),
    }

    def step(s):
        length = s["reach"] + cost[s["scan"]] - s["u"][s["scan"]] - s["v"]
        nearer = (length < s["shortest"]) & ~s["done"]
        shortest = jnp.where(nearer, length, s["shortest"])
        previous = jnp.where(nearer, s["from"], s["previous"])
        # of equally near columns a free one ends the search, as it does in SciPy
        open_ = jnp.where(s["done"], jnp.inf, shortest)
        reach = jnp.min(open_)
        near = open_ == reach
        column = jnp.argmax(jnp.where(near, 1 + (s["row"] < 0), 0)).astype(jnp.int32)
        done = s["done"].at[column].set(True)
        going = {**s, "shortest": shortest, "previous": previous, "reach": reach, "done": done, "from": column, "scan": s["row"][column]}
        return jax.lax.cond(s["row"][column] < 0, finish, lambda t: t, going)

    def finish(s):
        """The path ends in a free column: update the duals, flip the path, start the next target."""
        slack = jnp.where(s["done"], s["reach"] - s["shortest"], 0.0)
        owned = jnp.where(s["done"] & (s["row"] >= 0), s["row"], n)
        u = s["u"].at[owned].add(slack, mode="drop").at[s["target"]].add(s["reach"])

        def flip(carry):
            row, column = carry
            before = s["previous"][column]
            owner = jnp.where(before < 0, s["target"], row[jnp.maximum(before, 0)])
            return row.at[column].set(owner), before

        row, _ = jax.lax.while_loop(lambda c: c[1] >= 0, flip, (s["row"], s["from"]))
        target = s["target"] + 1
        return {
            "target": target, "scan": target, "from": jnp.int32(-1), "reach": jnp.float32(0), "u": u, "v": s["v"] - slack, "row": row,
            "shortest": jnp.full(q, jnp.inf, jnp.float32), "previous": jnp.full(q, -1, jnp.int32), "done": jnp.zeros(q, bool),
        }  # fmt: skip

    final = jax.lax.while_loop(lambda s: s["target"] < num_targets, step, state)
    owner = jnp.where(final["row"] >= 0, final["row"], n)
    return jnp.full(n, -1, jnp.int32).at[owner].set(jnp.arange(q, dtype=jnp.int32), mode="drop")
