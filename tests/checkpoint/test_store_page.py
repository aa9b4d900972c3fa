"""The worked example of docs/store.md, decoded by hand: no code of the package takes part."""

import re
import struct
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/store.md").read_text()
EXAMPLES = {int(bits): body for bits, body in re.findall(r"^bits (\d)\n((?:.+\n)+?)(?=bits|```)", PAGE, re.MULTILINE)}


def decode(bits: int, planes: dict[str, bytes]) -> list[float]:
    """The 64 weights of a one-row matrix, as the page's table says."""
    low, weights = planes["low"], []
    (base,) = struct.unpack("<f", planes["base"])
    scale = base * 2 ** (-planes["scales"][0] / 16)
    for j in range(64):
        q = low[j % 32] >> 4 * (j // 32) & 15 if bits == 4 else low[j % 16] >> 2 * (j // 16) & 3
        if bits == 3:
            q += 4 * (int.from_bytes(planes["high"], "little") >> j & 1)
        if bits == 2:
            byte = planes["groups"][j // 16]
            weights.append(scale * ((byte & 15) + 1) / 16 * (q - (byte >> 4) / 5))
        else:
            weights.append(scale * (q - planes["zeros"][0] * (2**bits - 1) / 255))
    return weights


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_worked_example(bits: int) -> None:
    lines = dict(line.split(maxsplit=1) for line in EXAMPLES[bits].strip().splitlines())
    expected = [float(value) for value in lines.pop("weights").split()]
    weights = decode(bits, {name: bytes.fromhex(text) for name, text in lines.items()})
    assert [weights[j] for j in (0, 1, 16, 33, 63)] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 2
