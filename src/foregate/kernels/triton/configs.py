"""Configurations of the Triton kernels: a table for common shapes, and what was tuned on the user's own card.

The table was not measured: no card was at hand. It was chosen from the compiled kernels (registers, instructions per
weight, barriers in the loop) and by two rules. Memory is busy only while enough bytes are under way: bandwidth times
latency, 2 MB on an H100, which is matrix rows x columns of a step x bits / 8 over all programs. First matrices have rows
in plenty: small steps, and two to four rows a thread, which share its activations. Down matrices have few rows, and take
steps as wide as they can. Where a step's activations are fewer than a program's threads, they are loaded where they are
used; otherwise they are exchanged among threads, at barriers. docs/kernels-cuda.md has the figures.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from foregate.kernels.triton.record import MatrixPlace

CACHE_VERSION = 1  # of the file and of the kernels: another one makes old files void
COLUMNS = 256  # of a program that only sums


@dataclass(frozen=True)
class Decode:
    """How a decode kernel walks a matrix: rows per program, blocks of 64 columns per step, warps, steps of loads under
    way, and, for down matrices, whether the k experts are computed apart and summed by a launch of its own.
    """

    rows: int
    wide: int
    warps: int
    stages: int = 1
    apart: bool = False


@dataclass(frozen=True)
class Grouped:
    """How a grouped kernel walks a matrix: tokens and rows per tile, warps, steps of loads under way."""

    tokens: int
    rows: int
    warps: int
    stages: int


Config = Decode | Grouped

_UP = {2: Decode(16, 8, 2), 3: Decode(16, 8, 2), 4: Decode(16, 4, 2), 8: Decode(16, 2, 2)}
_DOWN = {2: Decode(8, 32, 8), 3: Decode(8, 32, 8), 4: Decode(8, 16, 8), 8: Decode(8, 4, 4)}
_DOWN_768 = {2: Decode(8, 16, 4), 3: Decode(8, 16, 4), 4: Decode(8, 16, 8), 8: Decode(8, 4, 4)}  # one step of 12 blocks

# By shape and bits.
DECODE: dict[tuple[int, int], dict[int, Decode]] = {
    (28672, 4096): _UP,  # Mixtral 8x7B
    (4096, 14336): _DOWN,
    (1536, 2048): _UP,  # Qwen3-30B-A3B
    (2048, 768): _DOWN_768,
    (2048, 2048): _UP,  # OLMoE
    (2048, 1024): _DOWN,
    (5760, 2880): _UP,  # gpt-oss
    (2880, 2880): _DOWN,
}

# Any shape, best first; a launch that the card refuses goes on to the next.
DECODE_ANY = (Decode(8, 4, 2), Decode(4, 2, 1), Decode(2, 1, 1))
GROUPED_ANY = (Grouped(64, 64, 4, 3), Grouped(32, 64, 4, 1), Grouped(16, 32, 4, 1), Grouped(16, 16, 2, 1))
GROUPED_FMA = (Grouped(32, 32, 4, 1), *GROUPED_ANY[2:])  # without tensor cores larger tiles spill registers
TENSOR_CORES = (8, 0)  # the oldest capability whose tensor cores Triton uses


def candidates(kind: type[Config], matrix: MatrixPlace, device: torch.device) -> Iterator[Config]:
    """Configurations to try for a matrix, best first: tuned on this card, from the table, then any."""
    tuned = read_tuned(card_name(device)).get(key(kind, matrix))
    if tuned is not None:
        yield tuned
    if kind is Decode:
        table = DECODE.get((matrix.rows, matrix.cols))
        if table is not None:
            yield table[matrix.bits]
        yield from DECODE_ANY
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < TENSOR_CORES:
        yield from GROUPED_FMA
    else:
        yield from GROUPED_ANY


def key(kind: type[Config], matrix: MatrixPlace) -> str:
    """The name under which a matrix is tuned."""
    return f"{kind.__name__.lower()} {matrix.rows}x{matrix.cols} {matrix.bits} bits"


def cache_file(card: str) -> Path:
    """Where configurations tuned on a card are kept, in the user's cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foregate"
    name = "".join(character if character.isalnum() else "-" for character in card.lower())
    return folder / f"triton-{name}.json"


def read_tuned(card: str) -> dict[str, Config]:
    """What was tuned on this card; nothing when the file is missing, damaged or of other kernels."""
    kinds = {"decode": Decode, "grouped": Grouped}
    try:
        data = json.loads(cache_file(card).read_text())
        if data["version"] != CACHE_VERSION:
            return {}
        return {name: kinds[name.split()[0]](**values) for name, values in data["configs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_tuned(card: str, tuned: dict[str, Config]) -> Path:
    """Add to what was tuned on this card; the file is replaced as a whole."""
    file = cache_file(card)
    file.parent.mkdir(parents=True, exist_ok=True)
    configs = {name: asdict(config) for name, config in (read_tuned(card) | tuned).items()}
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"version": CACHE_VERSION, "card": card, "configs": configs}, indent=1) + "\n")
    partial.replace(file)
    return file


def card_name(device: torch.device) -> str:
    """What tuned configurations belong to."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
