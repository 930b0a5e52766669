"""Write files whole or not at all."""

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

    Readers see the old file or the whole new one, also after a crash. If an exception or an interruption ends the
    context, the temporary file is removed and `path` stays as it was.

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
    """Rename a finished temporary file of the same folder to `path`, once its contents are on the disk."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(values, indent=1))
