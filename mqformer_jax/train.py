"""The training loop."""

from __future__ import annotations

import itertools
import os

import jax
from ml_collections import ConfigDict

from mqformer_jax import checkpoint, cli
from mqformer_jax.evaluation import evaluate
from mqformer_jax.files import write_json
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.input.mixture import make_loader
from mqformer_jax.models.tokenizer import Tokenizer, make_tokenizer
from mqformer_jax.parallel.distributed import Preemption, barrier, connect, is_first
from mqformer_jax.parallel.mesh import gather_to_host, make_mesh
from mqformer_jax.training.metrics import Metrics
from mqformer_jax.training.nan_guard import NotFinite
from mqformer_jax.training.progress import Progress
from mqformer_jax.training.step import TrainState, TrainStep
from mqformer_jax.training.text_cache import TextCache
from mqformer_jax.training.warm_start import bring_tokenizer, initialize


def train(config: ConfigDict, workdir: str) -> dict[str, float] | None:
    """Train the model of a config, then evaluate it and return the metrics. Resume if `workdir` has a checkpoint.

    Every batch and every random number depends only on the seed and the step. Resuming therefore reproduces an
    uninterrupted run (bit for bit on CPU). Returns None if SIGTERM or Ctrl-C stopped the run after a save.
    """
    os.makedirs(workdir, exist_ok=True)
    cli.keep_compiled()

    # -- data, model, state -------------------------------------------------------------------------------------------
    fresh = not checkpoint.has_checkpoint(workdir)
    if fresh and is_first():
        bring_tokenizer(config.init_from, config.model.text.tokenizer, workdir)
    barrier("tokenizer copied")
    tokenizer = make_tokenizer(config.model.text, workdir)
    loader = make_loader(config, tokenizer)
    mesh = make_mesh(config.mesh)
    connect(mesh)
    train_step = TrainStep(config, mesh)
    with checkpoint.Checkpoints(workdir, config.keep_checkpoints) as checkpoints, Preemption() as preemption:
        if checkpoints.latest() is None:
            (state, centers_prompts), step = start(config, train_step), 0
        else:
            state, data = checkpoints.restore(train_step.abstract)
            centers_prompts, step = False, int(state.step)
            loader.check_state(data)
        if is_first():
            write_json(os.path.join(workdir, "config.json"), config.to_dict())
            print("\n".join([*loader.report, f"{workdir}: {describe(state, config.steps)}"]), flush=True)
        metrics, not_finite = Metrics(workdir, config, loader.names, step), NotFinite(config, workdir, loader)

        # -- steps ----------------------------------------------------------------------------------------------------
        batches = loader.batches(step, jax.process_index(), jax.process_count())
        if config.optimizer.text_lr_mult == 0:
            batches = map(
                TextCache(config.model, gather_to_host(state.params["text_encoder"], train_step.mesh)), batches
            )
        if centers_prompts:
            first = next(batches)
            state, batches = train_step.center_prompts(state, train_step.put(first)), itertools.chain([first], batches)
        stops, previous = False, None
        # On CPUs, two concurrent steps on several devices can deadlock.
        one_at_a_time = jax.default_backend() == "cpu"
        with Progress(config.steps, step, is_first()) as progress:
            while step < config.steps and not stops:
                alive = previous["alive"] if previous and config.not_finite == "stop" else None
                batch = train_step.put(next(batches))
                with progress.compiling(step):
                    state, measured = train_step(state, batch, alive)
                if previous:  # check the previous step, so that the device never waits for this check
                    not_finite.check(step - 1, previous, state)
                previous = measured
                step += 1
                if one_at_a_time:
                    not_finite.check(step - 1, measured, state)
                metrics.add(measured)
                stops = preemption.should_stop(step)
                evaluates = config.eval.every and step % config.eval.every == 0 and step < config.steps
                saves = step % config.checkpoint_every == 0 or step == config.steps or evaluates or stops
                if saves:  # a state that is not finite is never saved
                    not_finite.check(step - 1, measured, state)
                if saves or step % config.log_every == 0:  # a resumed run reads counters from this metrics line
                    progress.bar.set_postfix_str(metrics.write(step))
                if saves:
                    checkpoints.save(step, state, config, loader.state(step))
                if evaluates and not stops:
                    checkpoints.wait()
                    with preemption.exit_on_signals():
                        metrics.write_evaluation(step, _evaluate(config, state, tokenizer, workdir))
                progress.update(step, measured)
        if any(loader.bad.values()):
            bad = ", ".join(f"{name} {count}" for name, count in loader.bad.items() if count)
            print(f"Training skipped unusable records (data set and number of records): {bad}")

        # -- last evaluation ------------------------------------------------------------------------------------------
        results = None
        if step == config.steps:
            checkpoints.wait()
            with preemption.exit_on_signals():
                results = _evaluate(config, state, tokenizer, workdir) if config.eval.sets else {}
            metrics.write_evaluation(step, results)
        metrics.close()
        return results


def start(config: ConfigDict, train_step: TrainStep) -> tuple[TrainState, bool]:
    """Return the state of a new run, and whether its prompts must be centered (`TrainStep.center_prompts`).

    The state has the weights of `config.init_from`. If these contain a class head or region embedding, prompts are not
    centered, because the weights were trained for the prompts as they are.
    """
    state = train_step.init()
    if not config.init_from:
        return state, True
    params, frozen, report, loaded = initialize(
        state.params, state.frozen, config.model, config.init_from, config.init_skip
    )
    if is_first():
        print("\n".join(report), flush=True)
    trained = {"region_embedding", "heads/class_embed/kernel"} & loaded
    return state.replace(params=params, frozen=frozen), not trained


def describe(state: TrainState, steps: int) -> str:
    """Return a line with the number of parameters, the devices and the steps to run."""
    count = sum(x.size for x in jax.tree.leaves(state.params))
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    devices = f"{jax.device_count()} {jax.default_backend()} device(s){processes}"
    step = int(state.step)
    if step >= steps:
        return f"{count:,} parameters on {devices}; all {steps} steps are done, evaluating"
    return f"{count:,} parameters on {devices}, steps {step} to {steps}"


def _evaluate(config: ConfigDict, state: TrainState, tokenizer: Tokenizer, workdir: str) -> dict[str, float]:
    """Evaluate the model and return the metrics.

    Each process evaluates a part of the images, with a copy of the model on each of its devices.
    """
    params, frozen = state.params, state.frozen
    if jax.process_count() > 1:
        mesh = state.step.sharding.mesh
        params, frozen = jax.device_put(
            (gather_to_host(params, mesh), gather_to_host(frozen, mesh)), jax.local_devices()[0]
        )
    return evaluate.evaluate(Predictor(config, params, frozen, tokenizer, jax.local_devices()), config, workdir)
