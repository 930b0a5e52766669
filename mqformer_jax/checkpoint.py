"""Save and restore checkpoints of the training state, the data position and the config.

Writes are atomic. Apart from `distributed.barrier`, only this module imports Orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Generator
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from mqformer_jax.config import base
from mqformer_jax.parallel.distributed import barrier, gather
from mqformer_jax.parallel.rules import path_name


class Checkpoints:
    """The checkpoints of a workdir. Saves run in the background; an interrupted save never appears as a checkpoint.

    keep: number of newest checkpoints that are kept; older ones are deleted.
    """

    def __init__(self, workdir: str, keep: int = 2):
        self.workdir, self.keep = os.path.abspath(workdir), keep
        self.folder = os.path.join(self.workdir, "checkpoints")
        self._saving: Any = None
        self._open()

    def _open(self) -> None:
        policy = ocp.training.preservation_policies.LatestN(self.keep)
        self._orbax = ocp.training.Checkpointer(self.folder, preservation_policy=policy, cleanup_tmp_directories=True)

    def latest(self) -> int | None:
        found = self._orbax.latest
        return None if found is None else found.step

    def save(self, step: int, state: Any, config: ConfigDict, data: dict) -> None:
        """Wait until the previous save ends, then start to save this step in the background.

        data: the position in the training data, `Loader.state(step)`. Raises OSError if the previous save failed or if
        this one cannot start.
        """
        self.wait()
        metadata = {"config": config_to_json(config), "data": data}
        with self._one_line_errors(step):
            self._saving = step, self._orbax.save_async(step, state, custom_metadata=metadata, force=True)

    def wait(self) -> None:
        """Wait until the running save, if any, ends. Raises OSError if it failed, e.g. because the disk is full."""
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            with self._one_line_errors(step):
                saving.result()

    @contextlib.contextmanager
    def _one_line_errors(self, step: int) -> Generator[None]:
        try:
            yield
        except Exception as e:
            raise OSError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({_first_line(e)}). "
                "Free disk space or fix the folder, then run the same command to resume from the previous checkpoint."
            ) from e

    def restore(self, abstract: Any) -> tuple[Any, dict]:
        """Return (state, data position) of the newest readable checkpoint.

        abstract: the shapes and shardings of the returned state. Newer checkpoints that are damaged, e.g. truncated,
        are logged and renamed to WORKDIR/damaged_STEP_TIME. Raises ValueError if a checkpoint belongs to another model,
        or if none can be read.
        """
        damaged: list[tuple[int, str]] = []
        for found in reversed(self._orbax.checkpoints):
            loaded, problem = self._read(found.step, abstract)
            problem = next(filter(None, gather(problem)), None)  # the files may be unreadable on one host only
            if problem is None:
                self._set_aside(damaged)
                logging.info("restored %s, step %d", self.folder, found.step)
                return loaded
            damaged.append((found.step, problem))
        tried = "; ".join(f"step {step}: {problem}" for step, problem in damaged)
        raise ValueError(
            f"{self.folder}: no checkpoint can be read ({tried}). "
            "Restore a backup, or start again with another --workdir."
        )

    def _read(self, step: int, abstract: Any) -> tuple[tuple[Any, dict] | None, str | None]:
        """Return ((state, data position), None), or (None, description of the damage) if the files cannot be read.

        Raises ValueError if names or shapes of arrays differ between the checkpoint and `abstract`.
        """
        try:
            metadata = self._orbax.metadata(step)
            if metadata.metadata is None:
                raise FileNotFoundError(
                    f"{self.folder}/{step} is incomplete: the file with its list of arrays is missing; "
                    "restore it from a backup"
                )
            difference = _difference(metadata.metadata, abstract)
            data = metadata.custom_metadata["data"]
        except Exception as e:  # Orbax does not wrap the exceptions of its parsers
            _raise_interrupt(e)
            return None, f"its metadata cannot be read ({_first_line(e)})"
        if difference:
            raise ValueError(
                f"{self.folder}/{step} does not fit this config ({difference}). "
                "Use another --workdir, or the config that the checkpoint was saved with."
            )
        try:
            return (self._orbax.load(step, abstract), data), None
        except Exception as e:
            _raise_interrupt(e)
            return None, _first_line(e)

    def _set_aside(self, damaged: list[tuple[int, str]]) -> None:
        if not damaged:
            return
        self._orbax.close()
        if jax.process_index() == 0:
            for step, problem in damaged:
                aside = os.path.join(self.workdir, f"damaged_{step}_{time.time_ns()}")
                os.rename(os.path.join(self.folder, str(step)), aside)
                logging.warning(
                    "the checkpoint of step %d is damaged (%s). It was moved to %s; an older one is used instead.",
                    step,
                    problem,
                    aside,
                )
        barrier("damaged checkpoints moved")
        self._open()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for the running save, also if an exception ends the context, then close Orbax.

        Raises OSError if the save failed and no exception ended the context.
        """
        try:
            if error[0] is None:
                self.wait()
        finally:
            self._orbax.close()


