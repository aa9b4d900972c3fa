"""Stores converted on first use: where they lie, and that they are made once whatever happens meanwhile."""

import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import foregate
from foregate import ForegateError
from foregate.checkpoint.cache import CachedModel, cache_folder, fingerprint


def silent(done: int, total: int) -> None:
    pass


def never() -> None:
    raise AssertionError("nobody else is at it")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a test."""
    monkeypatch.setenv("FOREGATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


@pytest.fixture
def model(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return shutil.copytree(checkpoint("mixtral"), tmp_path / "my model")


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    assert cache_folder() == folder
    monkeypatch.delenv("FOREGATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/foregate/stores"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/foregate/stores"


def test_a_checkpoint_is_converted_once(model: Path, folder: Path) -> None:
    cached = CachedModel(str(model), 4)
    assert cached.store() is None
    store = cached.convert(silent, never)
    assert store == cached.store()
    assert store.name.startswith("my_model-4-")
    assert foregate.verify(store) == 24
    made = store.stat()
    assert cached.convert(silent, never) == store
    assert store.stat() == made
    assert list(folder.iterdir()) == [store], "neither locks nor unfinished work"


def test_bits_and_changes_name_another_store(model: Path) -> None:
    names = {fingerprint(model)}
    assert fingerprint(model) in names
    os.utime(model / "model.safetensors", (1, 1))
    names.add(fingerprint(model))
    (model / "generation_config.json").write_text("{}")
    names.add(fingerprint(model))
    names.add(fingerprint(shutil.copytree(model, model.parent / "elsewhere")))
    assert len(names) == 4
    (model / "README.md").write_text("no conversion reads this")
    assert fingerprint(model) in names
    four = CachedModel(str(model), 4).convert(silent, never)
    assert CachedModel(str(model), 8).store() is None
    assert CachedModel(str(model), 4).store() == four
    os.utime(model / "model.safetensors", (2, 2))
    assert CachedModel(str(model), 4).store() is None


def test_an_interrupted_conversion_goes_on(model: Path, folder: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total * 0.8:
            raise KeyboardInterrupt

    cached, seen = CachedModel(str(model), 8), []
    with pytest.raises(KeyboardInterrupt):
        cached.convert(interrupt, never)
    assert cached.store() is None
    assert next(folder.glob("*.partial")).is_dir()
    store = cached.convert(lambda done, total: seen.append(done / total), never)
    assert foregate.verify(store) == 24
    assert len(set(seen)) < 24, "experts of finished layers are not done again"
    assert list(folder.iterdir()) == [store]


def test_who_comes_second_waits(model: Path) -> None:
    cached, waiting = CachedModel(str(model), 4), threading.Event()
    path = cached._path(model)
    path.parent.mkdir(parents=True)
    results: list[Path] = []
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: results.append(cached.convert(silent, waiting.set)))
        second.start()
        assert waiting.wait(20)
        assert results == []
        first = foregate.convert(model, path, bits=4)  # what the holder of the lock does
        made = first.stat()
    second.join(20)
    assert results == [first]
    assert first.stat() == made


def test_a_hub_id_that_was_downloaded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = CachedModel("someone/tiny", 4)
    assert cached.checkpoint is None
    assert cached.store() is None
    held = tmp_path / "hub/models--someone--tiny"
    (held / "refs").mkdir(parents=True)
    (held / "refs/main").write_text("0" * 40)
    shutil.copytree(model, held / "snapshots" / ("0" * 40))
    store = cached.convert(silent, never)
    assert store == cached.store()
    assert store.name.startswith("someone--tiny-4-")


def test_what_cannot_be_cached_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ForegateError, match="no such store or checkpoint"):
        CachedModel(str(tmp_path / "no/where"), 4).store()
    with pytest.raises(ForegateError, match="neither a store"):
        CachedModel(str(tmp_path), 4).store()
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOREGATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ForegateError, match="name another folder in FOREGATE_CACHE"):
        CachedModel(str(model), 4).convert(silent, never)


def test_a_full_disk_is_said_before_anything_is_written(
    model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREGATE_CACHE", str(small_disk))
    with pytest.raises(ForegateError, match="MiB free"):
        CachedModel(str(model), 16).convert(silent, never)
    assert not list(small_disk.rglob("*.partial"))
