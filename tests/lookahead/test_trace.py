"""Reading traces: what is damaged or of another model is refused in one line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import foregate
from foregate.checkpoint.architecture import inspect_architecture
from foregate.checkpoint.source import load_config
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.lookahead.record import plan_trace, read_texts, record_trace
from foregate.lookahead.trace import Trace, TraceHeader
from foregate.model.generate import load_tokenizer


@pytest.fixture(scope="module")
def recorded(store: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    (folder / "t.txt").write_text("So we beat on, boats against the current.")
    model = foregate.load(store("mixtral"), memory="100%")
    texts = read_texts(load_tokenizer(str(store("mixtral"))), [folder / "t.txt"])
    path = record_trace(plan_trace(model, texts, window=16), folder / "trace")
    model.foregate.close()
    return path


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    """A trace that a test may damage."""
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def test_shapes_and_types(recorded: Path) -> None:
    trace = Trace(recorded)
    assert trace.model_type == "mixtral"
    assert trace.num_tokens == 32
    assert trace.tokens.shape == (32,)
    for index in range(3):
        assert (trace.inputs(index).shape, trace.inputs(index).dtype) == ((32, 64), torch.bfloat16)
        assert (trace.scores(index).shape, trace.scores(index).dtype) == ((32, 8), torch.bfloat16)
        assert (trace.chosen(index).shape, trace.chosen(index).dtype) == ((32, 2), torch.int16)


def test_writing_to_a_tensor_does_not_change_the_file(copy: Path) -> None:
    Trace(copy).inputs(0).zero_()
    assert Trace(copy).inputs(0).any()


def test_the_header_survives_json(recorded: Path) -> None:
    header = Trace(recorded).header
    assert TraceHeader.from_json(header.to_json()) == header


def test_matches_store_and_architecture_of_its_model_only(recorded: Path, store: Callable[[str], Path]) -> None:
    trace, layers = Trace(recorded), Store(store("mixtral")).layers
    trace.check_matches(layers)
    trace.check_matches(inspect_architecture(load_config(store("mixtral"))).layers)
    others = [Store(store("qwen3_moe")).layers, layers[:2], (replace(layers[0], top_k=1), *layers[1:])]
    for other in others:
        with pytest.raises(ForegateError, match="is the trace of another model"):
            trace.check_matches(other)


def test_folders_that_are_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ForegateError, match="no such trace"):
        Trace(tmp_path / "nowhere")
    with pytest.raises(ForegateError, match=r"is not a trace \(no trace.json\)"):
        Trace(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokens.i32", "embeddings.bf16", "inputs-001.bf16", "scores-000.bf16", "chosen-002.i16"]
)
def test_files_cut_short_or_missing(copy: Path, name: str) -> None:
    with (copy / name).open("r+b") as file:
        file.truncate(10)
    with pytest.raises(ForegateError, match=f"{name} is damaged: it has 10 bytes"):
        Trace(copy)
    (copy / name).unlink()
    with pytest.raises(ForegateError, match=f"{name} is damaged: it is missing"):
        Trace(copy)


def test_routers_cut_short_or_missing(copy: Path) -> None:
    file = copy / "routers.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ForegateError, match="routers.safetensors is damaged: the router of .* cannot be read"):
        Trace(copy).router(0)
    file.unlink()
    with pytest.raises(ForegateError, match="routers.safetensors is damaged: it is missing"):
        Trace(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"version": "1"},
        {"tokens": 31},
        {"layers": []},
        {"layers": [{"module": "x"}]},
        {"sequences": [[0, 16, 0], [17, 16, 0]]},
        {"sequences": [[0, 32, 1]]},
        {"sequences": [[0, 0, 0], [0, 32, 0]]},
        {"texts": None},
        {"surprise": 1},
        {"embedding_size": 0},
        {"backbone_parameters": None},
    ],
)
def test_damaged_headers(copy: Path, change: dict[str, Any]) -> None:
    header = json.loads((copy / "trace.json").read_text())
    (copy / "trace.json").write_text(json.dumps(header | change))
    with pytest.raises(ForegateError, match="not the header of a trace") as caught:
        Trace(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["64", 0, -64, None, 64.0])
def test_damaged_sizes_in_a_header(copy: Path, size: Any) -> None:
    header = json.loads((copy / "trace.json").read_text())
    header["layers"][1]["input_size"] = size
    (copy / "trace.json").write_text(json.dumps(header))
    with pytest.raises(ForegateError, match="not the header of a trace"):
        Trace(copy)


def test_a_newer_version_asks_for_an_update(copy: Path) -> None:
    header = json.loads((copy / "trace.json").read_text())
    (copy / "trace.json").write_text(json.dumps(header | {"version": 2}))
    with pytest.raises(ForegateError, match="trace version 2, this Foregate reads up to 1: update Foregate"):
        Trace(copy)
    (copy / "trace.json").write_text("[]")
    with pytest.raises(ForegateError, match="not the header of a trace"):
        Trace(copy)
