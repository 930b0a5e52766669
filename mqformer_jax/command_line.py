"""What the entrances share: a user's mistake is one line, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags, logging


def run(main: Callable[[list[str]], None], program: str, interrupted: str) -> None:
    """absl's `app.run` for a `main` with a --config flag. interrupted: what Ctrl-C prints."""
    try:
        app.run(main, flags_parser=lambda argv: parse_flags(argv, program))
    except (ValueError, OSError) as e:
        if logging.level_debug():
            raise
        sys.exit(f"{program}: {e}\n(--verbosity=1 shows where)")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: {interrupted}")


def parse_flags(argv: list[str], program: str, values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """absl's parsing, but a wrong flag, field or recipe ends in one line. Returns what is no flag."""
    try:
        rest = values(argv)
        values.config.keys()  # a recipe that failed to load says so here
        return rest
    except (AttributeError, KeyError) as e:
        field = str(e).strip("\"'")
        given = next((a for a in argv if f".{field}" in a), field)
        sys.exit(f"{program}: {given}: the recipe has no field {field!r}; mqformer_jax/config.py lists them all.")
    except (flags.Error, OSError, ValueError) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        sys.exit(f"{program}: {lines[-1]}")
