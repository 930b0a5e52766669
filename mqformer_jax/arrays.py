"""The array type of annotations."""

from __future__ import annotations

import jax
import numpy as np

Array = jax.Array | np.ndarray  # a function of JAX arrays takes NumPy's as well
