"""Read the tensors of checkpoint files in all common formats, without torch and without running code from the files."""

from __future__ import annotations

import io
import json
import mmap
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mqformer_jax.convert.torch_files import member, read_archive, read_pickle
from mqformer_jax.convert.torch_pickle import DTYPES, Array, Module, Tensor, Unreadable
from mqformer_jax.files import atomic_write

# weights files of a Hugging Face folder, in order of preference
FOLDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
SAFETENSORS = dict(F64="float64", F32="float32", F16="float16", BF16="bfloat16", BOOL="bool", C64="complex64") | {
    f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}
# Keys that hold the weights in training checkpoints, in order of preference. A key outside of CERTAIN is used only if
# every key that holds weights is in WRAPPERS.
CERTAIN = ("model", "state_dict", "model_state_dict")
WRAPPERS = (*CERTAIN, "module", "net", "network", "params", "model_ema", "state_dict_ema", "ema_state_dict", "ema")
BESIDE = r"(optim|sched|lr_?sched|scaler|amp)\w*|(\w+_)?rng(_\w+)?"  # regex of keys of other training state
PREFIXES = ("module.", "_orig_mod.")  # added by torch's data-parallel and compiled modules
# limits on the depth and the number of entries of a tree: a few bytes of pickle can describe an endless one
DEEPEST, MOST = 32, 1_000_000

MEND = "give a safetensors file, a torch checkpoint, a detectron2 .pkl, a numpy .npz or a Hugging Face folder."


def read(path: str) -> dict[str, np.ndarray]:
    """Return {name: array} of the tensors of a checkpoint file or folder.

    The content determines the format: safetensors, torch (zip, TorchScript, legacy), detectron2's pickles, .npz, .npy,
    or a Hugging Face folder or shard index. If the file is a training checkpoint, only its weights (under "model",
    "state_dict", ...) are returned. Names of nested dictionaries are joined with dots. Prefixes that torch's wrappers
    add to all names, such as "module.", are removed. Shapes and types are those of the file; bfloat16 is the type of
    the package ml_dtypes. Arrays may be read-only views of the file, so do not change the file while you use them.
    Raises FileNotFoundError if a file is missing, and ValueError if its content cannot be read.
    """
    if os.path.isdir(path):
        path = _in_folder(path)
    shards = _shards(path)
    if shards is None:
        return _read_file(path)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(shards.values())):
        tensors |= _read_file(os.path.join(os.path.dirname(path), file))
    if absent := sorted(set(shards) - set(tensors)):
        raise ValueError(
            f"{path}: the shards lack {len(absent)} tensors of this index ({absent[0]}, ...): "
            "download all files again, in the same version."
        )
    return tensors


