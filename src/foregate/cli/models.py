"""From the model that a command is given to a store: as it is, or converted into the cache on first use."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from foregate.config import CacheConfig
from foregate.errors import ForegateError
from foregate.sizes import format_bytes

if TYPE_CHECKING:
    from foregate.checkpoint.cache import CachedModel


def open_model(model: str, bits: int | None, yes: bool) -> Path:
    """The folder of a checked store: `model` itself, or the store of the checkpoint or hub id `model`.

    A checkpoint without one is converted now, at `bits` (None: the default), if `yes` or a person at the terminal
    agrees. Raises ForegateError when nobody can be asked, and for what is no model at all.
    """
    from foregate.checkpoint.source import STORE_MANIFEST
    from foregate.checkpoint.store import Store

    path = Path(model).expanduser()
    if not (path / STORE_MANIFEST).is_file():
        path = _converted(model, CacheConfig.bits if bits is None else bits, yes)
        bits = None
    held = Store(path).manifest.bits  # what is wrong with the folder is said before anything is loaded
    if bits not in (None, held):
        raise ForegateError(f"{model} is a store of {held} bits: leave --bits out, or name the checkpoint")
    return path


def _converted(model: str, bits: int, yes: bool) -> Path:
    from foregate.checkpoint.cache import CachedModel

    cached = CachedModel(model, bits)
    store = cached.store()
    if store is None:
        if not yes:
            _ask(model, bits, cached.checkpoint)
        store = _convert(cached)
        print(f"{model}: converted to {store}", file=sys.stderr)
    return store


def _ask(model: str, bits: int, checkpoint: Path | None) -> None:
    """Ask the person at the terminal. Raises ForegateError where there is none, and for a no."""
    from foregate.checkpoint.cache import FOLDER_VARIABLE, cache_folder

    if checkpoint is None:
        what = f"there is no folder {model}; as a hub id it would be downloaded and converted once, to {bits} bits"
    else:
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        what = f"{model} is a checkpoint of {format_bytes(size)}, to be converted once, to {bits} bits"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ForegateError(f"{what}: add --yes to do that, or convert it yourself: foregate convert {model} DST")
    folder = cache_folder()
    free = shutil.disk_usage(next(parent for parent in folder.parents if parent.exists())).free
    where = f"into {folder} ({format_bytes(free)} free; {FOLDER_VARIABLE} names another folder)"
    if not typer.confirm(f"{what}, {where}.\nGo on?", default=True, err=True):
        raise ForegateError(f"nothing was converted: name a store, or run foregate convert {model} DST")


def _convert(cached: CachedModel) -> Path:
    from foregate.cli.progress import byte_progress
    from foregate.memory.process import forget_peak_memory, return_unused_memory

    def waiting() -> None:
        print(f"{cached.source}: another process is converting it, waiting for that one", file=sys.stderr)

    with byte_progress("converting") as progress:
        store = cached.convert(progress, waiting)
    return_unused_memory()
    forget_peak_memory()  # a run's figures are those of the run
    return store
