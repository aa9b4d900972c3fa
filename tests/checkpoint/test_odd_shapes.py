"""Quantized conversion of experts whose sizes no block divides, from checkpoint to logits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import foregate
from foregate.checkpoint.store import Store

TOKENS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of hidden size 67 and inner size 45."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=67,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
    )
    path = tmp_path_factory.mktemp("odd") / "source"
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_sizes_that_no_block_divides(odd: Path, tmp_path: Path, bits: int) -> None:
    store = Store(foregate.convert(odd, tmp_path / "store", bits=bits))
    original = AutoModelForCausalLM.from_pretrained(odd, dtype=torch.float32, experts_implementation="eager").eval()
    params = dict(original.named_parameters())
    records = load_file(store.experts_path)
    for layer in store.layers:
        for expert in range(layer.num_experts):
            for name, matrix in layer.layout.unpack(records[f"{layer.module}.{expert}"]).items():
                weight = params[f"{layer.module}.{name}"].data[expert]
                restored = matrix.dequantize()
                assert (restored - weight).norm() < {8: 0.01, 4: 0.1, 3: 0.2, 2: 0.3}[bits] * weight.norm()
                weight.copy_(restored)
    model = foregate.load(store.path, memory="100%", exact=True)
    with torch.inference_mode():
        found, expected = model(TOKENS).logits, original(TOKENS).logits
    model.foregate.close()
    assert torch.allclose(found, expected, atol=1e-4)
