"""Reading and writing safetensors headers, against the safetensors library."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from foregate.checkpoint.tensors import build_header, read_header
from foregate.errors import ForegateError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        "a": torch.arange(12, dtype=torch.float32).view(3, 4),
        "b": torch.randn(2, 3, 4).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def test_reads_what_the_library_reads(file: Path) -> None:
    entries, expected = read_header(file), load_file(file)
    assert entries.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(entries[name].read(), tensor)
        assert entries[name].read().dtype == tensor.dtype
        assert b"".join(entries[name].chunks()) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert torch.equal(entries["b"].read_row(1), expected["b"][1:2])


@pytest.mark.parametrize("keep", [0, 4, 8, 30, -1])
def test_cut_file_is_one_clear_line(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ForegateError, match=r"t\.safetensors .*(whole|truncated)") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" * 10, b"\x08" + b"\0" * 7 + b"not json", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ForegateError, match="not a whole safetensors file"):
        read_header(tmp_path / "t.safetensors")


@pytest.mark.parametrize("align", [8, 4096])
def test_built_header_is_read_by_the_library(tmp_path: Path, align: int) -> None:
    first, second = torch.randint(0, 255, (4096,), dtype=torch.uint8), torch.randint(0, 255, (8192,), dtype=torch.uint8)
    header = build_header({"x": ("U8", (4096,), 4096), "y": ("U8", (8192,), 8192)}, align)
    assert len(header) % align == 0
    path = tmp_path / "built.safetensors"
    path.write_bytes(header + first.numpy().tobytes() + second.numpy().tobytes())
    loaded = load_file(path)
    assert torch.equal(loaded["x"], first)
    assert torch.equal(loaded["y"], second)
