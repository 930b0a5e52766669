"""Read the pickles in checkpoints without torch and without running the functions that they name.

A pickle is a program that may call any function by name. Here, only the names in the table `KNOWN` are allowed. The
table maps them to placeholders and harmless functions. Any other name is an error.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import ml_dtypes
import numpy as np

# Largest number of elements of a tensor that repeats stored elements. Without a limit, a small file could fill memory.
LARGEST_REPEATED = 1 << 26


class Unreadable(ValueError):
    """Raised for a file that cannot be read. The message says what is wrong and what to do, without the file's name."""


_NUMPY = "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128"
DTYPES = {name: np.dtype(name) for name in _NUMPY.split()} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
OLD_NAMES = dict(double="float64", float="float32", half="float16", long="int64", int="int32", short="int16")
STORAGES = dict(
    Double="float64", Float="float32", Half="float16", BFloat16="bfloat16", Long="int64", Int="int32", Short="int16",
    Char="int8", Byte="uint8", Bool="bool", ComplexFloat="complex64", ComplexDouble="complex128", Untyped="uint8",
)  # fmt: skip


class Storage:
    """A placeholder for a torch storage, which holds the elements of tensors. Its bytes, `raw`, are set later."""

    def __init__(self, dtype: np.dtype, key: str, count: int):
        self.dtype, self.key, self.count = dtype, key, count
        self.raw: Any = None


class Tensor:
    """A placeholder for a torch tensor in a pickle. Shape, strides and offset are in elements."""

    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple, dtype: np.dtype | None = None):
        self.storage, self.offset, self.shape, self.strides, self.dtype = (
            storage,
            offset,
            tuple(shape),
            tuple(strides),
            dtype,
        )

    def array(self) -> np.ndarray:
        """Return the tensor as a view of its storage.

        numpy raises an error if the view exceeds the storage. Raises Unreadable if the view repeats too many elements.
        """
        dtype = self.dtype or self.storage.dtype
        strides = [stride * dtype.itemsize for stride in self.strides]
        array = np.ndarray(self.shape, dtype, self.storage.raw, self.offset * dtype.itemsize, strides)
        if array.size > max(self.storage.count, LARGEST_REPEATED):
            raise Unreadable(
                f"an expanded tensor of shape {self.shape} has {array.size} elements, but the file stores only "
                f"{self.storage.count}: call .contiguous() on it before torch.save."
            )
        return array


class Array:
    """A placeholder for a numpy array in a pickle. It stores the bytes, from which `array()` makes the array."""

    def __init__(self, raw: Any = b"", dtype: Any = None, shape: tuple = (), order: str = "C"):
        self.raw, self.dtype, self.shape, self.order = raw, dtype, shape, order

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, fortran, self.raw = state
        self.order = "F" if fortran else "C"

    def array(self) -> np.ndarray:
        raw = self.raw.encode("latin1") if isinstance(self.raw, str) else self.raw  # Python 2 pickles bytes as text
        return np.ndarray(self.shape, self.dtype.numpy(), raw, order=self.order)


class ArrayType:
    """A placeholder for a numpy dtype in a pickle.

    code: numpy's letter of the type and the size in bytes, e.g. "f4". `__setstate__` sets the byte order.
    """

    def __init__(self, code: str, *flags: Any):
        self.code, self.byte_order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]

    def numpy(self) -> np.dtype:
        if not re.fullmatch(r"[fiubc]\d+", self.code):
            raise Unreadable(f"an array has the numpy type '{self.code}', which is not numeric: save only the weights.")
        return np.dtype(self.code).newbyteorder(self.byte_order)


class Ordered(dict):
    """A placeholder for collections.OrderedDict. It ignores the attributes that torch adds."""

    def __setstate__(self, state: Any) -> None:
        pass


class Module(dict):
    """A placeholder for a TorchScript module: a dictionary of its attributes. kind: the name of its class."""

    kind = ""

    def __setstate__(self, state: Any) -> None:
        self.update(state)


