"""Conversion with a trace: lower output errors for every kind of expert, refusals, resumption."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import digest
from torch.nn import functional
from typer.testing import CliRunner

import foregate
from foregate.checkpoint.architecture import inspect_architecture
from foregate.checkpoint.inflate import inflate
from foregate.checkpoint.source import open_checkpoint
from foregate.checkpoint.store import Store
from foregate.cli.main import app
from foregate.errors import ForegateError
from foregate.kernels.reference import expert_mlp
from foregate.lookahead.record import plan_trace, read_texts, record_trace
from foregate.lookahead.trace import Trace
from foregate.model.generate import load_tokenizer
from foregate.quantize.matrix import QuantizedMatrix

Folder = Callable[[str], Path]
TEXT = Path(__file__).read_text()  # a few thousand bytes, each a token


@pytest.fixture(scope="module")
def trace(store: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """trace(family): folder of a trace of the tiny model. Not to be changed by a test."""
    made: dict[str, Path] = {}

    def make(family: str, text: str = TEXT) -> Path:
        key = family + text[:8]
        if key not in made:
            folder = tmp_path_factory.mktemp("traces")
            (folder / "text.txt").write_text(text)
            model = foregate.load(store(family), memory="100%", threads=1)
            texts = read_texts(load_tokenizer(str(store(family))), [folder / "text.txt"])
            made[key] = record_trace(plan_trace(model, texts, window=128, max_tokens=4096), folder / "trace")
            model.foregate.close()
        return made[key]

    return make


def expert_weights(path: Path) -> list[list[dict[str, torch.Tensor]]]:
    """Parameters of every expert, float32."""
    store = Store(path)
    records = load_file(store.experts_path)
    return [
        [
            {
                name: w.dequantize() if isinstance(w, QuantizedMatrix) else w.float()
                for name, w in layer.layout.unpack(records[f"{layer.module}.{expert}"]).items()
            }
            for expert in range(layer.num_experts)
        ]
        for layer in store.layers
    ]


def output_error(path: Path, original: Path, checkpoint: Path, trace: Trace) -> float:
    """Norm of the difference of all experts' outputs over their norm, on the tokens that chose them."""
    model = inspect_architecture(open_checkpoint(checkpoint).config).model
    error = size = 0.0
    found, wanted = expert_weights(path), expert_weights(original)
    for index, layer in enumerate(Store(path).layers):
        experts = model.get_submodule(layer.module)
        for expert in range(layer.num_experts):
            tokens = trace.expert_inputs(index)[(trace.chosen(index) == expert).any(1)].float()
            a, b = (expert_mlp(tokens, w[index][expert], experts, functional.linear) for w in (found, wanted))
            error, size = error + float((a - b).square().sum()), size + float(b.square().sum())
    return (error / size) ** 0.5


# Gated; biases and clamps; groups of experts; no gate; experts whose input is not the router's.
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "gemma4_text"])
def test_output_error_falls(family: str, checkpoint: Folder, store: Folder, trace: Folder, tmp_path: Path) -> None:
    folder = trace(family)
    options = {"plain": {}, "refit": {"quantizer": "refit", "trace": folder}, "gptq": {"trace": folder}}
    errors = {}
    for name, chosen in options.items():
        path = foregate.convert(checkpoint(family), tmp_path / name, bits=3, **chosen)
        errors[name] = output_error(path, store(family), checkpoint(family), Trace(folder))
    assert Store(path).manifest.quantizer == "gptq"
    assert errors["refit"] < 0.98 * errors["plain"]
    assert errors["gptq"] < 0.85 * errors["plain"]


def test_the_manifest_names_the_trace(checkpoint: Folder, trace: Folder, tmp_path: Path) -> None:
    made = Store(foregate.convert(checkpoint("mixtral"), tmp_path / "a", bits=4, trace=trace("mixtral"))).manifest
    recorded = Trace(trace("mixtral"))
    assert made.calibration is not None
    assert made.calibration.tokens == recorded.num_tokens
    assert made.calibration.texts == (("text.txt", recorded.texts[0].sha256),)
    plain = foregate.convert(checkpoint("mixtral"), tmp_path / "b", bits=4)
    assert Store(plain).manifest.calibration is None
    assert "calibration" not in json.loads((plain / "foregate.json").read_text())["quantization"]


def test_an_expert_that_no_token_chose(checkpoint: Folder, store: Folder, trace: Folder, tmp_path: Path) -> None:
    """It is quantized for the layer's other tokens, and not worse than without a trace."""
    edited = Path(shutil.copytree(trace("mixtral"), tmp_path / "edited"))
    chosen = Trace(edited).chosen(1).clone()
    chosen[chosen == 3] = 4
    (edited / "chosen-001.i16").write_bytes(chosen.numpy().tobytes())
    plain = foregate.convert(checkpoint("mixtral"), tmp_path / "plain", bits=3)
    made = foregate.convert(checkpoint("mixtral"), tmp_path / "made", bits=3, trace=edited)
    experts = inspect_architecture(open_checkpoint(checkpoint("mixtral")).config).model.get_submodule(
        Store(made).layers[1].module
    )
    tokens = Trace(edited).expert_inputs(1).float()
    found, without, wanted = (
        expert_mlp(tokens, expert_weights(path)[1][3], experts, functional.linear)
        for path in (made, plain, store("mixtral"))
    )
    assert (found - wanted).norm() < (without - wanted).norm()


