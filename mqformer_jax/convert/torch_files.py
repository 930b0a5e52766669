"""torch's checkpoint files: the zip archives, the stream before them, and plain pickles. Tensors are views of the
mapped file.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import zipfile
from typing import Any

import numpy as np

from mqformer_jax.convert.torch_pickle import Module, Unpickler, Unreadable

MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6 begins with this number, pickled
LARGEST_UNPACKED = 1 << 26  # bytes that a compressed member may claim whatever its size in the file


def read_pickle(buffer: mmap.mmap) -> Any:
    """The object of a plain pickle, or of torch.save before 1.6; tensors are `Tensor` and `Array`."""
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
    for key in keys:  # the storages follow in this order: a count of elements, then the elements
        storage = unpickler.storages[key]
        (count,) = struct.unpack_from("<q", buffer, place)
        end = place + 8 + count * storage.dtype.itemsize
        if count != storage.count or count < 0 or end > len(buffer):
            raise EOFError(f"storage {key} is not whole")
        storage.raw = view[place + 8 : end]
        place = end
    return tree


def read_archive(archive: zipfile.ZipFile, buffer: mmap.mmap, prefix: str) -> Any:
    """The object of torch.save since 1.6, or the module of torch.jit.save; tensors are `Tensor` and `Array`. prefix:
    its folder.
    """
    names = set(archive.namelist())
    unpickler = Unpickler(io.BytesIO(member(archive, buffer, f"{prefix}data.pkl")))
    tree = unpickler.load()
    swapped = f"{prefix}byteorder" in names and bytes(member(archive, buffer, f"{prefix}byteorder")) == b"big"
    for key, storage in unpickler.storages.items():
        storage.raw = member(archive, buffer, f"{prefix}data/{key}")
        if len(storage.raw) < storage.count * storage.dtype.itemsize:
            raise EOFError(f"storage {key} is not whole")
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
    """Names of the parameters and buffers of a TorchScript class, as its source lists them; None: it does not."""
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
    """What a TorchScript module holds beside its submodules, parameters and buffers is no part of its state_dict."""
    for name in [name for name, value in module.items() if not isinstance(value, Module)]:
        if state is not None and name not in state:
            del module[name]


def member(archive: zipfile.ZipFile, buffer: mmap.mmap, name: str) -> Any:
    """A file's bytes inside a zip: a view of the archive's own where it is stored as it is."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        if info.file_size > max(LARGEST_UNPACKED, 100 * info.compress_size):
            raise Unreadable(
                f"{name} in it unpacks to {info.file_size} bytes from {info.compress_size}: "
                "save it without compression."
            )
        return archive.read(info)
    start, name_length, extra_length = struct.unpack_from("<4s22xHH", buffer, info.header_offset)
    begin = info.header_offset + 30 + name_length + extra_length
    if start != b"PK\x03\x04" or begin + info.file_size > len(buffer):
        raise EOFError(f"{name} is not whole")
    return memoryview(buffer)[begin : begin + info.file_size]
