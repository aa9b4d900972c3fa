"""Bad input: one clear line that names the place and the mend, nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import save_byte_tokenizer, save_tiny
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import foregate
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError

Folder = Callable[[str], Path]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny checkpoint that the test may damage."""
    save_tiny("mixtral", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def converted(store: Folder, tmp_path: Path) -> Path:
    """A store that the test may damage."""
    return Path(shutil.copytree(store("mixtral"), tmp_path / "store"))


def refused(source: Path | str, tmp_path: Path, match: str) -> None:
    """Converting `source` fails with one line that matches, and leaves nothing behind."""
    with pytest.raises(ForegateError, match=match) as caught:
        foregate.convert(source, tmp_path / "made.store")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("made.store*"))


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, "no such folder: .*nowhere")


def test_hub_id_while_offline(tmp_path: Path) -> None:
    refused("some-team/some-moe", tmp_path, "nor could it be downloaded as a hub id")


def test_file_instead_of_folder(source: Path, tmp_path: Path) -> None:
    refused(source / "config.json", tmp_path, "is a file: name the folder")


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "no config.json")


def test_broken_config(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{")
    refused(source, tmp_path, r"config\.json.*JSON")


def test_unknown_family_with_code_of_its_own(source: Path, tmp_path: Path) -> None:
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "code.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "code.py").write_text("raise SystemExit('ran')")
    refused(source, tmp_path, "code inside a checkpoint is never run")


def test_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    refused(tmp_path / "dense", tmp_path, "LlamaForCausalLM .* is not a Mixture-of-Experts model")


def test_pickled_weights(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(source, tmp_path, "pickled weights .*pytorch_model.bin")


def test_no_weights(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    refused(source, tmp_path, "no model.safetensors")


def test_truncated_weights(source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(source, tmp_path, "truncated")


def test_missing_shard(source: Path, tmp_path: Path) -> None:
    weight_map = dict.fromkeys(load_file(source / "model.safetensors"), "model-00001-of-00002.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(source, tmp_path, "model-00001-of-00002.safetensors is missing")


def test_index_that_points_elsewhere(source: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../source/model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path, "outside its folder")


def test_missing_expert(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.layers.1.block_sparse_moe.experts.3.w1.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, "7 of 8 experts .*model.layers.1")


def test_missing_backbone_weight(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path, "no tensor for model.layers.1.self_attn.q_proj.weight")


def test_weights_of_another_size(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    refused(source, tmp_path, "do not belong together")


def test_quantized_checkpoint(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path, "quantized already .gptq.")


def test_converting_a_store(converted: Path, tmp_path: Path) -> None:
    refused(converted, tmp_path, "a Foregate store already")


# -- stores -----------------------------------------------------------------------------------------------------------


def test_loading_a_checkpoint_as_a_store(source: Path) -> None:
    with pytest.raises(ForegateError, match="not a Foregate store .*convert it first"):
        foregate.load(source)


def test_no_such_store(tmp_path: Path) -> None:
    with pytest.raises(ForegateError, match="no such store"):
        foregate.load(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["experts.safetensors", "model.safetensors"])
def test_store_cut_short(converted: Path, file: str) -> None:
    path = converted / file
    path.write_bytes(path.read_bytes()[:-4096])
    for use in (foregate.load, foregate.verify):
        with pytest.raises(ForegateError, match=f"{file} is truncated"):
            use(converted)


def test_store_without_experts_file(converted: Path) -> None:
    (converted / "experts.safetensors").unlink()
    with pytest.raises(ForegateError, match=r"experts\.safetensors is missing"):
        foregate.load(converted)


def test_one_flipped_byte_is_found(converted: Path) -> None:
    store = Store(converted)
    offset, _ = store.location((1, 5))
    with store.experts_path.open("r+b") as stream:
        stream.seek(offset + 100)
        byte = stream.read(1)
        stream.seek(offset + 100)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ForegateError, match=rf"record {store.record_name((1, 5))}; convert"):
        foregate.verify(converted)


def test_one_flipped_byte_in_the_backbone_is_found(converted: Path) -> None:
    content = bytearray((converted / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (converted / "model.safetensors").write_bytes(content)
    with pytest.raises(ForegateError, match=r"damaged: model\.safetensors"):
        foregate.verify(converted)


def test_newer_store_version(converted: Path) -> None:
    manifest = json.loads((converted / "foregate.json").read_text())
    (converted / "foregate.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ForegateError, match="store version 99.*update Foregate"):
        foregate.load(converted)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1}', '{"version": 1, "layers": [{}]}'])
def test_damaged_manifest(converted: Path, text: str) -> None:
    (converted / "foregate.json").write_text(text)
    with pytest.raises(ForegateError, match=r"foregate\.json is damaged"):
        foregate.load(converted)


def test_experts_of_another_store(converted: Path, store: Folder) -> None:
    shutil.copyfile(store("olmoe") / "experts.safetensors", converted / "experts.safetensors")
    with pytest.raises(ForegateError, match="missing or misplaced"):
        foregate.load(converted)


def test_config_of_another_store(converted: Path, store: Folder) -> None:
    shutil.copyfile(store("qwen3_moe") / "config.json", converted / "config.json")
    with pytest.raises(ForegateError, match="another model"):
        foregate.load(converted)


def test_store_without_tokenizer(converted: Path) -> None:
    from foregate.model.generate import load_tokenizer

    for file in converted.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ForegateError, match="no tokenizer"):
        load_tokenizer(str(converted))
    save_byte_tokenizer(converted)
    assert load_tokenizer(str(converted))("a")["input_ids"]


def test_expert_tensors_of_different_dtypes(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ForegateError, match="must be alike"):
        foregate.convert(source, tmp_path / "made.store")
    assert not (tmp_path / "made.store").exists()
