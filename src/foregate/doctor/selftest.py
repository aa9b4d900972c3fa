"""Does it compute right here: the native kernels against the obvious ones, and a tiny model through the whole engine."""

import tempfile
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from foregate.checkpoint.convert import convert
from foregate.kernels import cpu
from foregate.model.loading import load, quiet
from foregate.quantize.matrix import BITS
from foregate.quantize.rtn import Rtn

ROWS, COLS, TOKENS = 96, 192, 5
TOLERANCE = 1e-4  # relative, of float32 sums in another order


def check_kernels() -> list[str]:
    """What is wrong with the native kernels: one line for each instruction set and bit width that computes wrongly."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(size, COLS, generator=generator) for size in (ROWS, TOKENS))
    wrong, before = [], cpu.isa()
    try:
        for isa in cpu.isas():
            cpu.use_isa(isa)
            for bits in BITS:
                matrix = Rtn().quantize(weight, bits, name="self-test")
                expected = inputs @ matrix.dequantize().T
                error = (cpu.matmul(inputs, matrix, exact=True) - expected).abs().max() / expected.abs().max()
                if not error <= TOLERANCE:
                    wrong.append(f"{isa}, {bits} bits: relative error {error:.1e}")
    finally:
        cpu.use_isa(before)
    return wrong


def check_engine() -> float:
    """The largest difference, relative, between a tiny model's logits by transformers and from a store with half of its
    experts in memory. Raises ForegateError, or whatever else goes wrong on the way.
    """
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    reference, ids = MixtralForCausalLM(config).eval(), torch.arange(16)[None]
    with tempfile.TemporaryDirectory(prefix="foregate-doctor-") as folder, torch.inference_mode():
        with quiet():
            reference.save_pretrained(Path(folder) / "checkpoint")
        store = convert(Path(folder) / "checkpoint", Path(folder) / "store")
        model = load(store, memory="50%", context=32)
        try:
            expected, found = reference(ids).logits, model(ids).logits
        finally:
            model.foregate.close()
    return float((found - expected).abs().max() / expected.abs().max())
