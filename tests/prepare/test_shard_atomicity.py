"""A split is written whole or not at all."""

from __future__ import annotations

import collections
import functools
import os

import pytest

from mqformer_jax.input.sources import ShardSource
from mqformer_jax.prepare import shards
from mqformer_jax.prepare.plan import Plan
from mqformer_jax.prepare.shard_writer import Built, Problems


def _number(stop, i):
    if i == stop:
        raise KeyboardInterrupt
    return Built(bytes([i]) * 2000, collections.Counter(), Problems())


def _plan(numbers, stop=None):
    return Plan("instances", (), list(numbers), functools.partial(_number, stop))


def _numbers(root):
    source = ShardSource(str(root), "toy", "train")
    return [source[i][0] for i in range(len(source))]


@pytest.fixture
def threes(monkeypatch):
    """Shards of three records."""
    monkeypatch.setattr(shards, "SHARD_IMAGES", 3)


def test_records_keep_their_order_across_shards(tmp_path, threes):
    report = shards.write_split(str(tmp_path), "toy", "train", _plan(range(20)))
    assert report.shards == 7 and _numbers(tmp_path) == list(range(20))
    assert sorted(os.listdir(tmp_path / "toy"))[0] == "dataset.json" and len(os.listdir(tmp_path / "toy")) == 9


def test_interrupted_preparation_leaves_no_set(tmp_path, threes):
    with pytest.raises(KeyboardInterrupt):
        shards.write_split(str(tmp_path), "toy", "train", _plan(range(20), stop=15))
    assert os.listdir(tmp_path / "toy") == ["train.partial"]
    with pytest.raises(FileNotFoundError):
        _numbers(tmp_path)


def test_interrupted_repeat_preparation_keeps_the_old_split(tmp_path, threes):
    shards.write_split(str(tmp_path), "toy", "train", _plan(range(5)))
    with pytest.raises(KeyboardInterrupt):
        shards.write_split(str(tmp_path), "toy", "train", _plan(range(20), stop=15))
    assert _numbers(tmp_path) == list(range(5))


class Killed(BaseException):
    """Nothing catches it."""


def test_kill_at_any_step_leaves_the_old_split_the_new_split_or_none(tmp_path, threes, monkeypatch):
    """Every call that changes a folder fails from the n-th on, as if the process were gone; 3 old shards give way to 4
    new ones.
    """
    old, new = list(range(9)), list(range(100, 112))
    steps = {name: getattr(os, name) for name in ("mkdir", "replace", "remove", "unlink", "rmdir")}
    left = None

    def step(name, *args, **kwargs):
        nonlocal left
        if left is not None:
            if not left:
                raise Killed
            left -= 1
        return steps[name](*args, **kwargs)

    monkeypatch.setattr(os, "fsync", lambda _: None)
    for name in steps:
        monkeypatch.setattr(os, name, functools.partial(step, name))
    seen = set()
    for survived in range(100):
        root = tmp_path / str(survived)
        shards.write_split(str(root), "toy", "train", _plan(old))
        left = survived
        try:
            shards.write_split(str(root), "toy", "train", _plan(new))
        except Killed:
            pass
        finished, left = left, None
        try:
            found = _numbers(root)
        except FileNotFoundError:
            found = None  # not prepared: the honest answer in between
        assert found in (old, None, new)
        seen.add(str(found))
        shards.write_split(str(root), "toy", "train", _plan(new))
        assert _numbers(root) == new and len(os.listdir(root / "toy")) == 6
        if finished:
            break
    assert seen == {str(old), str(None), str(new)} and 20 < survived < 99
