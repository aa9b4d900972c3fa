"""A quantized backbone: linear modules compute from packed matrices, and the rest of the model does not notice."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import tiny_config
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

import foregate
from foregate.checkpoint.architecture import auto_class
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.model.linear import QuantizedLinear, read_matrices

# Plain attention; latent attention with a shared expert; biases; recurrent layers whose code reads one weight itself;
# a router of linear modules; fused tensors in the checkpoint that a conversion splits; two that a conversion joins.
FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss", "jamba", "zaya", "unlimited_ocr", "minimax_m3_vl"]
FAMILIES = [family for family in FAMILIES if family in CONFIG_MAPPING]
IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def packed(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """packed(family, backbone bits): a store with experts at 16 bits, converted once."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str, bits: int) -> Path:
        if (family, bits) not in made:
            folder = tmp_path_factory.mktemp("packed") / f"{family}-{bits}"
            made[family, bits] = foregate.convert(checkpoint(family), folder, backbone_bits=bits)
        return made[family, bits]

    return make


def dequantized_model(family: str, source: Path, store: Store, error: float) -> PreTrainedModel:
    """transformers' own model with the store's matrices in their places, where they differ by at most `error`."""
    model = auto_class(tiny_config(family)).from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    for info, matrix in zip(store.matrices, read_matrices(store), strict=True):
        weight = model.get_submodule(info.module).weight
        value = matrix.dequantize()
        assert (value - weight).norm() < error * weight.norm()
        weight.copy_(value)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_dequantized_models(
    family: str, checkpoint: Callable[[str], Path], packed: Callable[[str, int], Path]
) -> None:
    store = Store(packed(family, 4))
    expected = logits(dequantized_model(family, checkpoint(family), store, error=0.1))
    model = foregate.load(store.path, memory="100%", exact=True)
    replaced = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert sorted(replaced) == sorted(matrix.module for matrix in store.matrices)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.foregate.close()


def test_every_kernel_and_8_bits(checkpoint: Callable[[str], Path], packed: Callable[[str, int], Path]) -> None:
    store = Store(packed("mixtral", 8))
    expected = logits(dequantized_model("mixtral", checkpoint("mixtral"), store, error=0.01))
    model = foregate.load(store.path, memory="100%", kernel="reference")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    model.foregate.close()
    model = foregate.load(store.path, memory="100%", kernel="cpu")
    errors = (logits(model) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < errors.median() < 0.03  # activations are rounded to int8
    model.foregate.close()


def test_the_model_is_the_familys_own_class(packed: Callable[[str, int], Path]) -> None:
    model = foregate.load(packed("mixtral", 4), memory="100%")
    assert type(model) is auto_class(tiny_config("mixtral"))._model_mapping[type(model.config)]
    assert not any("self_attn" in name for name in model.state_dict())
    assert "bits=4" in repr(model.model.layers[0].self_attn.q_proj)
    model.foregate.close()


def test_byte_identical_for_every_budget_and_batch(packed: Callable[[str, int], Path]) -> None:
    results = []
    for memory in ("9%", "100%"):
        model = foregate.load(packed("mixtral", 4), memory=memory)
        results.append((logits(model), model.generate(IDS[:1], max_new_tokens=8, do_sample=False)))
        model.foregate.close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("kernel", "exact"), [("cpu", False), ("cpu", True), ("reference", True)])
def test_a_token_does_not_depend_on_its_neighbours(
    kernel: str, exact: bool, packed: Callable[[str, int], Path]
) -> None:
    model = foregate.load(packed("gpt_oss", 4), memory="100%", kernel=kernel, exact=exact)
    linear = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 7, linear.in_features, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        together = linear(x)
        assert together.shape == (3, 7, linear.out_features)
        assert torch.equal(torch.stack([torch.stack([linear(token) for token in row]) for row in x]), together)
        exactly = nn.functional.linear(x, linear.weight, linear.bias)
    assert (together - exactly).norm() < (1e-5 if exact else 0.02) * exactly.norm()
    model.foregate.close()


def test_a_budget_in_bytes_gains_what_packing_saves(packed: Callable[[str, int], Path], store: Callable) -> None:
    plain, small = foregate.load(store("deepseek_v3")), foregate.load(packed("deepseek_v3", 4))
    before, after = plain.foregate.budget.backbone_bytes, small.foregate.budget.backbone_bytes
    matrices = Store(packed("deepseek_v3", 4)).matrices
    saved = sum(4 * info.shape[0] * info.shape[1] - info.nbytes for info in matrices)
    assert before - after == saved > 0
    plain.foregate.close(), small.foregate.close()


def test_unconnected_module_says_so() -> None:
    module = QuantizedLinear(nn.Linear(64, 32))
    with pytest.raises(RuntimeError, match="not connected"):
        module(torch.zeros(1, 64))
    with pytest.raises(RuntimeError, match="not connected"):
        _ = module.weight


def test_another_configuration_is_refused(packed: Callable[[str, int], Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    for file in packed("mixtral", 4).iterdir():
        text = file.read_bytes()
        (folder / file.name).write_bytes(
            text.replace(b"self_attn.q_proj", b"self_attn.z_proj") if file.suffix == ".json" else text
        )
    with pytest.raises(ForegateError, match="matrix .*z_proj is missing or misplaced"):
        foregate.load(folder)