def write_safetensors(path: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically. metadata: {name: text} for the header. Raises OSError."""
    whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}  # safetensors ignores strides
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder: name the file to write.")
    try:
        with atomic_write(path) as temporary:
            safetensors.numpy.save_file(whole, temporary, metadata=dict(metadata or {}))
            os.chmod(temporary, 0o666 & ~_umask())  # the package creates files that only the owner can read
    except safetensors.SafetensorError as e:
        raise OSError(f"{path}: could not be written ({e}).") from e


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    value = os.umask(0o022)
    os.umask(value)
    return value


def _read_file(path: str) -> dict[str, np.ndarray]:
    _check_there(path)
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # open as long as an array is a view of it
        try:
            return _named(_parse(file, buffer))
        except Unreadable as e:
            wrong = str(e)
        except Exception as e:  # a damaged pickle can raise any error
            wrong = f"the file is truncated or damaged ({type(e).__name__} {str(e)[:200]}): download or copy it again."
    raise ValueError(f"{path}: {' '.join(wrong.split())}")  # names in the file may contain line breaks


def _parse(file: Any, buffer: mmap.mmap) -> Any:
    """Return the file's content, e.g. nested dictionaries of tensors. The first bytes determine the format."""
    start = buffer[:512]
    if start[:4] == b"PK\x03\x04":
        return _read_zip(file, buffer)
    if start[:6] == b"\x93NUMPY":
        return {os.path.splitext(os.path.basename(file.name))[0]: _read_npy(buffer)}
    if (length := _header_length(start)) is not None:
        return _read_safetensors(buffer, length)
    if start[:1] == b"\x80" and start[1] <= 5:
        return read_pickle(buffer)
    if start.startswith(b"version https://git-lfs"):
        raise Unreadable("this is a git-lfs pointer, not the weights: run 'git lfs pull' or download the file itself.")
    if start.lstrip()[:1] == b"<":
        raise Unreadable("this is a web page, not weights: the download failed or was redirected; download it again.")
    if start[257:262] == b"ustar":
        raise Unreadable(
            "this is a tar archive (torch before 0.1.10): unpack it, or load it with torch and save it again."
        )
    raise Unreadable(f"the file has an unknown format: {MEND}")


def _read_safetensors(buffer: mmap.mmap, length: int) -> dict[str, np.ndarray]:
    header = json.loads(buffer[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS:
            raise Unreadable(f"tensor {name} has the unsupported type {entry['dtype']}: save it as F32 or BF16.")
        begin, end = entry["data_offsets"]
        tensors[name] = np.ndarray(entry["shape"], DTYPES[SAFETENSORS[entry["dtype"]]], buffer, 8 + length + begin)
        if begin < 0 or tensors[name].nbytes != end - begin:
            raise ValueError(f"{name} has {end - begin} bytes for a shape of {entry['shape']}")
    return tensors


def _read_npy(data: Any) -> np.ndarray:
    """Return the array in the bytes of a .npy file, as a view of these bytes."""
    head = io.BytesIO(data[: 1 << 16])
    version = np.lib.format.read_magic(head)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read_header(head)
    if dtype == np.dtype("V2"):  # numpy writes bfloat16 as this type
        dtype = DTYPES["bfloat16"]
    if dtype.hasobject or dtype.names:
        raise Unreadable(
            "the file holds Python objects or records, not plain arrays: save each plain array with numpy.savez."
        )
    return np.ndarray(shape, dtype, data, head.tell(), order="F" if fortran else "C")


def _read_zip(file: Any, buffer: mmap.mmap) -> Any:
    """Return the content of a zip archive: numpy's .npz, torch.save's format since torch 1.6, or TorchScript."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if names and all(name.endswith(".npy") for name in names):
            return {name[:-4]: _read_npy(member(archive, buffer, name)) for name in names}
        inside = [name for name in names if re.fullmatch("[^/]+/data.pkl", name)]
        if len(inside) == 1:
            return read_archive(archive, buffer, inside[0].removesuffix("data.pkl"))
    raise Unreadable(
        f"this zip archive is neither a torch nor a numpy file (it contains {', '.join(names[:3]) or 'nothing'}): "
        "unpack it and give the checkpoint inside."
    )


def _header_length(start: bytes) -> int | None:
    """Return the length of a safetensors header from the first nine bytes, or None for another format."""
    length = int.from_bytes(start[:8], "little")
    return length if start[8:9] == b"{" and length < 1 << 32 else None


def _check_there(path: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint file; check the path.")
    if not os.path.getsize(path):
        raise ValueError(f"{path}: the file is empty; download or copy it again.")


def _in_folder(path: str) -> str:
    for name in FOLDER:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise FileNotFoundError(
        f"{path}: the folder contains none of {', '.join(FOLDER)}; give the checkpoint file itself."
    )


def _shards(path: str) -> dict[str, str] | None:
    """Return {tensor: file name} from a Hugging Face index of shards, or None if the file is not JSON.

    Raises ValueError for any other JSON file.
    """
    _check_there(path)
    with open(path, "rb") as file:
        start = file.read(9)
        if start[:1] != b"{" or _header_length(start) is not None:
            return None
        try:
            shards = json.loads(start + file.read())["weight_map"]
            named_well = all(os.path.basename(shard) == shard for shard in shards.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            named_well = False
    if not named_well:
        raise ValueError(f"{path}: this JSON file is not an index of shards; {MEND}")
    return shards


def _named(tree: Any) -> dict[str, np.ndarray]:
    """Return {name: array} of the weights in a tree, without the prefixes of torch's wrappers.

    Raises Unreadable if there are no tensors, or if a tensor has no name or the name of another one.
    """
    if isinstance(tree, (Tensor, Array)):
        raise Unreadable("the file holds a single tensor without a name: save a dictionary of tensors (a state_dict).")
    tensors = {}
    for name, leaf in _leaves(_unwrapped(tree)):
        if name in tensors:
            raise Unreadable(f"two tensors have the name {name}: save a plain state_dict.")
        tensors[name] = leaf if isinstance(leaf, np.ndarray) else leaf.array()
    if not tensors:
        raise Unreadable("the file holds no tensors: save the model's state_dict.")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _unwrapped(tree: Any) -> Any:
    """Return the part of a training checkpoint that holds the weights, which may be the whole `tree`."""
    for _ in range(DEEPEST):
        if isinstance(tree, Module) or not isinstance(tree, dict):
            break
        tree = {
            key: value
            for key, value in tree.items()
            if isinstance(key, (str, int)) and not re.fullmatch(BESIDE, str(key))
        }
        holders = [key for key, value in tree.items() if _holds_weights(value)]
        wrapper = next((key for key in WRAPPERS if key in holders and not _is_leaf(tree[key])), None)
        if (
            wrapper is None
            or any(_is_leaf(tree[key]) for key in holders)
            or wrapper not in CERTAIN
            and set(holders) - set(WRAPPERS)
        ):
            break
        tree = tree[wrapper]
    return tree


def _holds_weights(tree: Any) -> bool:
    """Return whether the tree has a tensor that is not a scalar. Scalars, such as a best score, are not weights."""
    return any(len(leaf.shape) for _, leaf in _leaves(tree))


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (Tensor, Array, np.ndarray))


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) from nested dictionaries and lists, in the file's order. Names are keys joined by dots.

    Raises Unreadable if the nesting is too deep or there are too many entries.
    """
    left, seen = [("", tree, 0)], 0
    while left:
        name, node, depth = left.pop()
        if _is_leaf(node):
            yield name, node
        elif isinstance(node, (dict, list, tuple)):
            inner = [
                item
                for item in (node.items() if isinstance(node, dict) else enumerate(node))
                if isinstance(item[0], (str, int))
            ]
            seen += len(inner)
            if depth > DEEPEST or seen > MOST:
                raise Unreadable(
                    "the tensors are nested too deeply, or there are too many entries: save a plain state_dict."
                )
            left += [(f"{name}.{key}" if depth else str(key), value, depth + 1) for key, value in reversed(inner)]
