"""Quantized stores: what runs is the dequantized model, whatever kernel, budget and policy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import foregate
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.quantize.matrix import QuantizedMatrix

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "jamba"]
IDS = torch.randint(3, 250, (2, 15), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="session")
def quantized(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """quantized(family, bits): a store, converted once."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str, bits: int) -> Path:
        if (family, bits) not in made:
            folder = tmp_path_factory.mktemp("quantized") / f"{family}-{bits}"
            made[family, bits] = foregate.convert(checkpoint(family), folder, bits=bits)
        return made[family, bits]

    return make


def dequantized_model(source: Path, store: Store) -> PreTrainedModel:
    """transformers' own model with every expert replaced by what its record means."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    records = load_file(store.experts_path)
    for layer in store.layers:
        experts = model.get_submodule(layer.module)
        for expert in range(layer.num_experts):
            for name, weight in layer.layout.unpack(records[f"{layer.module}.{expert}"]).items():
                value = weight.dequantize() if isinstance(weight, QuantizedMatrix) else weight
                turned = value.dim() == 2 and experts.is_transposed
                getattr(experts, name).data[expert] = value.T if turned else value
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_logits_are_the_dequantized_models(
    family: str, bits: int, checkpoint: Callable[[str], Path], quantized: Callable[[str, int], Path]
) -> None:
    store = Store(quantized(family, bits))
    assert foregate.verify(store.path) == store.num_experts
    expected = logits(dequantized_model(checkpoint(family), store))
    for kernel in ("cpu", "reference"):
        model = foregate.load(store.path, memory="50%", kernel=kernel, exact=True)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
        model.foregate.close()
    model = foregate.load(store.path, memory="50%", kernel="cpu")
    errors = (logits(model) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.02  # a token whose router sees a near tie may take another route
    model.foregate.close()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_byte_identical_for_every_budget_policy_and_thread_count(
    bits: int, quantized: Callable[[str, int], Path]
) -> None:
    results = []
    for memory, policy in (("9%", "demand"), ("34%", "lru"), ("100%", "lru")):
        model = foregate.load(quantized("mixtral", bits), memory=memory, policy=policy)
        results.append((logits(model), model.generate(IDS[:1], max_new_tokens=10, do_sample=False)))
        model.foregate.close()
    assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results)


def test_smaller_bits_make_smaller_records(quantized: Callable[[str, int], Path], store: Callable[[str], Path]) -> None:
    sizes = [Store(quantized("mixtral", bits)).experts_bytes for bits in (2, 3, 4, 8)]
    sizes.append(Store(store("mixtral")).experts_bytes)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 6


def test_error_grows_as_bits_shrink(quantized: Callable[[str, int], Path], checkpoint: Callable[[str], Path]) -> None:
    original = logits(AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), dtype=torch.float32).eval())
    errors = []
    for bits in (8, 4, 3, 2):
        model = foregate.load(quantized("mixtral", bits), memory="100%", kernel="reference")
        errors.append((logits(model) - original).norm().item())
        model.foregate.close()
    assert errors == sorted(errors)
    assert errors[0] < 0.1 * errors[-1]


@pytest.mark.parametrize("name", ["rtn", "hqq", "refit"])
def test_quantizers_by_name(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = Store(foregate.convert(checkpoint("mixtral"), tmp_path / "store", bits=4, quantizer=name))
    assert (store.manifest.bits, store.manifest.quantizer) == (4, name)


def test_unknown_quantizer_and_bits(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ForegateError, match="no quantizer 'best'"):
        foregate.convert(checkpoint("mixtral"), tmp_path / "store", bits=4, quantizer="best")
    with pytest.raises(ForegateError, match="--bits 5: choose 16"):
        foregate.convert(checkpoint("mixtral"), tmp_path / "store", bits=5)
    assert not list(tmp_path.glob("store*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(
    checkpoint: Callable[[str], Path], tmp_path: Path, value: float
) -> None:
    source = Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.6.w2.weight"][3, 4] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ForegateError, match=r"down_proj of expert 6 of model\.layers\.1"):
        foregate.convert(source, tmp_path / "store", bits=4)
    assert not (tmp_path / "store").exists()


def test_unknown_kernel(quantized: Callable[[str, int], Path]) -> None:
    with pytest.raises(ForegateError, match="unknown kernel fast: choose one of auto, cpu, reference"):
        foregate.load(quantized("mixtral", 4), kernel="fast")
