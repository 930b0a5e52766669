"""MQ-Former in JAX: one text-prompted model for every segmentation task."""

import sys
from typing import Any

__version__ = "0.2.0"
__all__ = ["Predictor", "__version__"]

if "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1].startswith(__name__):
    # Python was started with `-m mqformer_jax`: let Ctrl-C end the command even while JAX is being imported
    from mqformer_jax.interrupts import exit_on_ctrl_c

    exit_on_ctrl_c(f"{__name__}: stopped.")


def __getattr__(name: str) -> Any:
    """Return `Predictor`. It is imported on first use, so that importing the package does not load JAX."""
    if name == "Predictor":
        from mqformer_jax.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
