"""What quantization costs and gains on the demo models: size, weight error, held-out loss, speed.

    python benchmarks/quantization.py --out benchmarks/results/quantization.json

For every bit width and quantizer the checkpoint is converted and run: relative weight error over all experts, bits per
byte on the held-out texts in demo/text, and decode speed with all experts in memory. The speed runs are interleaved.
Prints a Markdown table and writes the raw figures.
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import foregate
from foregate.checkpoint.store import Store
from foregate.model.evaluate import evaluate
from foregate.model.generate import generate, load_tokenizer
from foregate.quantize.matrix import QuantizedMatrix

ROOT = Path(__file__).parents[1]
VARIANTS = [(16, "none"), *((bits, name) for bits in (8, 4, 3, 2) for name in ("rtn", "hqq", "refit"))]
PROMPT = "In the beginning"
SPEED_TOKENS, SPEED_ROUNDS = 60, 3


def main() -> None:
    """Measure every variant of every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo/mixtral-tiny", "demo/qwen3-moe-tiny"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantization.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=32768, help="of each held-out text")
    arguments = parser.parse_args()
    rows = [
        row for model in arguments.models for row in measure_model(ROOT / model, arguments.threads, arguments.bytes)
    ]
    facts = {"platform": platform.platform(), "torch": torch.__version__, "foregate": foregate.__version__}
    arguments.out.write_text(
        json.dumps({**facts, "threads": arguments.threads, "bytes": arguments.bytes, "rows": rows}, indent=1) + "\n"
    )
    print(table(rows))


def measure_model(model: Path, threads: int, nbytes: int) -> list[dict[str, Any]]:
    """One row per variant."""
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        for bits, quantizer in VARIANTS:
            options = {"bits": bits} if quantizer == "none" else {"bits": bits, "quantizer": quantizer}
            stores[bits, quantizer] = Store(foregate.convert(model, Path(folder) / f"{bits}-{quantizer}", **options))
        speeds = measure_speeds(stores, threads)
        original = expert_weights(stores[16, "none"])
        texts = excerpts(Path(folder), nbytes)
        rows = []
        for variant, store in stores.items():
            row = {"model": model.name, "bits": variant[0], "quantizer": variant[1]}
            row |= {
                "experts_bytes": sum(exact_record_bytes(store)),
                "bits_per_weight": bits_per_weight(store, original),
            }
            row |= {"weight_error": weight_error(expert_weights(store), original)}
            row |= measure_loss(store, texts, threads) | {"tokens_per_second": speeds[variant]}
            rows.append(row)
            print(row, flush=True)
    return rows


def excerpts(folder: Path, nbytes: int) -> list[Path]:
    """The first bytes of every held-out text, as files."""
    texts = []
    for source in sorted((ROOT / "demo/text").glob("*.txt")):
        text = folder / source.name
        text.write_text(source.read_bytes()[:nbytes].decode(errors="ignore"))
        texts.append(text)
    return texts


def exact_record_bytes(store: Store) -> list[int]:
    """Bytes of every record without the padding to 4096."""
    return [
        sum(tensor.nbytes for tensor in layer.layout.tensors)
        for layer in store.layers
        for _ in range(layer.num_experts)
    ]


def bits_per_weight(store: Store, original: list[torch.Tensor]) -> float:
    return 8 * sum(exact_record_bytes(store)) / sum(weight.numel() for weight in original)


def expert_weights(store: Store) -> list[torch.Tensor]:
    """Every expert matrix of a store, dequantized."""
    records = load_file(store.experts_path)
    weights = []
    for layer in store.layers:
        for expert in range(layer.num_experts):
            for weight in layer.layout.unpack(records[f"{layer.module}.{expert}"]).values():
                weights.append(weight.dequantize() if isinstance(weight, QuantizedMatrix) else weight.float())
    return weights


def weight_error(weights: list[torch.Tensor], original: list[torch.Tensor]) -> float:
    """Norm of the difference over norm of the original, over all experts."""
    difference = sum((a - b).square().sum() for a, b in zip(weights, original, strict=True))
    return float((difference / sum(b.square().sum() for b in original)).sqrt())


def measure_loss(store: Store, texts: list[Path], threads: int) -> dict[str, Any]:
    """Bits per byte by text kind and their mean, int8 activations as `generate` uses them."""
    model, tokenizer = foregate.load(store.path, memory="100%", threads=threads), load_tokenizer(str(store.path))
    kinds = {text.stem: evaluate(model, tokenizer, text).bits_per_byte for text in texts}
    model.foregate.close()
    return {"bits_per_byte": statistics.mean(kinds.values()), "bits_per_byte_by_kind": kinds}


def measure_speeds(stores: dict[tuple[int, str], Store], threads: int) -> dict[tuple[int, str], float | None]:
    """Median decode speed in tokens/s, all experts in memory; one quantizer per width, the rest is alike."""
    chosen = {variant: store for variant, store in stores.items() if variant[1] in ("none", "refit")}
    models = {variant: foregate.load(store.path, memory="100%", threads=threads) for variant, store in chosen.items()}
    times: dict[tuple[int, str], list[float]] = {variant: [] for variant in models}
    for _ in range(SPEED_ROUNDS + 1):
        for variant, model in models.items():
            tokenizer = load_tokenizer(str(stores[variant].path))
            result = generate(model, tokenizer, PROMPT, max_new_tokens=SPEED_TOKENS)
            times[variant].append((result.new_tokens - 1) / result.decode_seconds)
    for model in models.values():
        model.foregate.close()
    return {variant: statistics.median(times[variant][1:]) if variant in times else None for variant in stores}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, losses relative to the 16-bit row of the same model."""
    base = {row["model"]: row["bits_per_byte"] for row in rows if row["bits"] == 16}
    lines = [
        "| model | bits | quantizer | bits/weight | experts, MB | weight error | bits/byte | against 16 | tokens/s |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        speed = f"{row['tokens_per_second']:.1f}" if row["tokens_per_second"] else ""
        loss = row["bits_per_byte"] / base[row["model"]] - 1
        lines.append(
            f"| {row['model']} | {row['bits']} | {row['quantizer']} | {row['bits_per_weight']:.2f} "
            f"| {row['experts_bytes'] / 1e6:.2f} | {row['weight_error']:.4f} | {row['bits_per_byte']:.4f} | {loss:+.2%} | {speed} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
