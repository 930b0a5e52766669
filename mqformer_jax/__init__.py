"""MQ-Former in JAX: one text-prompted model for every segmentation task."""

import sys

__version__ = "0.2.0"

if "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1].startswith(f"{__name__}."):
    # a command, not an import: Ctrl-C ends it while jax is still loading, too
    from mqformer_jax.interrupts import exit_on_ctrl_c

    exit_on_ctrl_c(f"{__name__}: stopped.")
