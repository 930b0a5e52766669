"""Write files atomically: write a temporary file, then rename it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Mapping
from typing import Any

from mqformer_jax.interrupts import removed_on_exit


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Generator[str]:
    """Yield the path of a temporary file, which replaces `path` when the context ends.

    Readers see either the old file or the complete new one, even after a crash. If an exception or an interruption
    ends the context, the temporary file is removed and `path` is unchanged.

    >>> with atomic_write("results.json") as temporary:
    ...     pathlib.Path(temporary).write_text("{}")
    """
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with removed_on_exit(temporary):
            yield temporary
            replace_file(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def replace_file(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Sync a finished temporary file to disk, then rename it to `path` in the same folder."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(values, indent=1))
