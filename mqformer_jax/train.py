"""The training loop, top to bottom."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tqdm import tqdm

from mqformer_jax import checkpoint, evaluate
from mqformer_jax.initialize import bring_tokenizer, initialize
from mqformer_jax.input.mixture import make_loader
from mqformer_jax.models.tokenizer import Tokenizer, make_tokenizer
from mqformer_jax.optimizer import schedule
from mqformer_jax.parallel.mesh import make_mesh, whole
from mqformer_jax.predict import Predictor
from mqformer_jax.text_cache import TextCache
from mqformer_jax.train_step import TrainState, TrainStep


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Train `config` in `workdir`, from its newest checkpoint where there is one; returns the last evaluation.

    Every batch and every random number depends on the seed and the step alone, so a run that was stopped and goes on is
    the run that was not (bit for bit on CPU).
    """
    os.makedirs(workdir, exist_ok=True)
    if jax.config.jax_compilation_cache_dir is None:  # a run that goes on need not compile again
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/mqformer_jax/compiled"))

    # -- data, model, state -------------------------------------------------------------------------------------------
    if not checkpoint.has_checkpoint(workdir):
        bring_tokenizer(config, workdir)
    tokenizer = make_tokenizer(config.model.text, workdir)
    loader = make_loader(config, tokenizer)
    train_step = TrainStep(config, make_mesh(config.mesh))
    with checkpoint.Checkpoints(workdir, config.keep_checkpoints) as checkpoints:
        if checkpoints.latest() is None:
            state, step = train_step.init(), 0
            if config.init_from:
                params, frozen, report = initialize(state.params, state.frozen, config)
                state = state.replace(params=params, frozen=frozen)
                if jax.process_index() == 0:
                    print("\n".join(report), flush=True)
        else:
            state, data = checkpoints.restore(train_step.abstract)
            step = int(state.step)
            loader.check_state(data)
        evaluate.save_json(os.path.join(workdir, "config.json"), config.to_dict())
        metrics = Metrics(workdir, config, loader.names, step)
        if jax.process_index() == 0:
            print("\n".join([*loader.report, f"{workdir}: {describe(state, config)}"]), flush=True)

        # -- steps ----------------------------------------------------------------------------------------------------
        batches = loader.batches(step, jax.process_index(), jax.process_count())
        if config.optimizer.text == 0:
            batches = map(TextCache(config.model, whole(state.params["text_encoder"], train_step.mesh)), batches)
        with tqdm(total=config.steps, initial=step, desc="train", unit="step", dynamic_ncols=True, smoothing=0.05) as bar:
            while step < config.steps:
                state, measured = train_step(state, train_step.put(next(batches)))
                step += 1
                metrics.add(measured)
                saves = step % config.checkpoint_every == 0 or step == config.steps
                if saves or step % config.log_every == 0:  # what is counted goes on from a checkpoint's line
                    bar.set_postfix_str(metrics.write(step))
                if saves:
                    checkpoints.save(step, state, config, loader.state(step))
                if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                    metrics.write_evaluation(step, _evaluate(config, state, tokenizer, workdir))
                bar.update()
        if any(loader.bad.values()):
            print("records that could not be used, left out: " + ", ".join(f"{k} {v}" for k, v in loader.bad.items() if v))

    # -- what came of it ----------------------------------------------------------------------------------------------
    results = _evaluate(config, state, tokenizer, workdir) if config.eval.sets else {}
    metrics.write_evaluation(step, results)
    metrics.close()
    return results


def describe(state: TrainState, config: ConfigDict) -> str:
    """One line on what is about to run."""
    count = sum(x.size for x in jax.tree.leaves(state.params))
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    return f"{count:,} parameters on {devices}, steps {int(state.step)} to {config.steps}; the first step compiles"


def _evaluate(config: ConfigDict, state: TrainState, tokenizer: Tokenizer, workdir: str) -> dict[str, float]:
    return evaluate.evaluate(Predictor(config, state.params, state.frozen, tokenizer), config, workdir)


class Metrics:
    """Means since the last line, to metrics.jsonl and TensorBoard (one process writes), and words for the progress bar.

    Device values are kept as they come and read only when a line is due, so that logging never waits for a step.
    """

    def __init__(self, workdir: str, config: ConfigDict, sources: list[str], step: int):
        self.sources, self.batch_size = sources, config.batch_size
        self.rate = schedule(config.optimizer, config.steps)
        self.pending: list[dict[str, Any]] = []
        self.images = dict.fromkeys(sources, 0)  # of each source, since step 0
        self.started = time.perf_counter()
        self.writes = jax.process_index() == 0
        if self.writes:
            path = os.path.join(workdir, "metrics.jsonl")
            before = _forget_after(path, step)
            self.images = {name: before.get(f"images/{name}", 0) for name in sources}
            self.file = open(path, "a")
            self.board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=step + 1)

    def add(self, measured: dict[str, Any]) -> None:
        self.pending.append(measured)

    def write(self, step: int) -> str:
        pending, self.pending = jax.device_get(self.pending), []
        now = time.perf_counter()
        values = {f"loss/{k}": float(np.mean([m[k] for m in pending])) for k in pending[0] if np.ndim(pending[0][k]) == 0}
        values["gradient_norm"] = values.pop("loss/gradient_norm")
        by_source = defaultdict(list)
        for m in pending:
            for source, loss in zip(m["source"], m["per_image"]):
                by_source[self.sources[source]].append(loss)
        values.update({f"source/{name}": float(np.mean(losses)) for name, losses in sorted(by_source.items())})
        for name, losses in by_source.items():
            self.images[name] += len(losses)
        values.update({f"images/{name}": count for name, count in self.images.items()})
        for kind, (learnable, targets) in zip(("instances", "regions"), np.sum([m["taken"] for m in pending], 0)):
            values[f"learnable_share/{kind}"] = float(learnable / max(targets, 1))
        values["learning_rate"] = float(self.rate(step - 1))
        values["images_per_second"] = len(pending) * self.batch_size / (now - self.started)
        self.started = now
        self._emit(step, values)
        return f"loss {values['loss/total']:.3f}, {values['images_per_second']:.1f} images/s"

    def write_evaluation(self, step: int, results: dict[str, float]) -> None:
        self._emit(step, {f"eval/{k}": v for k, v in results.items()})
        self.started = time.perf_counter()

    def close(self) -> None:
        if self.writes:
            self.file.close()
            self.board.close()

    def _emit(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def _forget_after(path: str, step: int) -> dict[str, float]:
    """Drop the lines of steps that will be done again, and a line that was cut short; the last value of everything else."""
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        lines = [json.loads(line) for line in f if line.endswith("\n")]
    known = [line for line in lines if line["step"] <= step]
    with open(path + ".tmp", "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in known)
    os.replace(path + ".tmp", path)
    return {key: value for line in known for key, value in line.items()}