class Inert:
    """A placeholder for an object in a training checkpoint that holds no weights.

    Its methods accept any arguments and store nothing.
    """

    def __init__(self, *args: Any):
        pass

    def swallow(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = swallow

    def __new__(cls, *args: Any) -> Inert:
        return object.__new__(cls)


def _rebuild(
    storage: Storage, offset: int, shape: tuple, strides: tuple, grad: Any = None, hooks: Any = None, bits: Any = None
) -> Tensor:
    if bits:
        raise Unreadable(
            "a tensor has a pending negation or conjugation: call .resolve_neg().resolve_conj() before torch.save."
        )
    return Tensor(storage, offset, shape, strides)


def _rebuild_typed(
    storage: Storage,
    offset: int,
    shape: tuple,
    strides: tuple,
    grad: Any,
    hooks: Any,
    dtype: np.dtype,
    bits: Any = None,
) -> Tensor:
    tensor = _rebuild(storage, offset, shape, strides, grad, hooks, bits)
    tensor.dtype = dtype
    return tensor


def _first(value: Any, *rest: Any) -> Any:
    return value


def _encode(text: str, encoding: str) -> bytes:
    return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])


KNOWN = {
    "collections.OrderedDict": Ordered,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": tuple,
    "torch.device": Inert,
    "_codecs.encode": _encode,
    "numpy.ndarray": Inert,  # an argument of _reconstruct, which is ignored
    "numpy.dtype": ArrayType,
    # TorchScript's typed lists and dictionaries
    **{
        f"torch.jit._pickle.{name}": _first
        for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
    },
    "torch.jit._pickle.restore_type_tag": _first,
    # objects that trainers save beside the weights
    **{f"{module}.set": Inert for module in ("builtins", "__builtin__")},
    "argparse.Namespace": Inert,
    "collections.Counter": Inert,
    "yacs.config.CfgNode": Inert,
}
for _numpy in ("numpy.core", "numpy._core"):
    KNOWN[f"{_numpy}.multiarray._reconstruct"] = lambda *args: Array()
    KNOWN[f"{_numpy}.multiarray.scalar"] = Inert
    KNOWN[f"{_numpy}.numeric._frombuffer"] = Array
for _name, _dtype in STORAGES.items():
    for _module in ("torch", "torch.cuda", "torch.storage"):
        KNOWN[f"{_module}.{_name}Storage"] = DTYPES[_dtype]
for _name in (*DTYPES, *OLD_NAMES):
    KNOWN[f"torch.{_name}"] = DTYPES[OLD_NAMES.get(_name, _name)]


class Unpickler(pickle._Unpickler):
    """An unpickler that allows only the names in `KNOWN` and TorchScript's modules.

    It extends pickle's Python implementation. The C implementation allocates memory for any memo index in the file, no
    matter how large.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}
        self.modules: list[Module] = []

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return type("Module", (Module,), {"kind": f"{module}.{name}"})
        try:
            return KNOWN[f"{module}.{name}"]
        except KeyError:
            raise Unreadable(
                f"refused to run {module}.{name} from the file, since weights need no code: "
                "if you trust the file, load it with the program that made it and save only the weights."
            ) from None

    def persistent_load(self, saved: tuple) -> Storage:
        kind, dtype, key, _, count, *view = saved
        storage = self.storages.setdefault(key, Storage(dtype, key, count))
        if kind != "storage" or any(view) or not isinstance(dtype, np.dtype) or storage.dtype != dtype:
            raise Unreadable(
                "it holds a torch object that is not a plain tensor: load it with torch and save only the state_dict."
            )
        return storage

    def load_build(self) -> None:
        """Set the state of a placeholder with its `__setstate__`. Raises Unreadable for any other object.

        pickle's own method also sets attributes that the file names, which could alter the placeholder classes.
        """
        state, built = self.stack.pop(), self.stack[-1]
        if not isinstance(built, (Array, ArrayType, Ordered, Module, Inert)):
            raise Unreadable(
                f"the pickle sets attributes of a {type(built).__name__}: "
                "load the file with torch and save only the state_dict."
            )
        built.__setstate__(state)
        if isinstance(built, Module):
            self.modules.append(built)

    def load_global(self) -> None:
        """Read a global name like pickle's own method, but raise EOFError if the name is truncated."""
        module, name = self.readline(), self.readline()
        if not name.endswith(b"\n"):
            raise EOFError("the pickle ends inside a name")
        self.append(self.find_class(module[:-1].decode(), name[:-1].decode()))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.GLOBAL[0]] = load_global
