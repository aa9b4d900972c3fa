"""Conversion: lossless, streaming, resumable, all or nothing."""

import hashlib
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
from families import save_tiny, tiny_model
from safetensors.torch import load_file

import foregate
from foregate.checkpoint import convert as convert_module
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError

CONVERT = [sys.executable, "-m", "foregate.cli.main", "convert"]


def test_store_is_lossless(tmp_path: Path) -> None:
    model = tiny_model("mixtral").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    store = Store(foregate.convert(tmp_path / "source", tmp_path / "store"))
    expected = dict(model.named_parameters())
    records = load_file(store.experts_path)  # an ordinary safetensors file
    for layer in store.layers:
        for expert in range(layer.num_experts):
            for name, tensor in layer.layout.unpack(records[f"{layer.module}.{expert}"]).items():
                assert tensor.dtype == torch.bfloat16
                assert torch.equal(tensor, expected[f"{layer.module}.{name}"][expert])
    source, backbone = load_file(tmp_path / "source/model.safetensors"), load_file(store.backbone_path)
    assert backbone.keys() == {key for key in source if ".experts." not in key}
    assert all(torch.equal(backbone[key], source[key]) and backbone[key].dtype == source[key].dtype for key in backbone)


def test_records_are_aligned_for_direct_reads(store: Callable[[str], Path]) -> None:
    opened = Store(store("olmoe"))
    places = [opened.location((n, e)) for n, layer in enumerate(opened.layers) for e in range(layer.num_experts)]
    assert all(offset % 4096 == 0 and nbytes % 4096 == 0 for offset, nbytes in places)
    assert sorted(places) == places
    assert places[-1][0] + places[-1][1] == opened.experts_path.stat().st_size


def test_side_files_travel_and_code_does_not(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("mixtral"), source)
    (source / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (source / "training_args.bin").write_bytes(b"pickle")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    (source / "config.json").write_text(json.dumps(config))
    store = foregate.convert(source, tmp_path / "store")
    names = {path.name for path in store.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".py", ".bin")) for name in names)
    assert "auto_map" not in json.loads((store / "config.json").read_text())


def test_nothing_but_the_store_is_left(store: Callable[[str], Path]) -> None:
    folder = store("mixtral")
    assert not folder.with_name(folder.name + ".partial").exists()
    assert not {"journal.json", "lock"} & {path.name for path in folder.iterdir()}