def _difference(theirs: Any, ours: Any) -> str | None:
    """Return a description of the first difference in array shapes, or None if all are equal.

    theirs: the arrays of a checkpoint. ours: the arrays that this config needs.
    """
    a, b = (
        {path_name(p): tuple(leaf.shape) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (theirs, ours)
    )
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            return f"{name}: {a.get(name, 'missing')} in the checkpoint, {b.get(name, 'missing')} in this config"
    return None


def _raise_interrupt(e: BaseException | None) -> None:
    """Raise KeyboardInterrupt if `e` wraps one, so that an interrupted read is not reported as a damaged file.

    Orbax wraps the exceptions of its callbacks in its own errors.
    """
    seen: list[BaseException] = []
    while e is not None and e not in seen:
        if isinstance(e, KeyboardInterrupt):
            raise KeyboardInterrupt from seen[0] if seen else None
        seen.append(e)
        e = e.__cause__ or e.__context__


def _first_line(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0][:200]}" if lines else type(e).__name__


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint's config, and its parameters and frozen constants as nested dicts.

    A converted checkpoint may contain only a part of the model.
    """

    config: ConfigDict
    params: Any
    frozen: Any


def has_checkpoint(folder: str) -> bool:
    """Return whether a workdir, or a folder written by `convert`, contains a finished checkpoint."""
    folder = os.path.join(os.path.abspath(folder), "checkpoints")
    if not os.path.isdir(folder):
        return False
    with ocp.training.Checkpointer(folder) as orbax:
        return orbax.latest is not None


def latest_step(path: str) -> int:
    """Return the step of the checkpoint that `load_weights` reads. Raises FileNotFoundError if there is none."""
    with _opened(path) as orbax:
        return orbax.latest.step


def save_weights(folder: str, weights: Weights, about: dict) -> None:
    """Write weights as a checkpoint of step 0, which `load_weights` can read.

    about: a description of where the weights come from, as a JSON-serializable dict. Files that an earlier, interrupted
    save left in the folder are removed. Raises FileExistsError if the folder already contains a checkpoint.
    """
    if has_checkpoint(folder):
        raise FileExistsError(
            f"{folder} already contains a checkpoint: delete {folder}/checkpoints, or give another folder."
        )
    barrier("looked for a checkpoint")
    with ocp.training.Checkpointer(
        os.path.join(os.path.abspath(folder), "checkpoints"), cleanup_tmp_directories=True
    ) as orbax:
        metadata = {"config": config_to_json(weights.config), "data": None, "about": about}
        orbax.save(0, {"params": weights.params, "frozen": weights.frozen}, custom_metadata=metadata, force=True)


def load_weights(path: str) -> Weights:
    """Load the newest checkpoint of a workdir, or of a folder written by `convert`, onto this process's first device.

    Raises FileNotFoundError if there is no checkpoint, and ValueError if its files are damaged.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
    with _opened(path) as orbax:
        step = orbax.latest.step
        try:
            metadata = orbax.metadata(step)
            config = config_from_json(metadata.custom_metadata["config"])
            wanted = {
                name: jax.tree.map(place if name in ("params", "frozen") else lambda _: ocp.PLACEHOLDER, tree)
                for name, tree in metadata.metadata.items()
            }
            state = orbax.load(step, wanted)
        except Exception as e:  # Orbax does not wrap the exceptions of its parsers
            _raise_interrupt(e)
            raise ValueError(
                f"{path}: the checkpoint of step {step} cannot be read ({_first_line(e)}). "
                f"Move the folder {path}/checkpoints/{step} elsewhere to use an older checkpoint."
            ) from e
    return Weights(config, state["params"], state["frozen"])


@contextlib.contextmanager
def _opened(path: str) -> Generator[Any]:
    """Yield Orbax's checkpointer of a folder. Raises FileNotFoundError if there is no finished checkpoint."""
    folder = os.path.join(os.path.abspath(path), "checkpoints")
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{path}: no checkpoint found. Give the workdir of a run, or a folder written by `mqformer convert`."
        )
    with ocp.training.Checkpointer(folder) as orbax:
        if orbax.latest is None:
            raise FileNotFoundError(
                f"{folder}: no finished checkpoint found. Train until the first one is saved, or give another folder."
            )
        yield orbax


def config_to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)


def config_from_json(text: str) -> ConfigDict:
    """Return the config of a checkpoint from its JSON. Fields that did not exist when it was saved get their defaults.

    Therefore, the default of a new field must keep the behavior of older versions.
    """
    config, values = base(), json.loads(text)
    if isinstance(values["model"]["remat"], bool):  # in version 0.1, this field was a bool
        values["model"]["remat"] = "layers" if values["model"]["remat"] else "none"
    values["data"].pop("mask_canvases", None)  # this field was removed in version 0.2
    config.update(values)
    return config


def load_config(path: str) -> ConfigDict:
    """Return the config of a folder's newest checkpoint without loading the weights.

    Raises FileNotFoundError if there is no checkpoint.
    """
    with _opened(path) as orbax:
        return config_from_json(orbax.metadata(orbax.latest.step).custom_metadata["config"])
