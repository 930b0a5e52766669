"""What a frozen text encoder says, computed once a text."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from mqformer_jax.input.batch import Batch
from mqformer_jax.models.text_encoder import make_text_encoder

CHUNK = 64  # texts a call, so that one shape is compiled
MOST = 1 << 19  # texts kept: 1 GB of 512 numbers each; more than RefCOCO, RefCOCO+ and RefCOCOg have together


class TextCache:
    """Replaces a Batch's token ids by their vectors, so that the step never runs the encoder.

    Used when the text encoder is frozen (`optimizer.text_lr_mult = 0`).

    params: the text encoder's, whole on this host. Each host caches the texts of its own batches.
    """

    def __init__(self, config: ConfigDict, params: Any):
        graph, _ = nnx.split(
            nnx.eval_shape(lambda: make_text_encoder(config.text, nnx.Rngs(0), jnp.dtype(config.dtype)))
        )
        self._encode = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens).astype(jnp.float32))
        self._params = jax.device_put(params, jax.local_devices()[0])
        self._known: dict[bytes, np.ndarray] = {}

    def __call__(self, batch: Batch) -> Batch:
        rows = np.ascontiguousarray(batch.tokens).reshape(-1, batch.tokens.shape[-1])
        keys = [row.tobytes() for row in rows]
        if len(self._known) > MOST:
            self._known.clear()
        new = {key: row for key, row in zip(keys, rows) if key not in self._known}
        self._known.update(zip(new, self._vectors(np.array(list(new.values()), np.int32)) if new else ()))
        vectors = np.stack([self._known[key] for key in keys])
        return batch.replace(tokens=vectors.reshape(*batch.tokens.shape[:-1], -1))

    def _vectors(self, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n e"]:
        padded = np.pad(tokens, ((0, -len(tokens) % CHUNK), (0, 0)))
        chunks = [self._encode(self._params, padded[i : i + CHUNK]) for i in range(0, len(padded), CHUNK)]
        return np.concatenate(jax.device_get(chunks))[: len(tokens)]
