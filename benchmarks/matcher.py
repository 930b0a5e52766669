"""Compare the time of this project's matcher with SciPy's and optax's, and check that the total costs are equal.

    python benchmarks/matcher.py [--images=16] [--queries=300] [--layers=10]

There are four kinds of costs:

- "noise": random numbers.
- "fresh": the criterion's costs for random scenes and random predictions, like those of an untrained model.
- "trained": the criterion's costs for random scenes and predictions near the targets, several for each target.
- "alike": the worst case, in which nearly all targets prefer the same query.

The number of targets per image is uniform in 1 to 100, or as in COCO: about 15, with a skewed distribution, at least 1.

Our matcher is one jitted call for all images and layers, as in a train step. SciPy is called once per
problem, without padding. The column "SciPy and copy" also includes the time to copy the costs from the device. optax's
matcher is slow, so it runs on the padded problems of a few images (--optax_images), and its time is scaled up to all
images.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from scipy.optimize import linear_sum_assignment

from mqformer_jax.losses import costs
from mqformer_jax.losses.costs import LossWeights
from mqformer_jax.losses.matcher import match

_IMAGES = flags.DEFINE_integer("images", 16, "Number of images.")
_LAYERS = flags.DEFINE_integer("layers", 10, "Decoder layers; each image has one matching problem per layer.")
_QUERIES = flags.DEFINE_integer("queries", 300, "Number of queries.")
_TARGETS = flags.DEFINE_integer("targets", 100, "Rows (targets) of each problem, including padding.")
_REPEAT = flags.DEFINE_integer("repeat", 5, "Number of timed runs, of which the median is reported.")
_OPTAX = flags.DEFINE_integer("optax_images", 1, "Number of images for optax; 0 skips optax.")
PROMPTS, POINTS = 133, 256

ours = jax.jit(jax.vmap(jax.vmap(match, in_axes=(0, None))))
theirs = jax.jit(jax.vmap(jax.vmap(optax.assignment.hungarian_algorithm)))


def main(_: list[str]) -> None:
    shape = f"{_IMAGES.value} images x {_LAYERS.value} layers x {_QUERIES.value} queries x {_TARGETS.value} rows"
    print(f"{shape}, {jax.devices()[0].device_kind}")
    print(
        "| costs | targets per image | mean of targets | ours, ms | SciPy, ms | SciPy and copy, ms | "
        "optax, ms | ours / SciPy | optax / ours |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    counts = {
        "1 to 100": rng.integers(1, _TARGETS.value + 1, _IMAGES.value),
        "COCO-like": np.clip(rng.poisson(rng.gamma(2.0, 8.0, _IMAGES.value)), 1, _TARGETS.value),
    }
    for name in ("noise", "fresh", "trained", "alike"):
        for kind, count in counts.items():
            print(row(name, kind, problems(jax.random.key(1), count, name), count), flush=True)


def row(name: str, kind: str, cost: jax.Array, count: np.ndarray) -> str:
    """Measure all matchers. Return a row of the table.

    name, kind: the first two columns. cost: images x layers x targets x queries. count: the number of targets of each
    image.
    """
    told = jnp.asarray(count)
    assigned, seconds = timed(lambda: ours(cost, told))
    on_host = np.asarray(cost)
    oracle, scipy_seconds = timed(lambda: scipy_all(on_host, count))
    _, copy_seconds = timed(lambda: scipy_all(np.array(cost), count))
    check("ours", totals(on_host, count, np.asarray(assigned)), oracle)
    optax_seconds = float("nan")
    if images := min(_OPTAX.value, len(count)):
        real = (np.arange(cost.shape[2]) < count[:images, None])[:, None, :, None]
        padded = jnp.where(real, cost[:images], 0.0)
        (rows, columns), taken = timed(lambda: theirs(padded), repeat=1)
        check(
            "optax",
            np.take_along_axis(np.asarray(padded), _columns(rows, columns)[..., None], -1).sum((2, 3)),
            oracle[:images],
        )
        optax_seconds = taken * len(count) / images
    ms = " | ".join(f"{1e3 * t:.1f}" for t in (seconds, scipy_seconds, copy_seconds, optax_seconds))
    ratios = f"{seconds / scipy_seconds:.2f} | {optax_seconds / seconds:.0f}"
    return f"| {name} | {kind} | {count.mean():.1f} | {ms} | {ratios} |"


def _columns(rows: jax.Array, columns: jax.Array) -> np.ndarray:
    """Return optax's assignment as the column of each row. rows, columns: the indices that optax returns."""
    return np.take_along_axis(np.asarray(columns), np.argsort(np.asarray(rows), -1), -1)


