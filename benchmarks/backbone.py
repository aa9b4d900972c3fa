"""What a quantized backbone costs and gains: file sizes, planned memory, held-out loss, decode speed.

    python benchmarks/backbone.py --out benchmarks/results/backbone.jsonl

Every model is converted with experts at 4 bits and the backbone at 16, 8 and 4. For the demo models the loss is in bits
per byte on the held-out texts in demo/text. `--inflated` adds a random Mixtral (8 layers, hidden 1024) without a loss:
its matrices are large enough for the speed to mean something. The speed runs are interleaved. Appends one JSON object a
row and prints a Markdown table.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import foregate
from foregate.checkpoint.store import Store
from foregate.model.evaluate import evaluate
from foregate.model.generate import load_tokenizer

ROOT = Path(__file__).parents[1]
EXPERT_BITS, BACKBONE_BITS = 4, (16, 8, 4)
SPEED_TOKENS, SPEED_ROUNDS, PROMPT_TOKENS = 48, 5, 16
INFLATED = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}


def main() -> None:
    """Measure every width on every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["demo/mixtral-tiny", "demo/qwen3-moe-tiny"])
    parser.add_argument("--inflated", action="store_true", help="measure a random model of larger matrices too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/backbone.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=32768, help="of each held-out text")
    arguments = parser.parse_args()
    facts = {"platform": platform.platform(), "torch": torch.__version__, "threads": arguments.threads}
    with tempfile.TemporaryDirectory() as folder:
        texts = excerpts(Path(folder), arguments.bytes)
        sources = {model: (ROOT / model, texts) for model in arguments.models}
        if arguments.inflated:
            sources["inflated"] = (save_inflated(Path(folder) / "inflated"), [])
        rows = [row for source, held_out in sources.values() for row in measure(source, held_out, arguments.threads)]
    with arguments.out.open("a") as stream:
        stream.writelines(json.dumps({**facts, "bytes": arguments.bytes, **row}) + "\n" for row in rows)
    print(table(rows))


def measure(source: Path, texts: list[Path], threads: int) -> list[dict[str, Any]]:
    """One row per width of the backbone."""
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            bits: Store(foregate.convert(source, Path(folder) / str(bits), bits=EXPERT_BITS, backbone_bits=bits))
            for bits in BACKBONE_BITS
        }
        models = {
            bits: foregate.load(store.path, memory="100%", threads=threads, readers=1) for bits, store in stores.items()
        }
        speeds = decode_speeds(models)
        rows = []
        for bits, store in stores.items():
            row: dict[str, Any] = {"model": source.name, "bits": EXPERT_BITS, "backbone_bits": bits}
            row["backbone_file_bytes"] = store.manifest.backbone_bytes + store.matrices_bytes
            row["backbone_memory_bytes"] = models[bits].foregate.budget.backbone_bytes
            row |= {"kernel": models[bits].foregate.kernel_note, **speeds[bits]}
            if texts:
                tokenizer = load_tokenizer(str(store.path))
                kinds = {text.stem: evaluate(models[bits], tokenizer, text).bits_per_byte for text in texts}
                row |= {"bits_per_byte": statistics.mean(kinds.values()), "bits_per_byte_by_kind": kinds}
            models[bits].foregate.close()
            rows.append(row)
            print(row, flush=True)
    return rows


def decode_speeds(models: dict[int, PreTrainedModel]) -> dict[int, dict[str, float]]:
    """Median tokens/s of greedy decoding after a short prompt, all experts in memory; least and most of the rounds."""
    prompt = torch.arange(3, 3 + PROMPT_TOKENS)[None]
    times: dict[int, list[float]] = {bits: [] for bits in models}
    for _ in range(SPEED_ROUNDS + 1):
        for bits, model in models.items():
            with torch.inference_mode():
                first = model(prompt, use_cache=True)
                token, cache = first.logits[:, -1:].argmax(-1), first.past_key_values
                start = time.perf_counter()
                for _ in range(SPEED_TOKENS):
                    step = model(token, past_key_values=cache, use_cache=True)
                    token = step.logits[:, -1:].argmax(-1)
                times[bits].append(SPEED_TOKENS / (time.perf_counter() - start))
    return {
        bits: {"tokens_per_second": statistics.median(rates[1:]), "least": min(rates[1:]), "most": max(rates[1:])}
        for bits, rates in times.items()
    }


def excerpts(folder: Path, nbytes: int) -> list[Path]:
    """The first bytes of every held-out text, as files."""
    texts = []
    for source in sorted((ROOT / "demo/text").glob("*.txt")):
        text = folder / source.name
        text.write_text(source.read_bytes()[:nbytes].decode(errors="ignore"))
        texts.append(text)
    return texts


def save_inflated(folder: Path) -> Path:
    """A random bf16 Mixtral whose backbone weighs about as much as its experts."""
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**INFLATED)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, losses relative to the row of the same model at 16 bits."""
    base = {row["model"]: row.get("bits_per_byte") for row in rows if row["backbone_bits"] == 16}
    lines = [
        "| model | backbone bits | files, MB | in memory, MB | bits/byte | against 16 | tokens/s (least to most) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        loss, first = row.get("bits_per_byte"), base[row["model"]]
        quality = f"{loss:.4f} | {loss / first - 1:+.2%}" if loss and first else " | "
        speed = f"{row['tokens_per_second']:.1f} ({row['least']:.1f} to {row['most']:.1f})"
        lines.append(
            f"| {row['model']} | {row['backbone_bits']} | {row['backbone_file_bytes'] / 1e6:.2f} "
            f"| {row['backbone_memory_bytes'] / 1e6:.2f} | {quality} | {speed} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
