"""Shared helpers of the commands: parsing, help, verbosity and one-line error messages."""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib.resources
import os
import pkgutil
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mqformer_jax.interrupts import exit_now, exit_on_ctrl_c

HELP = ("-h", "-help", "--help", "--helpshort", "--helpfull")


def run(main: Callable[[list[str]], int | None], command: str, doc: str, interrupted: str, argv: Sequence[str]) -> None:
    """Run a command whose options are absl flags, with or without a --config.

    main: takes the arguments that are not flags and may return an exit status. doc: text that --help prints above the
    options. interrupted: text to print on Ctrl-C. argv: the arguments, without the name of the program.
    """
    program = f"mqformer {command}"
    start(program, interrupted)
    sys.argv = [program, *find_recipe(argv)]  # ml_collections looks for --config.FIELD in sys.argv

    def parse(given: list[str]) -> list[str]:
        if any(argument in HELP for argument in given):
            print(help_text(program, doc))
            sys.exit(0)
        rest = parse_flags(given, program)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it reads or writes
        return rest[1:]

    app.run(lambda rest: in_one_line(lambda: main(rest), program), argv=sys.argv, flags_parser=parse)


def run_parsed(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], int | None],
    interrupted: str,
    argv: Sequence[str],
    status: int = 130,
) -> None:
    """Run a command whose options are defined with argparse. status: the exit status after Ctrl-C."""
    start(parser.prog, interrupted, status)
    arguments = parser.parse_args(argv)
    sys.exit(in_one_line(lambda: main(arguments), parser.prog))


def start(program: str, interrupted: str, status: int = 130) -> None:
    """Set up the process of a command: Ctrl-C and the garbage collector."""
    exit_on_ctrl_c(f"{program}: {interrupted}", status)
    # Tracing creates many long-lived objects. With the default thresholds, garbage collection takes a quarter of the
    # tracing time.
    gc.set_threshold(100_000, 20, 10)


def in_one_line(main: Callable[[], int | None], program: str) -> int | None:
    """Run `main`. Exit with a one-line message for errors that the user can fix or that another process caused.

    With --verbosity=1, raise the errors that the user can fix, to show where they come from.
    """
    try:
        return main()
    except (ValueError, OSError, FloatingPointError) as e:
        if logging.level_debug():
            raise
        message = f"{program}: {e}"
    except Exception as e:
        if not _is_one_of_several():
            raise
        # JAX raises RuntimeError if a process dies during a collective operation. Any other exception is a bug.
        if not isinstance(e, RuntimeError):
            traceback.print_exc()
        message = f"{program}: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
    if not _is_one_of_several():
        sys.exit(message)
    # A normal exit would wait for the other processes, which wait for this one.
    ends = "all processes of the run stop. Run the same command to resume from the last checkpoint."
    exit_now(1, f"{message}\n{program}: {ends}")


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")  # not imported here, since a wrong flag should be reported without waiting for JAX
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def keep_compiled() -> None:
    """Cache compiled programs in ~/.cache/mqformer_jax/compiled, or in JAX_COMPILATION_CACHE_DIR if it is set."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/mqformer_jax/compiled"))


# ---- Flags and recipes ----------------------------------------------------------------------------------------------


def define_recipe(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flag --config, which names the recipe."""
    text = "Recipe: a file or the name of an installed recipe, with an optional variant, e.g. coco_ref:sample."
    config_flags.DEFINE_config_file("config", None, text, lock_config=True, flag_values=values)


def require_fractions(*names: str, values: flags.FlagValues = flags.FLAGS) -> None:
    """Restrict the float flags `names` to numbers from 0 to 1."""
    for name in names:
        is_fraction = lambda value: value is None or 0 <= value <= 1
        flags.register_validator(name, is_fraction, "give a number from 0 to 1.", flag_values=values)


def no_arguments(rest: Sequence[str]) -> None:
    """Raise ValueError if there are arguments that are not flags."""
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: every option begins with --; see --help.")


