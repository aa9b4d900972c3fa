"""`foregate inspect`: what it says against what the model itself says once it is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import foregate
from foregate.checkpoint.store import Store
from foregate.describe import describe

DEMO = Path(__file__).parents[2] / "demo"
Run = Callable[..., str]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_parameters_are_those_of_the_model(checkpoint: Callable[[str], Path], family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    facts = describe(str(checkpoint(family)))
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["parameters"]["experts"] == sum(p.numel() for p in experts)
    assert facts["model"]["class"] == type(model).__name__
    assert facts["experts_per_layer"] == [8, 8]
    unused = (1 - facts["top_k"] / 8) * facts["parameters"]["experts"]
    assert facts["parameters"]["per_token"] == facts["parameters"]["total"] - unused


@pytest.mark.parametrize("bits", [16, 3])
def test_a_store_has_the_sizes_foretold(checkpoint: Callable[[str], Path], tmp_path: Path, bits: int) -> None:
    foretold = describe(str(checkpoint("gpt_oss")))
    store = Store(foregate.convert(checkpoint("gpt_oss"), tmp_path / "store", bits=bits, backbone_bits=8))
    facts = describe(str(store.path))
    assert facts["bytes"]["experts"] == store.experts_path.stat().st_size - store.location((0, 0))[0]
    assert facts["bytes"]["backbone"] == store.backbone_path.stat().st_size + store.matrices_bytes
    if bits == 3:  # the tiny checkpoint is in float32, which 16 bits keep
        assert facts["bytes"]["experts"] == foretold["as_store"]["3"]["experts"]
        assert facts["bytes"]["record"] == foretold["as_store"]["3"]["record"]
    for fact in ("parameters", "moe_layers", "experts", "top_k", "model", "chat_template", "gates"):
        assert facts[fact] == foretold[fact]
    assert (facts["bits"], facts["backbone_bits"], facts["backbone_quantizer"]) == (bits, 8, "refit")


def test_the_demo_as_text_and_json(prints: Run, demo_store: Path) -> None:
    lines = dict(line.split(maxsplit=1) for line in prints("inspect", demo_store).splitlines())
    assert lines["model"] == "MixtralForCausalLM (mixtral)"
    assert lines["experts"] == "96: 12 MoE layers of 8, 2 used per token"
    assert lines["gates"].startswith("3 layers ahead, width 512, 4.5 MiB, recall 0.93 / 0.88 / 0.8")
    facts = json.loads(prints("inspect", demo_store, "--json"))
    assert facts["kind"] == "store"
    recalls = [s["recall"][0] for s in sources(demo_store) if s["name"] != "token"]
    assert min(recalls) <= facts["gates"]["recall"][0] <= max(recalls)
    assert "at 4 bits" in prints("inspect", DEMO / "mixtral-tiny")


def sources(store: Path) -> list[dict]:
    from foregate.lookahead.gates import LookaheadGates

    return LookaheadGates.load(store / "lookahead.safetensors", Store(store).layers).header.trained["sources"]


def test_what_is_damaged_is_said(
    fails: Run, checkpoint: Callable[[str], Path], demo_store: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint("mixtral"), tmp_path / "model")
    with (model / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    assert "model.safetensors" in fails("inspect", model)
    (model / "model.safetensors").unlink()
    assert "has no model.safetensors" in fails("inspect", model)
    store = shutil.copytree(demo_store, tmp_path / "store")
    (store / "lookahead.safetensors").write_bytes(b"\0" * 64)
    assert "train the gates again" in fails("inspect", store)
    (store / "experts.safetensors").unlink()
    assert "experts.safetensors is missing" in fails("inspect", store)
    assert "no such store or checkpoint" in fails("inspect", tmp_path / "nowhere")