def scipy_all(cost: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the total cost that SciPy finds for each problem, images x layers. cost, count: see `row`."""
    return np.array([[c[:k][linear_sum_assignment(c[:k])].sum() for c in image] for image, k in zip(cost, count)])


def totals(cost: np.ndarray, count: np.ndarray, assigned: np.ndarray) -> np.ndarray:
    """Return the total cost of each assignment, images x layers. Fail if a query is assigned twice.

    assigned: the query of each target, images x layers x targets.
    """
    total = np.zeros(cost.shape[:2])
    for i, k in enumerate(count):
        for layer, columns in enumerate(assigned[i, :, :k]):
            assert len(set(columns.tolist())) == k and columns.min() >= 0, (i, layer)
            total[i, layer] = cost[i, layer, np.arange(k), columns].sum()
    return total


def check(who: str, found: np.ndarray, oracle: np.ndarray) -> None:
    """Check that total costs equal SciPy's (`oracle`) within the precision of float32. who: the matcher's name."""
    np.testing.assert_allclose(found, oracle, rtol=2e-6, atol=2e-4, err_msg=f"{who}: total cost")


def timed(run: Callable, repeat: int | None = None) -> tuple:
    """Return the result of `run` and its median time in seconds. A first run, which compiles, is not timed."""
    result, seconds = jax.block_until_ready(run()), []
    for _ in range(repeat or _REPEAT.value):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return result, float(np.median(seconds))


def problems(key: jax.Array, count: np.ndarray, name: str) -> jax.Array:
    """Return costs, images x layers x targets x queries. name: the kind of costs (see the module's docstring)."""
    if name in ("noise", "alike"):
        target, query, both = jax.random.split(key, 3)
        draw = lambda k, n, q: jax.random.normal(k, (len(count), _LAYERS.value, n, q))
        noise = draw(both, _TARGETS.value, _QUERIES.value)
        return (
            noise if name == "noise" else draw(target, _TARGETS.value, 1) + draw(query, 1, _QUERIES.value) + 0.1 * noise
        )
    make = jax.jit(jax.vmap(lambda k, n: scene(k, n, name == "trained")))
    return make(jax.random.split(key, len(count)), jnp.asarray(count))


def scene(key: jax.Array, count: jax.Array, found: bool) -> jax.Array:
    """Return the criterion's costs of a random image, layers x targets x queries.

    count: the number of targets. found: whether queries are near targets, as after training.
    """
    keys = jax.random.split(key, 4)
    n, points = _TARGETS.value, jax.random.uniform(keys[0], (POINTS, 2))
    boxes = random_boxes(keys[1], n)
    prompt = jax.random.randint(keys[2], (n,), 0, PROMPTS)
    masks = inside(boxes, points)

    def layer(key):
        own_key, which_key, off_key, class_key, mask_key = jax.random.split(key, 5)
        guess = random_boxes(own_key, _QUERIES.value)
        logits = -4.0 + jax.random.normal(class_key, (_QUERIES.value, PROMPTS))
        if found:  # two of three queries have boxes within 10 % of a target's box, and high scores for its prompt
            which = jax.random.randint(which_key, (_QUERIES.value,), 0, jnp.maximum(count, 1))
            knows = jax.random.uniform(off_key, (_QUERIES.value,)) < 0.67
            near = boxes[which] * jax.random.uniform(off_key, (_QUERIES.value, 4), minval=0.9, maxval=1.1)
            guess = jnp.where(knows[:, None], near, guess)
            logits += 3.0 * knows[:, None] * jax.nn.one_hot(prompt[which], PROMPTS)
        drawn = (6.0 if found else 0.5) * (inside(guess, points) - 0.5)
        drawn += jax.random.normal(mask_key, drawn.shape)
        entropy, dice = costs.mask_costs(drawn, masks, jnp.ones(POINTS))
        terms = {
            "class": costs.class_cost(logits, jax.nn.one_hot(prompt, PROMPTS)),
            "mask": entropy,
            "dice": dice,
            "box": jnp.abs(boxes[:, None] - guess[None]).sum(-1),
            "giou": -costs.giou(costs.corners(boxes)[:, None], costs.corners(guess)[None]),
        }
        return LossWeights().total(terms)

    return jax.lax.map(layer, jax.random.split(keys[3], _LAYERS.value))


def random_boxes(key: jax.Array, n: int) -> jax.Array:
    """Return n random boxes (cx, cy, w, h as fractions of the image). Small boxes are more frequent."""
    center, side = jax.random.uniform(key, (2, n, 2))
    return jnp.concatenate([center, 0.02 + 0.6 * side**2], -1)


def inside(boxes: jax.Array, points: jax.Array) -> jax.Array:
    """Return an array, boxes x points, that is 1 if the point is in the box and 0 otherwise."""
    box = costs.corners(boxes)[:, None]
    return jnp.all((points >= box[..., :2]) & (points < box[..., 2:]), -1).astype(jnp.float32)


if __name__ == "__main__":
    app.run(main)