def test_existing_destination_is_kept(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(ForegateError, match="exists already"):
        foregate.convert(checkpoint("mixtral"), tmp_path)
    assert (tmp_path / "precious").read_text() == "data"


def test_progress_ends_at_the_total(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    foregate.convert(
        checkpoint("mixtral"), tmp_path / "store", progress=lambda done, total: steps.append((done, total))
    )
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1] > 0


def test_interrupted_conversion_resumes_where_it_stopped(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    whole = digest(foregate.convert(checkpoint("olmoe"), tmp_path / "whole"))
    read: list[str] = []

    def interrupt_in_second_layer(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        foregate.convert(checkpoint("olmoe"), tmp_path / "store", progress=interrupt_in_second_layer)
    assert not (tmp_path / "store").exists()
    finished = len(json.loads((tmp_path / "store.partial/journal.json").read_text())["layers"])
    assert finished > 0
    original = convert_module._Job._write_layer

    def counting(self: object, work: object, index: int, advance: object) -> list[str]:
        read.append(str(index))
        return original(self, work, index, advance)

    convert_module._Job._write_layer = counting
    try:
        foregate.convert(checkpoint("olmoe"), tmp_path / "store")
    finally:
        convert_module._Job._write_layer = original
    assert read == [str(index) for index in range(finished, 3)]
    assert digest(tmp_path / "store") == whole


def test_unfinished_work_is_neither_mixed_nor_lost(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def stop_late(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        foregate.convert(checkpoint("olmoe"), tmp_path / "store", progress=stop_late)
    other = tmp_path / "other"
    tiny_model("olmoe", seed=5).save_pretrained(other)
    for source, bits in ((other, 16), (checkpoint("olmoe"), 4)):
        with pytest.raises(ForegateError, match="another source or other settings"):
            foregate.convert(source, tmp_path / "store", bits=bits)
    foregate.convert(checkpoint("olmoe"), tmp_path / "store")
    assert digest(tmp_path / "store") == digest(foregate.convert(checkpoint("olmoe"), tmp_path / "clean"))


def test_work_that_is_not_worth_resuming_leaves_no_trace(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Killed before the first layer was finished, then another source: nothing of the first gets into the store."""
    code = (
        "import os, sys, foregate; "
        "foregate.convert(sys.argv[1], sys.argv[2], progress=lambda done, total: os._exit(9) if done > 0 else None)"
    )
    done = subprocess.run([sys.executable, "-c", code, checkpoint("olmoe"), tmp_path / "store"])
    assert done.returncode == 9
    assert (tmp_path / "store.partial").exists()
    other = tmp_path / "other"
    tiny_model("olmoe", seed=5).save_pretrained(other)
    foregate.convert(other, tmp_path / "store")
    assert digest(tmp_path / "store") == digest(foregate.convert(other, tmp_path / "clean"))


def test_two_conversions_to_one_place_do_not_mix(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def convert_again(done: int, total: int) -> None:
        if done == total:
            with pytest.raises(ForegateError, match="another conversion"):
                foregate.convert(checkpoint("mixtral"), tmp_path / "store")

    foregate.convert(checkpoint("mixtral"), tmp_path / "store", progress=convert_again)
    assert foregate.verify(tmp_path / "store") == 24


def test_killed_at_random_moments_it_ends_byte_identical(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("mixtral", source)
    whole = digest(foregate.convert(source, tmp_path / "whole"))
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([*CONVERT, source, tmp_path / "store"], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / "store.partial").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "store").exists():
            break
    if not (tmp_path / "store").exists():
        subprocess.run([*CONVERT, source, tmp_path / "store"], check=True, stdout=subprocess.DEVNULL)
    assert digest(tmp_path / "store") == whole


def test_peak_memory_is_bounded_by_a_layer_not_by_the_model(tmp_path: Path) -> None:
    """A 630 MB checkpoint, whose bound (a 25 MB layer + 500 MiB) it exceeds, converts within the bound."""
    source = tmp_path / "source"
    layer_bytes = write_large_mixtral(source, layers=24, experts=8, hidden=512, inner=1024)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    bound = layer_bytes + 500 * 2**20
    assert total > bound
    code = (
        "import sys, foregate; from foregate.memory.process import peak_memory_bytes; "
        "foregate.convert(sys.argv[1], sys.argv[2]); print(peak_memory_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "store"], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < bound, f"peak {int(done.stdout) / 2**20:.0f} MiB"


def test_lack_of_space_is_said_before_anything_is_written(small_disk: Path, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ForegateError, match="MiB free and the store needs"):
        foregate.convert(checkpoint("mixtral"), small_disk / "store")
    assert not list(small_disk.iterdir())


def test_disk_that_fills_up_during_conversion_leaves_nothing_half_written(
    small_disk: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))
    with pytest.raises(ForegateError, match="disk of .* is full"):
        foregate.convert(checkpoint("mixtral"), small_disk / "store")
    assert not list(small_disk.iterdir())


def write_large_mixtral(folder: Path, layers: int, experts: int, hidden: int, inner: int) -> int:
    """A random bf16 Mixtral checkpoint, one shard a layer, written without holding the model; bytes of a MoE layer."""
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    folder.mkdir()
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=experts,
    )
    config.save_pretrained(folder)
    weight_map = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)

    for index in range(layers):
        prefix = f"model.layers.{index}"
        tensors = {
            f"{prefix}.{norm}_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16)
            for norm in ("input", "post_attention")
        }
        for name, rows in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = weight(rows, hidden)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = weight(experts, hidden)
        for expert in range(experts):
            for name, shape in (("w1", (inner, hidden)), ("w3", (inner, hidden)), ("w2", (hidden, inner))):
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = weight(*shape)
        save(f"model-{index:05}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": weight(256, hidden), "lm_head.weight": weight(256, hidden)}
    save("model-ends.safetensors", {**ends, "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return experts * 3 * inner * hidden * 2


def digest(store: Path) -> dict[str, str]:
    """SHA-256 of every file of a store."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(store.iterdir())}
