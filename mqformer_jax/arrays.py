"""The types of arrays and numbers in annotations."""

from __future__ import annotations

import jax
import numpy as np

Array = jax.Array | np.ndarray  # a function of JAX arrays takes NumPy's as well
Number = int | float | np.integer | np.floating  # what a NumPy array holds is no `float` and no `int`
