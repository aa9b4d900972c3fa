"""A conversion of a checkpoint as large as asked for: its memory, its speed, and what ten kills do to it.

    python benchmarks/large_conversion.py --gigabytes 20 --folder /somewhere/with/40/GB

Writes a synthetic checkpoint of Mixtral's shape (bf16, sharded, random weights; at 20 GB its real dimensions and 7
layers), converts it once undisturbed and once killed with SIGKILL at random moments and resumed, and compares both
stores file by file. Writes the figures and fails when the stores differ, or memory or kills are not as they should be.
"""

import argparse
import hashlib
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

import foregate

LAYERS, EXPERTS = 7, 8
FULL_GIGABYTES, FULL_HIDDEN, WIDTH = 20, 4096, 3.5  # Mixtral 8x7B: inner size = WIDTH * hidden
HEAD_SIZE, VOCABULARY = 64, 4096
EXTRA_BYTES = 500_000_000  # that a conversion may use beside one layer
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """One conversion process: how it ended and what it used until then."""

    seconds: float
    startup: float  # seconds until it had its folder
    peak_bytes: int  # resident, the process's own high-water mark
    layers_done: int  # layers in the journal when it started
    killed: bool


@dataclass(frozen=True)
class Kill:
    """When to kill a conversion: `delay` seconds after its journal has `layer` layers, or after `startup` if it had."""

    layer: int
    startup: float
    delay: float


def main() -> None:
    """Measure, write the figures, and fail where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=FULL_GIGABYTES, help="of the checkpoint, about")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; needs 1.7 times the checkpoint's size")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large-conversion.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(Path(folder), arguments.gigabytes, arguments.bits, arguments.kills, arguments.seed)
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key not in ("runs", "sha256")}, indent=1))
    missed = [name for name in ("same_bytes", "memory_within_bar", "all_kills_hit") if not figures[name]]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


def measure(folder: Path, gigabytes: float, bits: int, kills: int, seed: int) -> dict[str, Any]:
    """Everything, as figures for the result file."""
    config = make_checkpoint(folder / "checkpoint", gigabytes, seed)
    weights = LAYERS * EXPERTS * 3 * config.hidden_size * config.intermediate_size
    plain = run_conversion(folder, "undisturbed", bits)
    expected = checksums(folder / "undisturbed")
    runs = run_with_kills(folder, "killed", bits, kills, plain, random.Random(seed))
    layer_bytes = 2 * weights // LAYERS
    peak = max(run.peak_bytes for run in [plain, *runs])
    return {
        "platform": platform.platform(),
        "foregate": foregate.__version__,
        "bits": bits,
        "checkpoint_bytes": folder_bytes(folder / "checkpoint"),
        "layer_bytes": layer_bytes,
        "expert_weights": weights,
        "store_bytes": folder_bytes(folder / "undisturbed"),
        "seconds": plain.seconds,
        "weights_per_second": weights / plain.seconds,
        "peak_bytes": peak,
        "memory_within_bar": peak <= layer_bytes + EXTRA_BYTES,
        "kills": sum(run.killed for run in runs),
        "all_kills_hit": sum(run.killed for run in runs) == kills,
        "same_bytes": checksums(folder / "killed") == expected,
        "runs": [asdict(run) for run in [plain, *runs]],
        "sha256": expected,
    }


def make_checkpoint(folder: Path, gigabytes: float, seed: int) -> MixtralConfig:
    """Write a random Mixtral checkpoint, a shard per expert; returns its configuration."""
    hidden = max(1, round(FULL_HIDDEN / 128 * (gigabytes / FULL_GIGABYTES) ** 0.5)) * 128
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=int(WIDTH * hidden),
        num_hidden_layers=LAYERS,
        num_local_experts=EXPERTS,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        vocab_size=VOCABULARY,
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir()
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    index = {}
    for number, shapes in enumerate(shard_shapes(config)):
        shard = f"model-{number:05}.safetensors"
        save_file({name: random_weights(shape) for name, shape in shapes.items()}, folder / shard)
        index |= dict.fromkeys(shapes, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return config


def shard_shapes(config: MixtralConfig) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of every shard's tensors, as Mixtral's checkpoints call them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    square, norm, ends = (hidden, hidden), (hidden,), (config.vocab_size, hidden)
    backbone = {"model.embed_tokens.weight": ends, "model.norm.weight": norm, "lm_head.weight": ends}
    shards = [backbone]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        backbone |= {f"{prefix}.self_attn.{name}_proj.weight": square for name in "qkvo"}
        backbone |= {f"{prefix}.{name}_layernorm.weight": norm for name in ("input", "post_attention")}
        backbone[f"{prefix}.block_sparse_moe.gate.weight"] = (EXPERTS, hidden)
        for expert in range(EXPERTS):
            name = f"{prefix}.block_sparse_moe.experts.{expert}"
            up, down = (inner, hidden), (hidden, inner)
            shards.append({f"{name}.w1.weight": up, f"{name}.w3.weight": up, f"{name}.w2.weight": down})
    return shards


def random_weights(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def run_conversion(folder: Path, name: str, bits: int, kill: Kill | None = None) -> Run:
    """One conversion process, killed when it is time to unless it is done before. Raises when it fails."""
    layers_done = len(read_journal(folder, name))
    command = [sys.executable, "-m", "foregate.cli.main", "convert", "checkpoint", name, "--bits", str(bits)]
    start, working, peak, end = time.perf_counter(), None, 0, float("inf")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None and (now := time.perf_counter()) < end:
            peak = max(peak, high_water_mark(process.pid))
            if working is None and (folder / f"{name}.partial").exists():
                working = now - start
            if kill and end == float("inf") and len(read_journal(folder, name)) >= kill.layer:
                end = now + kill.delay + (kill.startup if layers_done >= kill.layer else 0)
            time.sleep(POLL_SECONDS)
        process.send_signal(signal.SIGKILL)  # of a process that is done already: nothing
        code = process.wait()
        if code not in (0, -signal.SIGKILL):
            errors.seek(0)
            raise RuntimeError(f"the conversion failed: {errors.read().decode()}")
    done = (folder / name).exists()
    return Run(time.perf_counter() - start, working or 0, peak, layers_done, killed=not done)


def run_with_kills(folder: Path, name: str, bits: int, kills: int, plain: Run, generator: random.Random) -> list[Run]:
    """A conversion that is killed at random moments, spread over all layers, and resumed until it is done."""
    layer_seconds = (plain.seconds - plain.startup) / LAYERS
    runs: list[Run] = []
    for moment in sorted(generator.uniform(0, LAYERS - 0.2) for _ in range(kills)):
        runs.append(run_conversion(folder, name, bits, Kill(int(moment), plain.startup, moment % 1 * layer_seconds)))
        if not runs[-1].killed:
            return runs
    return [*runs, run_conversion(folder, name, bits)]


def read_journal(folder: Path, name: str) -> list[list[str]]:
    """The checksums of the layers that an unfinished conversion has done."""
    try:
        return json.loads((folder / f"{name}.partial/journal.json").read_text()).get("layers", [])
    except FileNotFoundError:  # not begun, or just finished
        return []


def high_water_mark(pid: int) -> int:
    """Most bytes that the process ever held resident; 0 when it has just ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a store."""
    result = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            result[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return result


if __name__ == "__main__":
    main()
