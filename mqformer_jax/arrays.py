"""Type aliases of arrays and numbers for annotations."""

from __future__ import annotations

import jax
import numpy as np

Array = jax.Array | np.ndarray  # functions of JAX arrays also accept NumPy arrays
Number = int | float | np.integer | np.floating  # most scalars of NumPy are neither `float` nor `int`
