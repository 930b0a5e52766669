"""Aliases for type annotations of arrays and numbers."""

from __future__ import annotations

import jax
import numpy as np

Array = jax.Array | np.ndarray  # functions that take JAX arrays also accept NumPy arrays
Number = int | float | np.integer | np.floating  # most NumPy scalars are neither `float` nor `int`
