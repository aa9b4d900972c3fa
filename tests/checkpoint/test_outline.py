"""A configuration alone says what a conversion will make, byte for byte."""

from collections.abc import Callable
from pathlib import Path

import pytest

import foregate
from foregate.checkpoint.architecture import inspect_architecture
from foregate.checkpoint.outline import outline
from foregate.checkpoint.source import load_config
from foregate.checkpoint.store import Store

Folder = Callable[[str], Path]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_5_moe"])
def test_a_lossless_store_is_known_beforehand(family: str, checkpoint: Folder, store: Folder) -> None:
    expected, found = Store(store(family)), outline(inspect_architecture(load_config(checkpoint(family))), 16, 16)
    assert found.layers == expected.layers
    assert (found.record_bytes, found.experts_bytes) == (expected.record_bytes, expected.experts_bytes)


@pytest.mark.parametrize(("family", "bits", "backbone_bits"), [("mixtral", 3, 8), ("deepseek_v3", 4, 4)])
def test_a_quantized_store_is_known_beforehand(
    family: str, bits: int, backbone_bits: int, checkpoint: Folder, tmp_path: Path
) -> None:
    made = foregate.convert(checkpoint(family), tmp_path / "store", bits=bits, backbone_bits=backbone_bits)
    found = outline(inspect_architecture(load_config(checkpoint(family))), bits, backbone_bits)
    expected = Store(made)
    assert found.layers == expected.layers
    assert found.matrices == expected.matrices
    assert found.matrices_bytes == expected.matrices_bytes > 0
