"""Whole families through the kernels on slots: the model with their experts is the dequantized model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_quantized import dequantized_model
from torch import nn

import foregate
from foregate.checkpoint.store import LayerInfo, RecordLayout, Store
from foregate.errors import ForegateError
from foregate.kernels.slots import Rows, SlotKernel, choose_slot_kernel
from foregate.quantize.matrix import QuantizedMatrix

triton_kernels = pytest.importorskip("foregate.kernels.triton", reason="Triton is not installed")

from foregate.kernels.triton.configs import Decode, Grouped  # noqa: E402 - only where Triton is

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(triton_kernels.why_not(DEVICE) is not None, reason=str(triton_kernels.why_not(DEVICE)))

FAMILIES = {"mixtral": 4, "qwen3_moe": 3, "gpt_oss": 2, "deepseek_v3": 4, "nemotron_h": 8, "olmoe": 2}
IDS = torch.randint(3, 250, (1, 2), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_dequantized_models(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = Store(foregate.convert(checkpoint(family), tmp_path / "store", bits=FAMILIES[family]))
    model = dequantized_model(checkpoint(family), store).to(DEVICE)
    with torch.inference_mode():
        expected = model(IDS.to(DEVICE)).logits
        for index, layer in enumerate(store.layers):
            module = model.get_submodule(layer.module)
            kernel = choose_slot_kernel("triton", module, layer.layout, all_records(store, index).to(DEVICE))
            kernel.use(Decode, Decode(128, 1, 4), Decode(64, 1, 4))  # few programs: the interpreter is slow
            kernel.use(Grouped, Grouped(16, 64, 4, 1), Grouped(16, 64, 4, 1))
            module.forward = Alternating(kernel, layer)
        fused, apart, grouped = (model(IDS.to(DEVICE)).logits for _ in range(3))
    assert torch.equal(fused, apart)
    torch.testing.assert_close(fused, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(grouped, expected, rtol=0, atol=2e-5)


class Alternating:
    """An experts module's forward: at first the fused way, then one expert after the other, then grouped."""

    def __init__(self, kernel: SlotKernel, layer: LayerInfo) -> None:
        self.kernel, self.layer, self.calls = kernel, layer, 0

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        shape, hidden = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
        total, weights = torch.empty_like(hidden), weights.float().contiguous()
        slots = torch.where(index < self.layer.num_experts, index, -1).int()  # expert e lies in slot e
        if self.calls == 0:
            self.kernel.decode(hidden, slots, weights, total)
        else:
            places = torch.arange(index.numel(), dtype=torch.int32, device=index.device)
            outputs = torch.empty(index.numel(), hidden.shape[1], device=hidden.device)
            waves = [slice(0, None)] if self.calls == 2 else [slice(1, None, 2), slice(0, None, 2)]
            for wave in waves:
                rows = (slots.view(-1), places // index.shape[1], places)
                self.kernel.run(hidden, Rows(*(part[wave].contiguous() for part in rows)), outputs, self.calls == 2)
            self.kernel.combine(outputs, slots, weights, total)
        self.calls += 1
        return total.view(shape)


def all_records(store: Store, layer: int) -> torch.Tensor:
    """uint8 [experts, record bytes]."""
    records = []
    with store.experts_path.open("rb") as file:
        for expert in range(store.layers[layer].num_experts):
            offset, nbytes = store.location((layer, expert))
            file.seek(offset)
            records.append(torch.frombuffer(bytearray(file.read(nbytes)), dtype=torch.uint8))
    return torch.stack(records)


def test_experts_that_triton_does_not_know() -> None:
    layout = RecordLayout.of({"up_proj": torch.zeros(16, 64), "down_proj": torch.zeros(64, 16)})
    slots = torch.zeros(1, layout.nbytes, dtype=torch.uint8, device=DEVICE)
    module = nn.Module()
    module.has_gate = False
    with pytest.raises(ForegateError, match="the triton kernel cannot run here: .* up_proj has 32"):
        choose_slot_kernel("triton", module, layout, slots)
    with pytest.raises(ForegateError, match="unknown kernel fast: choose one of auto, triton, cpu, reference"):
        choose_slot_kernel("fast", module, layout, slots)

    quantized = RecordLayout.of({name: QuantizedMatrix.outline(4, 64, 64) for name in ("up_proj", "down_proj")})
    module.act_fn = torch.sin
    with pytest.raises(ForegateError, match="the Triton kernels do not know the activation of Module"):
        choose_slot_kernel("triton", module, quantized, slots)
    if slots.is_cuda:
        kernel = choose_slot_kernel("auto", module, layout, slots)
        assert kernel.note == "PyTorch, slow: the Triton kernels read 8, 4, 3 and 2 bits, up_proj has 32"
        with pytest.raises(ForegateError, match="the native kernels read the host's memory"):
            choose_slot_kernel("cpu", module, layout, slots)
