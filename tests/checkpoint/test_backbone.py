"""Conversion with a quantized backbone: which matrices, where they lie, resuming, verification."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import save_tiny, tiny_config
from safetensors.torch import load_file, save_file
from test_convert import digest

import foregate
from foregate.checkpoint.architecture import backbone_matrices, inspect_architecture
from foregate.checkpoint.backbone import BackboneJob
from foregate.checkpoint.store import MATRICES_FILE, Store
from foregate.errors import ForegateError

CONVERT = [sys.executable, "-m", "foregate.cli.main", "convert", "--backbone-bits", "4"]


@pytest.mark.parametrize(
    ("family", "chosen", "others"),
    [
        ("qwen2_moe", {"self_attn.q_proj", "mlp.shared_expert.up_proj"}, {"mlp.shared_expert_gate", "mlp.gate"}),
        ("deepseek_v3", {"self_attn.kv_b_proj", "mlp.gate_proj", "mlp.shared_experts.down_proj"}, {"mlp.gate"}),
        ("deepseek_v4", {"self_attn.q_b_proj"}, {"self_attn.o_a_proj"}),  # a linear module with a forward of its own
        ("zaya", {"self_attn.o_proj"}, {"mlp.gate.down_proj", "mlp.gate.router_mlp.fc1"}),
        ("gemma4_text", {"mlp.up_proj"}, {"router.proj"}),
    ],
)
def test_what_is_quantized(family: str, chosen: set[str], others: set[str]) -> None:
    found = backbone_matrices(inspect_architecture(tiny_config(family)))
    names = {name.split(".", 3)[3] for name in found.shapes}
    assert chosen <= names
    assert not others & names
    assert not found.kept


def test_weights_that_the_model_reads_itself_are_kept() -> None:
    found = backbone_matrices(inspect_architecture(tiny_config("jamba")))
    assert {name.split(".", 3)[3] for name in found.kept} == {"mamba.dt_proj"}


def test_towers_and_heads_are_left_alone() -> None:
    found = backbone_matrices(inspect_architecture(tiny_config("qwen3_vl_moe")))
    assert found.shapes
    assert all(name.startswith("model.language_model.layers.") for name in found.shapes)


def test_no_weight_is_lost_or_held_twice(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = Store(foregate.convert(checkpoint("mixtral"), tmp_path / "store", backbone_bits=8))
    source = {key for key in load_file(checkpoint("mixtral") / "model.safetensors") if ".experts." not in key}
    rest, matrices = load_file(store.backbone_path), load_file(store.matrices_path)  # ordinary safetensors files
    assert rest.keys() | {f"{name}.weight" for name in matrices} == source
    assert len(rest) + len(matrices) == len(source)
    assert (store.manifest.backbone_bits, store.manifest.backbone_quantizer) == (8, "refit")
    assert all(store.matrix_location(index)[0] % 64 == 0 for index in range(len(store.matrices)))


def test_at_16_bits_nothing_changes(store: Callable[[str], Path]) -> None:
    manifest = json.loads((store("mixtral") / "foregate.json").read_text())
    assert manifest["version"] == 1  # what older programs read
    assert manifest["backbone"].keys() == {"bytes", "sha256"}
    assert not (store("mixtral") / MATRICES_FILE).exists()


def test_killed_at_random_moments_it_ends_byte_identical(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("deepseek_v3", source)
    whole = digest(foregate.convert(source, tmp_path / "whole", backbone_bits=4))
    chance = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen([*CONVERT, source, tmp_path / "store"], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / "store.partial").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.08)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "store").exists():
            break
    if not (tmp_path / "store").exists():
        foregate.convert(source, tmp_path / "store", backbone_bits=4)
    assert digest(tmp_path / "store") == whole


def test_interrupted_between_matrices_it_goes_on_there(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digest(foregate.convert(checkpoint("mixtral"), tmp_path / "whole", backbone_bits=4))
    original, written = BackboneJob._write_matrix, []

    def write(self: BackboneJob, work: object, matrix: object, offset: int) -> str:
        if len(written) == 5:
            written.append(None)
            raise KeyboardInterrupt
        written.append(matrix.module)
        return original(self, work, matrix, offset)

    monkeypatch.setattr(BackboneJob, "_write_matrix", write)
    with pytest.raises(KeyboardInterrupt):
        foregate.convert(checkpoint("mixtral"), tmp_path / "store", backbone_bits=4)
    with pytest.raises(ForegateError, match="another source or other settings"):
        foregate.convert(checkpoint("mixtral"), tmp_path / "store", backbone_bits=8)
    foregate.convert(checkpoint("mixtral"), tmp_path / "store", backbone_bits=4)
    names = [name for name in written if name]
    assert len(names) == len(set(names)) == len(Store(tmp_path / "store").matrices)
    assert digest(tmp_path / "store") == whole


def test_verify_names_a_damaged_matrix(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = Store(foregate.convert(checkpoint("mixtral"), tmp_path / "store", backbone_bits=4))
    assert foregate.verify(store.path) == store.num_experts
    offset, nbytes = store.matrix_location(3)
    for place in (offset, offset + nbytes - 1):
        content = bytearray(store.matrices_path.read_bytes())
        content[place] ^= 1
        store.matrices_path.write_bytes(content)
        with pytest.raises(ForegateError, match=rf"is damaged: matrix {store.matrices[3].module};"):
            foregate.verify(store.path)
        content[place] ^= 1
        store.matrices_path.write_bytes(content)


def test_missing_or_foreign_matrices_are_noticed(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = foregate.convert(checkpoint("mixtral"), tmp_path / "store", backbone_bits=4)
    held = load_file(folder / MATRICES_FILE)
    save_file({**held, "extra": torch.zeros(64, dtype=torch.uint8)}, folder / MATRICES_FILE)
    with pytest.raises(ForegateError, match=r"matrices\.safetensors is damaged"):
        Store(folder)
    (folder / MATRICES_FILE).unlink()
    with pytest.raises(ForegateError, match=r"matrices\.safetensors is missing"):
        Store(folder)


def test_bits_that_no_backbone_has(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ForegateError, match="--backbone-bits 3: choose 16"):
        foregate.convert(checkpoint("mixtral"), tmp_path / "store", backbone_bits=3)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_not_a_number_is_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ForegateError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight has weights that are NaN"):
        foregate.convert(source, tmp_path / "store", backbone_bits=4)
    assert not (tmp_path / "store").exists()
