"""What the Triton kernels compile to, on any machine: registers, spills, shared memory, instructions per weight.

    python benchmarks/triton_compiled.py --out benchmarks/results/triton-compiled.json

Triton brings NVIDIA's assembler and disassembler, so no card is needed. For a decode kernel, the instructions per
multiply-add of its longest loop (however often the compiler unrolled that) say what a weight costs, since every weight
takes one of them, and an activation another, shared by a thread's rows: a card with bandwidth B bytes/s that issues I
instructions a second can wait for memory, not for instructions, while I / B * bits / 8 is above them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", None):  # nothing compiles under the interpreter
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foregate.checkpoint.store import RecordLayout
from foregate.kernels.triton import decode, grouped
from foregate.kernels.triton.configs import DECODE, GROUPED_ANY, GROUPED_FMA, TENSOR_CORES, Decode, Grouped
from foregate.kernels.triton.record import MatrixPlace, record_places
from foregate.quantize.matrix import QuantizedMatrix

SHAPES = {"mixtral": (4096, 14336), "qwen3": (2048, 768), "olmoe": (2048, 1024), "gpt-oss": (2880, 2880)}
TOP_K = 8
GATE = {"LAYOUT": "concatenated", "FUNCTION": "silu", "ALPHA": 1.0, "LIMIT": float("inf"), "UP_OFFSET": 0.0}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    **dict.fromkeys(("row_slots", "row_tokens", "row_places", "order", "starts"), "*i32"),
    **dict.fromkeys(("row_weights", "outputs", "results"), "*fp32"),
    "slots": "*u8",
    "slot_bytes": "i64",
}


def main() -> None:
    """Compile, print a line per kernel and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[75, 80, 86, 89, 90])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for capability in arguments.capability:
        for shape in arguments.shape:
            for bits in arguments.bits:
                rows += compile_expert(shape, bits, capability)
    if arguments.out:
        facts = {"triton": triton.__version__, "torch": torch.__version__}
        arguments.out.write_text(json.dumps({**facts, "kernels": rows}, indent=1) + "\n")


def compile_expert(shape: str, bits: int, capability: int) -> list[dict[str, Any]]:
    """A row for each of the kernels of an expert, with the configurations of the table."""
    hidden, inner = SHAPES[shape]
    up, down = QuantizedMatrix.outline(bits, 2 * inner, hidden), QuantizedMatrix.outline(bits, hidden, inner)
    places = record_places(RecordLayout.of({"gate_up_proj": up, "down_proj": down}))
    tile = (GROUPED_ANY if capability >= 10 * TENSOR_CORES[0] + TENSOR_CORES[1] else GROUPED_FMA)[0]
    first = {**GATE, "INNER": inner}
    last = {"HIDDEN": hidden}
    cases = [
        (decode.decode_up, places.up, _table(places.up), {**first, "NEXT_PARTS": places.down.parts}),
        (decode.decode_down, places.down, _table(places.down), last),
        (decode.decode_down_sum, places.down, _table(places.down), {**last, "TOP_K": TOP_K}),
        (grouped.grouped_up, places.up, tile, first),
        (grouped.grouped_down, places.down, tile, last),
    ]
    rows = []
    for function, matrix, config, constants in cases:
        found = examine(function, matrix, config, constants, capability)
        rows.append({"shape": shape, "bits": bits, "capability": capability, "kernel": function.__name__, **found})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def examine(function: Any, matrix: MatrixPlace, config: Decode | Grouped, constants: dict, capability: int) -> dict:
    """Compile one kernel and read what came out."""
    options: dict[str, Any] = {"num_warps": config.warps}
    constants = {**constants, **matrix.constants(), "ROWS": config.rows}
    if isinstance(config, Decode):
        constants |= {"WIDE": config.wide, "STAGES": config.stages}
        options["enable_fp_fusion"] = False
    else:
        constants["TOKENS"] = config.tokens
        options["num_stages"] = config.stages
    values = "*fp32" if isinstance(config, Decode) else "*fp16"
    types = {**POINTERS, "x": values, "inner": values}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if signature[name] != "constexpr"
    }
    source = ASTSource(function, signature, {name: constants[name] for name in signature if name in constants}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = {"config": str(config), "shared": compiled.metadata.shared, **_binary(compiled.asm["cubin"])}
    if isinstance(config, Decode):
        found["instructions_per_fma"] = round(found["loop"] / found["loop_fma"], 2)
    return found


def _table(matrix: MatrixPlace) -> Decode:
    return DECODE[matrix.rows, matrix.cols][matrix.bits]


def _binary(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes of a thread, and instructions and barriers of the longest loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([BINARIES / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        disassemble = [BINARIES / "nvdisasm", "-c", file.name]
        code = subprocess.check_output(disassemble, text=True, stderr=subprocess.DEVNULL)  # it warns of its own file
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    loop = _longest_loop(code)
    counts = {"loop": len(loop), "loop_fma": loop.count("FFMA"), "loop_barriers": loop.count("BAR")}
    counts["flushing_fma"] = code.count("FFMA.FTZ")  # decode multiplies subnormal numbers
    return {"registers": registers, "stack": stack, **counts}


def _longest_loop(code: str) -> list[str]:
    """The operations between a label and the farthest branch back to it; of all of them, where there is no loop."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(operations)
            continue
        text = re.sub(r"/\*.*?\*/", "", line).strip()
        if not re.search(r"/\*[0-9a-f]{4,}\*/", line) or not text:
            continue
        operations.append(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0].rstrip(";"))
        back = re.search(r"\((\.L_x_\d+)\)", text)
        if operations[-1] == "BRA" and back and back[1] in labels:
            body = operations[labels[back[1]] :]
            if len(body) > max(len(longest), 3):  # not the program's end, which branches to itself
                longest = body
    return longest or operations


if __name__ == "__main__":
    main()