def find_recipe(argv: Sequence[str]) -> list[str]:
    """Return the arguments with `--config=NAME:VARIANT` replaced by the path of the installed recipe NAME.

    A path is left unchanged. Thus `--config=configs/coco_ref.py:sample` and `--config=coco_ref:sample` name the same
    recipe.
    """
    found = list(argv)
    for i, argument in enumerate(found):
        if argument == "--config" and i + 1 < len(found):
            found[i + 1] = _recipe_path(found[i + 1])
        elif argument.startswith("--config="):
            found[i] = f"--config={_recipe_path(argument.removeprefix('--config='))}"
    return found


def _recipe_path(value: str) -> str:
    path, colon, variant = value.partition(":")
    if os.path.exists(path):
        return value
    folder = str(importlib.resources.files("mqformer_jax.configs"))
    installed = sorted(name for _, name, _ in pkgutil.iter_modules([folder]))
    if path not in installed:
        sys.exit(
            f"mqformer: --config={value}: there is no file {path} and no installed recipe of this name; "
            f"installed recipes are {', '.join(installed)}."
        )
    return f"{os.path.join(folder, path)}.py{colon}{variant}"


def parse_flags(argv: list[str], program: str, values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse absl flags and return the remaining arguments.

    Exit with a one-line message if a flag, field or recipe is wrong.
    """
    try:
        rest = values(argv)
        if "config" in values:
            values.config.keys()  # raises an error if the recipe failed to load
        return rest
    except (AttributeError, KeyError) as e:
        sys.exit(f"{program}: {_unknown_field(argv, values, e)}")
    except (flags.Error, OSError, ValueError) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        sys.exit(f"{program}: {lines[-1]}")


def _unknown_field(argv: Sequence[str], values: flags.FlagValues, error: Exception) -> str:
    """Return an error message about the first --config.FIELD in `argv` that the recipe does not have.

    If there is none, the message is that of `error`.
    """
    for argument in argv:
        option = argument.partition("=")[0]
        if not option.startswith("--config."):
            continue
        field = option.removeprefix("--config.")
        known = list(_fields(_recipe(argv)))
        if field not in known:
            close = difflib.get_close_matches(field, known, 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else "mqformer_jax/config.py lists all fields."
            return f"{argument}: the recipe has no field {field!r}; {hint}"
    return " ".join(str(error).split())


def _recipe(argv: Sequence[str]) -> ConfigDict:
    """Return the config that --config names, before flags such as --config.steps are applied."""
    options = [argument.partition("=") for argument in argv]
    given = [value if equals else argv[i + 1] for i, (name, equals, value) in enumerate(options) if name == "--config"]
    path, colon, variant = given[-1].partition(":")
    get_config = runpy.run_path(path)["get_config"]
    return get_config(variant) if colon else get_config()


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield f"{prefix}{name}"
        if hasattr(value, "items"):
            yield from _fields(value, f"{prefix}{name}.")


def help_text(program: str, doc: str, values: flags.FlagValues = flags.FLAGS) -> str:
    """Return a command's help: `doc`, then the flags that the command itself defined."""
    lines = [doc.strip(), "", f"options of {program}:"]
    for module, group in values.flags_by_module_dict().items():
        if not module.startswith("mqformer_jax."):
            continue
        for flag in group:
            if flag.name.startswith("config_"):
                continue
            unset = flag.default in (None, []) or flag.default is False
            value = "" if unset else flag.default_as_str.strip("'")
            default = f" (default: {value})" if value else ""
            text = flag.help.removesuffix("repeat this option to specify a list of values").rstrip("; \n")
            lines += _option(f"--{flag.name}" + ("" if flag.boolean else "="), f"{text}{default}")
            if flag.name == "config":
                lines += _option("--config.FIELD=", "Change a field of the recipe, e.g. --config.steps=100.")
    lines += _option("--verbosity=", "1 logs more, and shows where an error was raised. (default: -1)")
    return "\n".join(lines)


def _option(name: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(" ".join(text.split()), 76, break_on_hyphens=False)
    first = f"  {name:<20} "
    indent = " " * 23
    if len(first) > len(indent):
        return [first.rstrip(), *(indent + line for line in wrapped)]
    return [first + wrapped[0], *(indent + line for line in wrapped[1:])]
