"""What quantization costs and gains on the demo models: size, errors of weights and outputs, held-out loss, speed.

    python benchmarks/quantization.py --out benchmarks/results/quantization.jsonl
    python benchmarks/quantization.py --table benchmarks/results/quantization.jsonl

Every bit width is measured with every quantizer, with and without calibration, and with the hqq library (`pip install
hqq`) at its own metadata. Calibrated quantizers see a trace of the first half of each text in demo/text; everything is
measured on the second halves:

- weight error: norm of the difference over norm of the original, over all experts;
- output error: the same for the experts' outputs on the inputs that reach them in the unquantized model, float32
  activations, one figure a layer; their mean is in the table, the largest beside it;
- bits per byte: loss of the whole model, as `foregate eval` computes it (int8 activations; float32 for the library);
- tokens/s: decoding with all experts in memory, rounds interleaved; one quantizer a width, the others run alike.

Rows are appended to the file one by one.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import foregate
from foregate.checkpoint.architecture import inspect_architecture
from foregate.checkpoint.source import open_checkpoint
from foregate.checkpoint.store import LayerInfo, Store
from foregate.kernels.reference import expert_mlp
from foregate.lookahead.record import plan_trace, read_texts, record_trace
from foregate.lookahead.trace import Trace
from foregate.model.evaluate import evaluate
from foregate.model.generate import generate, load_tokenizer
from foregate.quantize.matrix import QuantizedMatrix

ROOT = Path(__file__).parents[1]
MODELS = ("demo/mixtral-tiny", "demo/qwen3-moe-tiny")
LIBRARY = "hqq library"
TRACED = " with trace"
QUANTIZERS = ("rtn", "hqq", LIBRARY, "refit", "refit" + TRACED, "gptq" + TRACED)
VARIANTS = [(16, "none"), (8, "refit"), *((bits, name) for bits in (4, 3, 2) for name in QUANTIZERS)]
OUTPUT_TOKENS = 1024  # at most, of those that chose an expert
STRIDE = 480  # of windows of 512 tokens
PROMPT, SPEED_TOKENS, SPEED_ROUNDS = "In the beginning", 60, 5

Params = dict[str, torch.Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A model with what it is measured with."""

    model: Path
    folder: Path  # for stores and traces
    original: Store  # 16 bits
    calibration: Path  # trace
    heldout: Trace
    texts: list[Path]  # held out, for the loss
    threads: int


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantization.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=16384, help="of each held-out text, for the loss")
    parser.add_argument("--only", choices=("quality", "speed"), help="measure this alone")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the rows of this file and measure nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        for model in arguments.models:
            for row in measure_model(ROOT / model, arguments.threads, arguments.bytes, arguments.only):
                with arguments.out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
    print(table([json.loads(line) for line in (arguments.table or arguments.out).read_text().splitlines()]))


