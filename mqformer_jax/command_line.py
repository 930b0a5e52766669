"""What the entrances share: a user's mistake is one line, not a traceback."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from mqformer_jax.interrupts import exit_now, exit_on_ctrl_c


def run(main: Callable[[list[str]], None], program: str, interrupted: str) -> None:
    """absl's `app.run` for a `main`, with or without a --config flag. interrupted: what Ctrl-C prints."""
    exit_on_ctrl_c(f"{program}: {interrupted}")
    # Tracing makes many objects that stay; looking for garbage among them took a quarter of its time.
    gc.set_threshold(100_000, 50, 100)
    app.run(
        lambda argv: _in_one_line(lambda: main(argv), program), flags_parser=lambda argv: parse_flags(argv, program)
    )


def _in_one_line(main: Callable[[], None], program: str) -> None:
    """Runs `main`; what a user can mend, and what another process of a run brought about, ends in one line."""
    try:
        return main()
    except (ValueError, OSError, FloatingPointError) as e:
        if logging.level_debug():
            raise
        message = f"{program}: {e}\n(--verbosity=1 shows where)"
    except Exception as e:
        if not _is_one_of_several():
            raise
        # JAX raises RuntimeError where a collective operation lost a partner. Anything else is our own mistake.
        if not isinstance(e, RuntimeError):
            traceback.print_exc()
        message = f"{program}: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
    if not _is_one_of_several():
        sys.exit(message)
    # an orderly end would wait for the other processes, and they for this one
    ends = "this process ends, and the others with it. Run the same command to resume from the last checkpoint."
    exit_now(1, f"{message}\n{program}: {ends}")


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")  # not loaded for this: a wrong flag should not wait for it
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def keep_compiled() -> None:
    """What is compiled once need not be compiled again by the next start, unless JAX_COMPILATION_CACHE_DIR says
    otherwise.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/mqformer_jax/compiled"))


def parse_flags(argv: list[str], program: str, values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """absl's parsing, but a wrong flag, field or recipe ends in one line. Returns what is no flag."""
    try:
        rest = values(argv)
        if "config" in values:
            values.config.keys()  # a recipe that failed to load says so here
        return rest
    except (AttributeError, KeyError) as e:
        field = str(e).strip("\"'")
        given = next((a for a in argv if f".{field}" in a), field)
        sys.exit(f"{program}: {given}: the recipe has no field {field!r}; mqformer_jax/config.py lists them all.")
    except (flags.Error, OSError, ValueError) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        sys.exit(f"{program}: {lines[-1]}")
