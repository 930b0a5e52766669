"""Checkpoints: state, data position and config, whole or not at all. The only file that imports Orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from mqformer_jax.config import base


class Checkpoints:
    """The checkpoints of a workdir. Saving happens behind the step; a save cut short is never seen as a checkpoint."""

    def __init__(self, workdir: str, keep: int = 2):
        self.folder = os.path.join(os.path.abspath(workdir), "checkpoints")
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(self.folder, preservation_policy=policy, cleanup_tmp_directories=True)

    def latest(self) -> int | None:
        found = self._orbax.latest
        return None if found is None else found.step

    def save(self, step: int, state: Any, config: ConfigDict, data: dict) -> None:
        """Start saving; waits for an earlier save, not for this one."""
        self._orbax.save_async(step, state, custom_metadata={"config": config_to_json(config), "data": data}, force=True)

    def restore(self, abstract: Any) -> tuple[Any, dict]:
        """The newest checkpoint laid out as `abstract` says (any mesh), and the data position saved with it.

        Raises ValueError, in one line, where the checkpoint is of another model.
        """
        step = self.latest()
        try:
            state = self._orbax.load(step, abstract)
        except (ValueError, KeyError, TypeError) as e:
            first = str(e).strip().splitlines()[0]
            raise ValueError(
                f"{self.folder}/{step} does not fit this config ({first}): use another --workdir or the config it was made with."
            ) from e
        logging.info("restored %s, step %d", self.folder, step)
        return state, self._orbax.metadata(step).custom_metadata["data"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        """However a run ends, a save under way is finished."""
        self._orbax.close()


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint's config, and its parameters and frozen constants as nested dicts (of a converted one maybe a part only)."""

    config: ConfigDict
    params: Any
    frozen: Any


def has_checkpoint(folder: str) -> bool:
    """Whether a workdir, or what `convert` wrote, holds a finished checkpoint."""
    folder = os.path.join(os.path.abspath(folder), "checkpoints")
    if not os.path.isdir(folder):
        return False
    with ocp.training.Checkpointer(folder) as orbax:
        return orbax.latest is not None


def save_weights(folder: str, weights: Weights, about: dict) -> None:
    """Writes weights alone, as a run's checkpoint at step 0, which `load_weights` reads. about: where they come from (JSON).

    What a save that was cut short left there is cleaned up. Raises FileExistsError where the folder has a checkpoint.
    """
    if has_checkpoint(folder):
        raise FileExistsError(f"{folder}: a checkpoint is there already.")
    with ocp.training.Checkpointer(os.path.join(os.path.abspath(folder), "checkpoints"), cleanup_tmp_directories=True) as orbax:
        metadata = {"config": config_to_json(weights.config), "data": None, "about": about}
        orbax.save(0, {"params": weights.params, "frozen": weights.frozen}, custom_metadata=metadata, force=True)


def load_weights(path: str) -> Weights:
    """The newest checkpoint of a workdir of `main`, or what `convert` wrote, on the host's first device."""
    with _opened(path) as orbax:
        metadata = orbax.metadata(orbax.latest.step)
        config = config_from_json(metadata.custom_metadata["config"])
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
        wanted = {
            name: jax.tree.map(place if name in ("params", "frozen") else lambda _: ocp.PLACEHOLDER, tree)
            for name, tree in metadata.metadata.items()
        }
        state = orbax.load(orbax.latest.step, wanted)
    return Weights(config, state["params"], state["frozen"])


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Orbax's view of a folder that has a finished checkpoint."""
    folder = os.path.join(os.path.abspath(path), "checkpoints")
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"{path}: no checkpoint there; give a workdir of mqformer_jax.main or a folder that mqformer_jax.convert wrote."
        )
    with ocp.training.Checkpointer(folder) as orbax:
        if orbax.latest is None:
            raise FileNotFoundError(f"{folder}: no finished checkpoint there.")
        yield orbax


def config_to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), sort_keys=True)


def config_from_json(text: str) -> ConfigDict:
    """The config of a checkpoint; fields that did not exist when it was made have their defaults, which are what they then were."""
    config = base()
    config.update(json.loads(text))
    return config


def load_config(path: str) -> ConfigDict:
    """The config of the newest checkpoint of a folder, without its weights. Raises FileNotFoundError in one line."""
    with _opened(path) as orbax:
        return config_from_json(orbax.metadata(orbax.latest.step).custom_metadata["config"])
