"""Shared fixtures: tiny checkpoints and their stores, made once per test process."""

import gc
import os
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its kernels then run in NumPy
    os.environ.setdefault("TRITON_INTERPRET", "1")

from families import save_byte_tokenizer, save_tiny
from hypothesis import settings
from transformers.utils import logging

import foregate

DEMO = Path(__file__).parents[1] / "demo"

settings.register_profile("here", deadline=None)  # a busy machine is no failure
settings.load_profile("here")
logging.disable_progress_bar()
torch.set_num_threads(1)  # test processes share the cores


def pytest_collection_finish() -> None:
    """Libraries and tests stay: every model that is loaded collects garbage, and need not look through them."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(family): folder of a tiny random checkpoint with a tokenizer. Not to be changed by a test."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("checkpoints") / family
            save_tiny(family, made[family])
            save_byte_tokenizer(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def store(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """store(family): folder of the converted tiny checkpoint. Not to be changed by a test."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = foregate.convert(checkpoint(family), tmp_path_factory.mktemp("stores") / family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a demo model, with its gates. Not to be changed by a test."""
    return foregate.convert(DEMO / "mixtral-tiny", tmp_path_factory.mktemp("demo") / "store", bits=4)


@pytest.fixture(scope="session")
def demo_trace(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of 128 tokens by the demo model, of two texts in turns."""
    from foregate.lookahead.record import plan_trace, read_texts, record_trace
    from foregate.model.generate import load_tokenizer

    texts = read_texts(load_tokenizer(str(demo_store)), [DEMO / "text/bible.txt", DEMO / "text/python.txt"])
    model = foregate.load(demo_store, memory="100%", policy="lru", threads=1)
    with closing(model.foregate):
        plan = plan_trace(model, texts, window=32, max_tokens=128, generate=0, seed=0)
        return record_trace(plan, tmp_path_factory.mktemp("demo") / "trace")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)