def test_zero_weights_and_inputs_that_reach_nothing(checkpoint: Folder, trace: Folder, tmp_path: Path) -> None:
    """Matrices and whole groups of zeros, and an expert whose inner activations are all zero."""
    source = Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.experts"
    tensors[f"{prefix}.0.w1.weight"].zero_()
    tensors[f"{prefix}.1.w2.weight"].zero_()
    tensors[f"{prefix}.2.w3.weight"][:, :32] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for name, options in (("plain", {}), ("traced", {"trace": trace("mixtral")})):
        experts = expert_weights(foregate.convert(source, tmp_path / name, bits=2, **options))[1]
        assert not experts[1]["down_proj"].any()
        assert not experts[0]["gate_up_proj"][: len(tensors[f"{prefix}.0.w1.weight"])].any()
        assert all(torch.isfinite(weight).all() for expert in experts for weight in expert.values())
        assert torch.allclose(experts[0]["down_proj"], tensors[f"{prefix}.0.w2.weight"].float(), atol=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("tensor", "name"), [("w1", "gate_up_proj"), ("w2", "down_proj")])
def test_weights_that_are_not_numbers_are_named(
    checkpoint: Folder, trace: Folder, tmp_path: Path, value: float, tensor: str, name: str
) -> None:
    source = Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.0.block_sparse_moe.experts.6.{tensor}.weight"][3, 4] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ForegateError, match=rf"{name} of expert 6 of model\.layers\.0.* has weights that are NaN"):
        foregate.convert(source, tmp_path / "store", bits=4, trace=trace("mixtral"))
    assert not list(tmp_path.glob("store*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "quantizer": "gptq"}, "gptq needs real inputs: record them with foregate trace and name --trace"),
        ({"bits": 4, "quantizer": "hqq", "trace": "own"}, "hqq makes no use of --trace: choose refit or gptq"),
        ({"bits": 4, "quantizer": "rtn", "trace": "own"}, "rtn makes no use of --trace: choose refit or gptq"),
        ({"bits": 16, "trace": "own"}, "name --bits 8, 4, 3 or 2"),
        ({"bits": 4, "trace": "other"}, "is the trace of another model"),
        ({"bits": 4, "trace": "none"}, "no such trace"),
    ],
)
def test_refusals(options: dict, message: str, checkpoint: Folder, trace: Folder, tmp_path: Path) -> None:
    if "trace" in options:
        places = {"own": trace("mixtral"), "other": trace("nemotron_h"), "none": tmp_path / "nowhere"}
        options = {**options, "trace": places[options["trace"]]}
    with pytest.raises(ForegateError, match=message) as caught:
        foregate.convert(checkpoint("mixtral"), tmp_path / "store", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("store*"))


def test_the_trace_of_a_narrower_model(checkpoint: Folder, trace: Folder, tmp_path: Path) -> None:
    wide = inflate(checkpoint("mixtral"), tmp_path / "wide", hidden=128, ffn=96)
    with pytest.raises(ForegateError, match="another model, whose experts read 64 values instead of 128: record one"):
        foregate.convert(wide, tmp_path / "store", bits=4, trace=trace("mixtral"))
    assert not list(tmp_path.glob("store*"))


def test_resumed_or_with_other_threads_it_writes_the_same(checkpoint: Folder, trace: Folder, tmp_path: Path) -> None:
    options = {"bits": 3, "trace": trace("mixtral")}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = digest(foregate.convert(checkpoint("mixtral"), tmp_path / "whole", **options))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

    def stop_late(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        foregate.convert(checkpoint("mixtral"), tmp_path / "store", **options, progress=stop_late)
    other = trace("mixtral", text="another text " * 200)
    for changed in ({"bits": 3, "trace": other}, {"bits": 3, "quantizer": "refit", **options}, {"bits": 3}):
        with pytest.raises(ForegateError, match="another source or other settings"):
            foregate.convert(checkpoint("mixtral"), tmp_path / "store", **changed)
    foregate.convert(checkpoint("mixtral"), tmp_path / "store", **options)
    assert digest(tmp_path / "store") == whole


def test_on_the_command_line(checkpoint: Folder, trace: Folder, tmp_path: Path) -> None:
    arguments = ["convert", str(checkpoint("mixtral")), str(tmp_path / "s"), "--bits", "2", "--trace"]
    done = CliRunner().invoke(app, [*arguments, str(trace("mixtral"))])
    assert done.exit_code == 0, done.output
    manifest = Store(tmp_path / "s").manifest
    assert (manifest.bits, manifest.quantizer) == (2, "gptq")
