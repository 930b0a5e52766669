"""Train variants of a recipe with several seeds and print means, spreads and paired differences.

    python benchmarks/seeds.py --config=coco_ref:sample --work=runs/seeds --seeds=0,1,2,3,4 \\
        --arm=recipe --arm='slow: optimizer.learning_rate=0.00075'

An arm is a variant of the recipe: a name and the config fields that it changes ("NAME" or "NAME: field=value;
field=value"). The second table compares each other arm with the first one. All arms use the same seeds, so differences
are taken seed by seed. Each run is a separate process (`mqformer train`) with the workdir WORK/ARM/SEED. To resume, or
to add arms or seeds, run the command again: finished runs are not repeated. `--parallel=2` runs two at a time and
divides the processor cores between them.

`--curve_every=100` also evaluates during training and plots each metric over steps in WORK/curves.png. To make this
faster, evaluate fewer images with `--set=eval.max_images=32`. The tables are printed and written to WORK/table.md, and
all results to WORK/results.json.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import time

from absl import app, flags

from mqformer_jax.files import write_json

_CONFIG = flags.DEFINE_string("config", "coco_ref:sample", "Recipe that all arms change.")
_WORK = flags.DEFINE_string("work", "runs/seeds", "Folder for the runs and results.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each arm.")
_ARM = flags.DEFINE_multi_string("arm", ["recipe"], '"NAME" or "NAME: field=value; field=value". May be repeated.')
_SET = flags.DEFINE_multi_string("set", [], '"field=value", a change of all arms. May be repeated.')
_METRICS = flags.DEFINE_list(
    "metrics",
    [
        "panoptic.pq",
        "panoptic.pq_things",
        "panoptic.pq_stuff",
        "panoptic.worst_stuff",
        "instance.mask_ap",
        "semantic.miou",
        "referring.miou",
        "referring.miou/attribute",
        "referring.miou/extremal",
        "referring.miou/relation",
        "foreground.mae",
    ],
    "Metrics of the tables, as named in eval.json. Metrics that the recipe does not measure are left out.",
)
_PARALLEL = flags.DEFINE_integer(
    "parallel", 1, "Number of concurrent runs. Each gets an equal share of the processor cores."
)
_CURVE_EVERY = flags.DEFINE_integer(
    "curve_every", 0, "Steps between evaluations during training; 0 evaluates only at the end."
)

Results = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> metric -> value


def parse_arm(text: str) -> tuple[str, list[str]]:
    """Return the name of an arm, and its changes as a list of "field=value". text: the value of --arm."""
    name, _, changes = text.partition(":")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise app.UsageError(f"--arm={text!r}: give the arm a name of letters, digits and . + - _ only.")
    changes = [change.strip() for change in changes.split(";") if change.strip()]
    for change in changes:
        if "=" not in change:
            raise app.UsageError(f"--arm={text!r}: {change!r} is not of the form field=value.")
    return name, changes


def run(folder: str, seed: int, changes: list[str], cores: set[int] | None) -> dict[str, float]:
    """Train one run, unless it is finished, and return its metrics.

    The metric "seconds" is the time of its last process. folder: the workdir. changes: "field=value". cores: the
    processor cores of the run, or None for all.
    """
    command = [sys.executable, "-m", "mqformer_jax.main", f"--config={_CONFIG.value}", f"--workdir={folder}"]
    command += [f"--config.{change}" for change in [f"seed={seed}", *_SET.value, *changes]]
    if _CURVE_EVERY.value:
        command.append(f"--config.eval.every={_CURVE_EVERY.value}")
    done = os.path.join(folder, "seeds.json")
    if os.path.exists(done):
        with open(done) as file:
            finished = json.load(file)
        if finished["command"][1:] != command[1:]:
            raise app.UsageError(f"{folder} has a run with other settings: choose another --work or name of the arm.")
        return finished["metrics"]
    os.makedirs(folder, exist_ok=True)
    start = time.monotonic()
    with open(os.path.join(folder, "log.txt"), "a") as log:
        pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=pin).returncode
    if status:
        raise RuntimeError(f"{folder}: training ended with exit status {status}; see {folder}/log.txt.")
    with open(os.path.join(folder, "eval.json")) as file:
        metrics = json.load(file)
    metrics |= worst_classes(folder)
    metrics["seconds"] = time.monotonic() - start
    write_json(done, {"command": command, "metrics": metrics})
    return metrics


def worst_classes(folder: str) -> dict[str, float]:
    """Return the lowest PQ of a class of things and of a class of stuff in a run.

    A metric is missing if the run has no panoptic evaluation or no class of this kind. folder: the run's workdir.
    """
    with open(os.path.join(folder, "eval_details.json")) as file:
        details = json.load(file)
    classes = [c for tasks in details.values() for c in tasks.get("panoptic", {}).get("classes", {}).values()]
    kinds = {"panoptic.worst_thing": False, "panoptic.worst_stuff": True}
    found = {name: [c["pq"] for c in classes if c["is_region"] == region] for name, region in kinds.items()}
    return {name: min(values) for name, values in found.items() if values}


def run_all(arms: dict[str, list[str]], seeds: list[int]) -> Results:
    """Run all arms with the first seed, then with the next seed and so on, and return all results.

    If it is interrupted, the finished seeds can be compared between arms. arms: the changes of each arm by name.
    """
    shares: queue.Queue[set[int] | None] = queue.Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for i in range(_PARALLEL.value):
        shares.put(set(cores[i :: _PARALLEL.value]) if _PARALLEL.value > 1 and len(cores) >= _PARALLEL.value else None)

    def one(arm: str, seed: int) -> dict[str, float]:
        share = shares.get()
        try:
            metrics = run(os.path.join(_WORK.value, arm, str(seed)), seed, arms[arm], share)
        finally:
            shares.put(share)
        print(f"{arm}, seed {seed}: {metrics['seconds']:.0f} s", flush=True)
        return metrics

    with concurrent.futures.ThreadPoolExecutor(_PARALLEL.value) as pool:
        futures = {(arm, seed): pool.submit(one, arm, seed) for seed in seeds for arm in arms}
        try:
            return {arm: {seed: futures[arm, seed].result() for seed in seeds} for arm in arms}
        except BaseException:  # after a failed run or Ctrl-C, do not start the remaining runs
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def tables(results: Results, metrics: list[str]) -> str:
    """Return two tables in Markdown: mean ± standard deviation (worst) of each arm, and paired differences.

    The worst value is the highest for seconds and errors (names that end in "mae" or "mse"), and the lowest for all
    other metrics. Standard deviations are divided by n - 1.
    """
    lines = ["| arm | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for arm, runs in results.items():
        cells = [_summary(metric, [m[metric] for m in runs.values()]) for metric in metrics]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    base, *others = results
    if others:
        lines += ["", f"Difference to {base}, seed by seed: mean ± standard deviation (seeds with a higher value)", ""]
        lines += lines[:2]
    for arm in others:
        cells = []
        for metric in metrics:
            diffs = [results[arm][seed][metric] - results[base][seed][metric] for seed in results[base]]
            cells.append(f"{statistics.mean(diffs):+.1f}{_spread(diffs)} ({sum(d > 0 for d in diffs)}/{len(diffs)})")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _summary(metric: str, values: list[float]) -> str:
    worst = max(values) if metric == "seconds" or metric.endswith(("mae", "mse")) else min(values)
    return f"{statistics.mean(values):.1f}{_spread(values)} ({worst:.1f})"


def _spread(values: list[float]) -> str:
    return f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""


def plot_curves(arms: list[str], seeds: list[int], metrics: list[str]) -> None:
    """Plot each metric over steps, one line per run and one color per arm, in WORK/curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.2 * rows), squeeze=False)
    for metric, axis in zip(metrics, axes.flat, strict=False):
        for i, arm in enumerate(arms):
            for j, seed in enumerate(seeds):
                with open(os.path.join(_WORK.value, arm, str(seed), "metrics.jsonl")) as file:
                    lines = [json.loads(line) for line in file]
                points = [(line["step"], line[f"eval/{metric}"]) for line in lines if f"eval/{metric}" in line]
                axis.plot(*zip(*points, strict=True), color=f"C{i}", alpha=0.7, label=arm if j == 0 else None)
        axis.set_title(metric)
        axis.set_xlabel("step")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(os.path.join(_WORK.value, "curves.png"), dpi=80)


def main(_: list[str]) -> None:
    arms = dict(map(parse_arm, _ARM.value))
    if len(arms) < len(_ARM.value):
        raise app.UsageError("--arm: two arms have the same name; rename one.")
    seeds = [int(seed) for seed in _SEEDS.value]
    results = run_all(arms, seeds)
    measured = [m for m in _METRICS.value if all(m in run for runs in results.values() for run in runs.values())]
    text = tables(results, [*measured, "seconds"])
    print(text)
    write_json(os.path.join(_WORK.value, "results.json"), results)
    with open(os.path.join(_WORK.value, "table.md"), "w") as file:
        file.write(text + "\n")
    if _CURVE_EVERY.value:
        plot_curves(list(arms), seeds, measured)


if __name__ == "__main__":
    app.run(main)
