"""Train the matting refiner of a recipe (`config.matting`), then measure how much it improves masks.

    mqformer train-matting --config=lite:small --checkpoint=runs/lite_small --workdir=runs/lite_small

The refiner is saved in WORKDIR/refiner, the metrics in WORKDIR/refine_eval.json.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from mqformer_jax import cli
from mqformer_jax import config as recipes
from mqformer_jax.checkpoint import Weights, has_checkpoint, save_weights
from mqformer_jax.evaluation.matting import compare, save_grid
from mqformer_jax.files import write_json
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.input.record import Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.matting.data import Matte, make_batches, mattes_of, open_mattes, rough_mask
from mqformer_jax.matting.losses import matting_loss
from mqformer_jax.matting.refiner import FOLDER, Refiner, build_refiner
from mqformer_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from mqformer_jax.segments import soft_mask
from mqformer_jax.training.optimizer import make_optimizer
from mqformer_jax.training.warm_start import initialize

# {record index: the segmentation model's soft mask of the foreground, uint8 [h, w], with sides of at most OWN_SIDE}
OwnMasks = dict[int, np.ndarray]
OWN_SIDE = 256
SLACK = 0.02  # how far `measure` moves the outlines of rough masks, as a fraction of the image's larger side


def refine(config: ConfigDict, workdir: str, checkpoint: str | None = None) -> dict[str, Any]:
    """Train `config.matting` on this host's devices, save to WORKDIR/refiner, and return the metrics on `matting.sets`.

    The metrics are {"NAME/SPLIT": result of `measure`}. Batches depend only on the seed and the step. checkpoint:
    workdir of a segmentation model whose masks also serve as guidance. Raises FileExistsError if the workdir already
    has a refiner.
    """
    matting, target = config.matting, os.path.join(workdir, FOLDER)
    if has_checkpoint(target):
        raise FileExistsError(f"{target}: a refiner already exists there; move it, or use another --workdir.")

    # -- data, model, state -------------------------------------------------------------------------------------------
    sources = open_mattes(config.data.root, matting.mixture, "mixture")
    held_out = open_mattes(config.data.root, matting.sets, "sets") if matting.sets else []
    predictor = Predictor.from_checkpoint(checkpoint) if checkpoint else None
    step = RefineStep(config)
    state, frozen, report = step.init()
    own = [own_masks(predictor, source) for source in sources]
    os.makedirs(workdir, exist_ok=True)
    count = sum(x.size for x in jax.tree.leaves(state[0]))
    devices = f"{step.mesh.size} {jax.default_backend()} device(s)"
    about = f"{count:,} parameters on {devices}, {matting.steps} steps; the first step compiles"
    print("\n".join([*report, f"{workdir}: {about}"]), flush=True)

    # -- steps --------------------------------------------------------------------------------------------------------
    pending = []
    with (
        open(os.path.join(workdir, "refine_metrics.jsonl"), "w") as log,
        tqdm(total=matting.steps, desc="refine", unit="step") as bar,
    ):
        for done, batch in enumerate(make_batches(config, sources, own), 1):
            state, terms = step(state, frozen, batch)
            # wait for each step: on CPUs, two concurrent steps on several devices can deadlock
            pending.append(_finite(jax.device_get(terms), done))
            saves = done % config.checkpoint_every == 0 or done == matting.steps
            if saves or done % config.log_every == 0:
                means = {k: float(np.mean([before[k] for before in pending])) for k in terms}
                log.write(json.dumps({"step": done, **means}) + "\n")
                log.flush()
                bar.set_postfix_str(f"loss {means['total']:.4f}")
                pending = []
            if saves:
                _replace(target, Weights(config, state[0], frozen), {"step": done})
            bar.update()

    # -- evaluation ---------------------------------------------------------------------------------------------------
    refiner = Refiner.load(workdir)
    shown = config.eval.num_visualizations
    results = {f"{s.name}/{s.split}": measure(refiner, s, predictor, workdir, shown) for s in held_out}
    write_json(os.path.join(workdir, "refine_eval.json"), results)
    return results


class RefineStep:
    """The compiled train step of the refiner, data-parallel over gcd(number of local devices, batch size) devices."""

    def __init__(self, config: ConfigDict):
        self.config, matting = config, config.matting
        self.graph, self.params, self.frozen = build_refiner(matting, config.model.dtype, config.seed)
        optimizer = config.optimizer.copy_and_resolve_references()
        warmup = max(1, matting.steps // 20)
        optimizer.update(
            learning_rate=matting.learning_rate,
            schedule="cosine",
            warmup=warmup,
            clip_norm=1.0,
            backbone_lr_mult=matting.encoder,
        )
        self.optimizer = make_optimizer(optimizer, matting.steps, self.params)
        devices = jax.local_devices()
        self.mesh = make_mesh((-1, 1, 1), devices[: math.gcd(len(devices), matting.batch_size)])
        everywhere, split = replicated(self.mesh), batch_sharding(self.mesh)
        self._step = jax.jit(
            self._update, in_shardings=(everywhere, everywhere, split), out_shardings=everywhere, donate_argnums=0
        )

    def init(self) -> tuple[tuple[Any, Any], Any, list[str]]:
        """Return the initial state, the constants, and the lines of a report on `config.matting.init_from`."""
        everywhere, report, matting = replicated(self.mesh), [], self.config.matting
        params, frozen = jax.device_put((self.params, self.frozen), everywhere)
        if matting.init_from:
            model = ConfigDict({**self.config.model, "backbone": matting.backbone})
            params, frozen, report, _ = initialize(params, frozen, model, matting.init_from, ("^(?!backbone/)",))
        return jax.device_put((params, self.optimizer.init(params)), everywhere), frozen, report

    def __call__(
        self, state: tuple[Any, Any], frozen: Any, batch: dict[str, np.ndarray]
    ) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
        """Return the next state and the loss terms. state: parameters and optimizer state; its buffers are donated."""
        return self._step(state, frozen, batch)

    def _update(self, state: tuple[Any, Any], frozen: Any, batch: dict[str, jax.Array]):
        params, opt_state = state

        def loss_fn(params):
            alphas = nnx.merge(self.graph, params, frozen)(batch["image"].astype(jnp.float32), batch["guidance"])
            terms = matting_loss(alphas, batch["alpha"], batch["weight"])
            total = sum(terms.values())
            return total, {"total": total, **terms}

        gradients, terms = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = self.optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), terms


def own_masks(predictor: Predictor | None, source: ShardSource) -> OwnMasks:
    """Return {record index: the model's mask of the foreground} for foregrounds with a matte; {} without a model."""
    if predictor is None:
        return {}
    prompt, found = predictor.embed(["foreground"], [True]), {}
    for i in tqdm(range(len(source)), desc=f"masks of {source.name}", unit="image"):
        for matte in mattes_of(Record.from_bytes(source[i]), i):
            if matte.foreground:
                mask = _own_mask(predictor, prompt, matte)
                share = min(1.0, OWN_SIDE / max(mask.shape))
                found[i] = np.round(
                    cv2.resize(mask, None, fx=share, fy=share, interpolation=cv2.INTER_AREA) * 255
                ).astype(np.uint8)
    return found


def _own_mask(predictor: Predictor, prompt: jax.Array, matte: Matte) -> np.ndarray:
    raw = predictor.predict_raw([matte.image], [prompt])[0]
    return soft_mask(raw.class_probs, raw.masks, 0)


def measure(
    refiner: Refiner, source: ShardSource, predictor: Predictor | None, workdir: str, num_visualizations: int
) -> dict[str, Any]:
    """Return {kind: metrics of the masks before and after refinement} and write a grid per kind to WORKDIR/pictures.

    The kind "rough" is the matte thresholded at 0.5, then grown (records with even index) or shrunk (odd index) by
    SLACK. The kind "own" is the foreground mask that `predictor` predicts, if there is one.
    """

    def rough(matte: Matte) -> np.ndarray:
        grow = round(SLACK * max(matte.alpha.shape))
        return rough_mask(matte.alpha, 0.5, -grow if matte.index % 2 else grow)

    guides = {"rough": rough}
    if predictor is not None:
        prompt = predictor.embed(["foreground"], [True])
        guides["own"] = lambda matte: _own_mask(predictor, prompt, matte) if matte.foreground else None
    results = {}
    for name, guide in guides.items():
        mattes = (matte for i in range(len(source)) for matte in mattes_of(Record.from_bytes(source[i]), i))
        results[name], rows = compare(refiner, mattes, guide, num_visualizations)
        if rows:
            os.makedirs(os.path.join(workdir, "pictures"), exist_ok=True)
            save_grid(os.path.join(workdir, "pictures", f"refine_{source.name}_{source.split}_{name}.jpg"), rows)
    return results


def _finite(terms: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    if not np.isfinite(terms["total"]):
        raise FloatingPointError(f"step {step}: the loss is {terms['total']}: lower config.matting.learning_rate.")
    return terms


def _replace(folder: str, weights: Weights, about: dict) -> None:
    """Replace the weights in a folder. The old weights stay until the new weights are completely written."""
    new, old = f"{folder}.new", f"{folder}.old"
    if os.path.exists(old) and not os.path.exists(folder):  # a run was killed between the two renames below
        os.rename(old, folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_weights(new, weights, about)
    if os.path.exists(folder):
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def table(results: dict[str, Any]) -> str:
    """Return one line per data set and kind of mask, with the errors before -> after refinement.

    Units: SAD and Grad in thousands, MSE in thousandths.
    """
    line = "{:>24}  {:5} masks"
    line += "".join(
        f"  {name.upper()} {{mask[{name}]:.2f}} -> {{refined[{name}]:.2f}}" for name in ("sad", "mse", "grad")
    )
    return "\n".join(
        line.format(name, kind, **r) for name, kinds in results.items() for kind, r in kinds.items() if r["mask"]
    )


def main(argv: list[str]) -> None:
    cli.no_arguments(argv)
    given = flags.FLAGS
    recipes.check(given.config)
    print(table(refine(given.config, given.workdir, given.checkpoint)))
    print(f"\nResults in {given.workdir}: {FOLDER}, refine_eval.json, refine_metrics.jsonl, pictures")


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of the command."""
    cli.define_recipe(values)
    flags.DEFINE_string(
        "workdir",
        None,
        f"Folder in which to write the folder '{FOLDER}', e.g. the workdir of a segmentation model. Required.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir of a segmentation model whose masks the refiner learns to correct, e.g. runs/lite. (default: none)",
        flag_values=values,
    )
    flags.mark_flags_as_required(["config", "workdir"], values)


def run(argv: Sequence[str]) -> None:
    define_flags(flags.FLAGS)
    cli.run(main, "train-matting", __doc__, "stopped; the last saved weights are kept.", argv)