def measure_model(model: Path, threads: int, nbytes: int, only: str | None) -> Iterator[Row]:
    """One row of quality per variant, then one of speed per width."""
    facts = {"model": model.name, "threads": threads, "platform": platform.platform(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        original = Store(foregate.convert(model, Path(folder) / "16"))
        if only != "speed":
            setting = prepare(model, Path(folder), original, threads, nbytes)
            texts = {text.name: hashlib.sha256(text.read_bytes()).hexdigest()[:16] for text in setting.texts}
            for bits, quantizer in VARIANTS:
                row = measure_quality(setting, bits, quantizer)
                yield {"measure": "quality", **facts, "loss_bytes": nbytes, "texts": texts, **row}
        if only != "quality":
            for row in measure_speeds(model, Path(folder), original, threads):
                yield {"measure": "speed", **facts, **row, "load_average": os.getloadavg()[0]}


def prepare(model: Path, folder: Path, store: Store, threads: int, nbytes: int) -> Setting:
    """Traces of the unquantized store, of the first and of the second halves of the texts."""
    halves: dict[str, list[Path]] = {"calibration": [], "heldout": [], "loss": []}
    for source in sorted((ROOT / "demo/text").glob("*.txt")):
        content = source.read_bytes()
        middle = len(content) // 2
        parts = {"calibration": content[:middle], "heldout": content[middle:], "loss": content[middle:][:nbytes]}
        for half, part in parts.items():
            halves[half].append(folder / half / source.name)
            halves[half][-1].parent.mkdir(exist_ok=True)
            halves[half][-1].write_text(part.decode(errors="ignore"))
    runnable, tokenizer = loaded(store, threads)
    traces = {
        half: record_trace(plan_trace(runnable, read_texts(tokenizer, halves[half])), folder / f"{half}.trace")
        for half in ("calibration", "heldout")
    }
    runnable.foregate.close()
    return Setting(model, folder, store, traces["calibration"], Trace(traces["heldout"]), halves["loss"], threads)


def measure_quality(setting: Setting, bits: int, quantizer: str) -> Row:
    """Size, errors and loss of one variant."""
    store, weights, row = make_variant(setting, bits, quantizer)
    original = expert_params(setting.original)
    outputs = output_errors(setting, original, weights)
    row = {"bits": bits, "quantizer": quantizer, **row, "weight_error": weight_error(weights, original)}
    row |= {"output_error": statistics.mean(outputs), "output_error_by_layer": outputs}
    return row | measure_loss(store, setting)


def make_variant(setting: Setting, bits: int, quantizer: str) -> tuple[Store, list[list[Params]], Row]:
    """A store that can be run, the weights of its experts by layer and expert, and its size."""
    path = setting.folder / f"{bits}-{quantizer}"
    if quantizer == LIBRARY:
        group, change = (16 if bits == 2 else 64), lambda weight: with_library(weight, bits)
        store = altered(setting.original, path, change)
        size = {"bits_per_weight": bits + 32 / group, "group": group, "metadata": "float16"}
        return store, expert_params(setting.original, change), size
    options = {} if quantizer == "none" else {"quantizer": quantizer.removesuffix(TRACED)}
    if quantizer.endswith(TRACED):
        options["trace"] = setting.calibration
    store = Store(foregate.convert(setting.model, path, bits=bits, **options))
    record = sum(layer.num_experts * sum(t.nbytes for t in layer.layout.tensors) for layer in store.layers)
    params = expert_params(store)
    count = sum(weight.numel() for layer in params for expert in layer for weight in expert.values())
    return store, params, {"bits_per_weight": 8 * record / count}


def with_library(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What the hqq library makes of a matrix, with its usual float16 metadata and groups of our size."""
    from hqq.core.quantize import Quantizer

    group = 16 if bits == 2 else 64
    codes, meta = Quantizer.quantize(
        weight.float(), nbits=bits, group_size=group, axis=1, round_zero=False, device="cpu"
    )
    meta |= {"compute_dtype": torch.float32} | {key: meta[key].half().float() for key in ("scale", "zero")}
    return Quantizer.dequantize(codes, meta).reshape(weight.shape)


def altered(store: Store, path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Store:
    """A copy of an unquantized store whose expert matrices are changed (and rounded to the records' precision)."""
    path.mkdir()
    for file in store.path.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    records = load_file(store.experts_path)
    with (path / store.experts_path.name).open("r+b") as stream:
        for index, layer in enumerate(store.layers):
            for expert in range(layer.num_experts):
                given = layer.layout.unpack(records[f"{layer.module}.{expert}"])
                made = {name: change(w).to(w.dtype) if w.dim() == 2 else w for name, w in given.items()}
                stream.seek(store.location((index, expert))[0])
                stream.write(layer.layout.pack(made))
    return Store(path)


def expert_params(store: Store, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[list[Params]]:
    """Every expert's parameters by layer and expert, float32; with `change` made to the matrices."""
    records = load_file(store.experts_path)

    def restore(layer: LayerInfo, expert: int) -> Params:
        weights = layer.layout.unpack(records[f"{layer.module}.{expert}"])
        whole = {name: w.dequantize() if isinstance(w, QuantizedMatrix) else w.float() for name, w in weights.items()}
        return {name: change(w) if change and w.dim() == 2 else w for name, w in whole.items()}

    return [[restore(layer, expert) for expert in range(layer.num_experts)] for layer in store.layers]


def weight_error(weights: list[list[Params]], original: list[list[Params]]) -> float:
    """Norm of the difference over norm of the original, over all experts."""
    pairs = [
        (found[name], wanted[name])
        for layer, wanted_layer in zip(weights, original, strict=True)
        for found, wanted in zip(layer, wanted_layer, strict=True)
        for name in wanted
    ]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt())


def output_errors(setting: Setting, original: list[list[Params]], weights: list[list[Params]]) -> list[float]:
    """Per layer: norm of the difference of the experts' outputs over norm of the outputs, on held-out inputs."""
    model = inspect_architecture(open_checkpoint(setting.model).config).model
    errors = []
    for index, layer in enumerate(setting.original.layers):
        experts, chosen = model.get_submodule(layer.module), setting.heldout.chosen(index)
        error = size = 0.0
        for expert in range(layer.num_experts):
            rows = (chosen == expert).any(1).nonzero().squeeze(1)
            rows = rows[:: max(1, len(rows) // OUTPUT_TOKENS)]
            tokens = setting.heldout.expert_inputs(index)[rows].float()
            wanted, found = (run_expert(tokens, params[index][expert], experts) for params in (original, weights))
            error += float((found - wanted).square().sum())
            size += float(wanted.square().sum())
        errors.append((error / size) ** 0.5)
    return errors


def run_expert(tokens: torch.Tensor, params: Params, experts: nn.Module) -> torch.Tensor:
    """An expert's outputs in float32."""
    return expert_mlp(tokens, params, experts, functional.linear)


def measure_loss(store: Store, setting: Setting) -> Row:
    """Bits per byte by text and their mean."""
    model, tokenizer = loaded(store, setting.threads)
    kinds = {text.stem: evaluate(model, tokenizer, text, stride=STRIDE).bits_per_byte for text in setting.texts}
    model.foregate.close()
    return {"bits_per_byte": statistics.mean(kinds.values()), "bits_per_byte_by_text": kinds}


def measure_speeds(model: Path, folder: Path, original: Store, threads: int) -> list[Row]:
    """Median decode speed by width, all experts in memory."""
    stores = {16: original}
    for bits in (8, 4, 3, 2):
        stores[bits] = Store(foregate.convert(model, folder / f"speed-{bits}", bits=bits))
    models = {bits: loaded(store, threads) for bits, store in stores.items()}
    speeds: dict[int, list[float]] = {bits: [] for bits in models}
    for _ in range(SPEED_ROUNDS + 1):
        for bits, (runnable, tokenizer) in models.items():
            result = generate(runnable, tokenizer, PROMPT, max_new_tokens=SPEED_TOKENS)
            speeds[bits].append((result.new_tokens - 1) / result.decode_seconds)
    for runnable, _ in models.values():
        runnable.foregate.close()
    return [
        {"bits": bits, "tokens_per_second": statistics.median(rounds[1:]), "rounds": rounds[1:]}
        for bits, rounds in speeds.items()
    ]


def loaded(store: Store, threads: int) -> tuple[Any, Any]:
    """Model and tokenizer of a store, all experts in memory."""
    return foregate.load(store.path, memory="100%", threads=threads), load_tokenizer(str(store.path))


def table(rows: list[Row]) -> str:
    """The rows in Markdown, losses relative to the 16-bit row of the same model."""
    quality = [row for row in rows if row["measure"] == "quality"]
    base = {row["model"]: row["bits_per_byte"] for row in quality if row["bits"] == 16}
    library = {(row["model"], row["bits"]): row["output_error"] for row in quality if row["quantizer"] == LIBRARY}
    lines = ["| model | bits | quantizer | bits/weight | weight error | output error | against hqq library | loss |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in quality:
        by_library = library.get((row["model"], row["bits"]))
        against = f"{row['output_error'] / by_library - 1:+.1%}" if by_library else ""
        outputs = row["output_error"], max(row["output_error_by_layer"])
        lines.append(
            f"| {row['model']} | {row['bits']} | {row['quantizer']} | {row['bits_per_weight']:.2f} "
            f"| {row['weight_error']:.4f} | {outputs[0]:.4f} ({outputs[1]:.4f}) "
            f"| {against} "
            f"| {row['bits_per_byte'] / base[row['model']] - 1:+.2%} |"
        )
    lines += ["", "| model | bits | tokens/s |", "|---|---|---|"]
    for row in rows:
        if row["measure"] == "speed":
            lines.append(f"| {row['model']} | {row['bits']} | {row['tokens_per_second']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
