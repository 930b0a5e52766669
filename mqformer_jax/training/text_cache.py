"""`TextCache`: cache the outputs of a frozen text encoder during training."""

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

CHUNK = 64  # texts per call of the encoder; fixed, so that one shape is compiled
# The cache is emptied above this number of texts: 1 GB at 512 floats per text. RefCOCO, RefCOCO+ and RefCOCOg together
# have fewer texts.
MAX_TEXTS = 1 << 19


class TextCache:
    """A callable that replaces the token ids of a Batch by the outputs of the text encoder.

    The train step then skips the encoder. The text encoder must be frozen (`optimizer.text_lr_mult = 0`). params: its
    unsharded parameters. Each host caches the texts of its own batches.
    """

    def __init__(self, config: ConfigDict, params: Any):
        graph, _ = nnx.split(
            nnx.eval_shape(lambda: make_text_encoder(config.text, nnx.Rngs(0), jnp.dtype(config.dtype)))
        )
        self._encode = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens).astype(jnp.float32))
        self._params = jax.device_put(params, jax.local_devices()[0])
        self._cache: dict[bytes, np.ndarray] = {}

    def __call__(self, batch: Batch) -> Batch:
        rows = np.ascontiguousarray(batch.tokens).reshape(-1, batch.tokens.shape[-1])
        keys = [row.tobytes() for row in rows]
        if len(self._cache) > MAX_TEXTS:
            self._cache.clear()
        new = {key: row for key, row in zip(keys, rows) if key not in self._cache}
        self._cache.update(zip(new, self._vectors(np.array(list(new.values()), np.int32)) if new else ()))
        vectors = np.stack([self._cache[key] for key in keys])
        return batch.replace(tokens=vectors.reshape(*batch.tokens.shape[:-1], -1))

    def _vectors(self, tokens: Int[np.ndarray, "n l"]) -> Float[np.ndarray, "n e"]:
        padded = np.pad(tokens, ((0, -len(tokens) % CHUNK), (0, 0)))
        chunks = [self._encode(self._params, padded[i : i + CHUNK]) for i in range(0, len(padded), CHUNK)]
        return np.concatenate(jax.device_get(chunks))[: len(tokens)]
