"""Read torch's checkpoint files: zip archives, the older stream format and plain pickles."""

from __future__ import annotations

import io
import mmap
import re
import struct
import zipfile
from typing import Any

import numpy as np

from mqformer_jax.convert.torch_pickle import Module, Unpickler, Unreadable

MAGIC = 0x1950A86A20F9469CFC6C  # files of torch.save before torch 1.6 begin with a pickle of this number
# A compressed file in an archive may unpack to this many bytes, or to 100 times its compressed size if that is more.
LARGEST_UNPACKED = 1 << 26


def read_pickle(buffer: mmap.mmap) -> Any:
    """Return the object in a plain pickle, or in a file that torch.save wrote before torch 1.6.

    Tensors and arrays are the placeholders `Tensor` and `Array`, whose method `array()` returns the values.
    """
    buffer.seek(0)
    tree = Unpickler(buffer).load()
    if tree != MAGIC:
        return tree
    for _ in ("protocol", "the machine it was saved on"):
        Unpickler(buffer).load()
    unpickler = Unpickler(buffer)
    tree = unpickler.load()
    keys = Unpickler(buffer).load()
    place, view = buffer.tell(), memoryview(buffer)
    # The storages follow in the order of `keys`, each as a count and then its elements.
    for key in keys:
        storage = unpickler.storages[key]
        (count,) = struct.unpack_from("<q", buffer, place)
        end = place + 8 + count * storage.dtype.itemsize
        if count != storage.count or count < 0 or end > len(buffer):
            raise EOFError(f"storage {key} is truncated")
        storage.raw = view[place + 8 : end]
        place = end
    return tree


def read_archive(archive: zipfile.ZipFile, buffer: mmap.mmap, prefix: str) -> Any:
    """Return the object in a zip archive of torch.save (since torch 1.6), or the module of torch.jit.save.

    prefix: the folder in the archive that contains data.pkl, with "/" at the end. Tensors and arrays are the
    placeholders `Tensor` and `Array`.
    """
    names = set(archive.namelist())
    unpickler = Unpickler(io.BytesIO(member(archive, buffer, f"{prefix}data.pkl")))
    tree = unpickler.load()
    swapped = f"{prefix}byteorder" in names and bytes(member(archive, buffer, f"{prefix}byteorder")) == b"big"
    for key, storage in unpickler.storages.items():
        storage.raw = member(archive, buffer, f"{prefix}data/{key}")
        if len(storage.raw) < storage.count * storage.dtype.itemsize:
            raise EOFError(f"storage {key} is truncated")
        if swapped:
            unit = storage.dtype.itemsize // (2 if storage.dtype.kind == "c" else 1)
            storage.raw = np.frombuffer(storage.raw, f"u{unit}").byteswap().data.cast("B")
    states: dict[str, set[str] | None] = {}
    for module in unpickler.modules:
        if module.kind not in states:
            states[module.kind] = _state_names(archive, buffer, prefix, module.kind)
        _drop_attributes(module, states[module.kind])
    return tree


def _state_names(archive: zipfile.ZipFile, buffer: mmap.mmap, prefix: str, kind: str) -> set[str] | None:
    """Return the names of the parameters and buffers of a TorchScript class, or None if its source does not list them.

    kind: the full name of the class.
    """
    folder, _, name = kind.rpartition(".")
    try:
        source = bytes(member(archive, buffer, f"{prefix}code/{folder.replace('.', '/')}.py")).decode()
    except KeyError:
        return None
    listed = re.search(
        rf"^class {re.escape(name)}\(Module\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]",
        source,
        re.MULTILINE,
    )
    return listed and set(re.findall(r'"([^"]+)"', " ".join(listed.groups())))


def _drop_attributes(module: Module, state: set[str] | None) -> None:
    """Remove the attributes of a module that are neither submodules nor part of its state_dict.

    state: names of the module's parameters and buffers; None keeps all attributes.
    """
    for name in [name for name, value in module.items() if not isinstance(value, Module)]:
        if state is not None and name not in state:
            del module[name]


def member(archive: zipfile.ZipFile, buffer: mmap.mmap, name: str) -> Any:
    """Return the bytes of a file in a zip archive, as a view of `buffer` if the file is not compressed."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        if info.file_size > max(LARGEST_UNPACKED, 100 * info.compress_size):
            raise Unreadable(
                f"{name} in the archive unpacks from {info.compress_size} to {info.file_size} bytes, which is refused: "
                "save the checkpoint without compression."
            )
        return archive.read(info)
    start, name_length, extra_length = struct.unpack_from("<4s22xHH", buffer, info.header_offset)
    begin = info.header_offset + 30 + name_length + extra_length
    if start != b"PK\x03\x04" or begin + info.file_size > len(buffer):
        raise EOFError(f"{name} is truncated")
    return memoryview(buffer)[begin : begin + info.file_size]
