"""What first models take: disk, memory and the time to get them, from their shapes and this folder's measurements.

    python benchmarks/first_models.py --json OUT

Nothing is downloaded: the shapes are those of the public configurations, and every parameter in 16 bits makes the
checkpoint. Times are estimates: a download over the network, and the quantizer at its measured speed, reading and writing
apart. What a model will do once it is there is what `foregate plan` says.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, OlmoeConfig, PretrainedConfig, Qwen3MoeConfig

from foregate.checkpoint.architecture import Architecture, backbone_matrices, inspect_architecture
from foregate.checkpoint.store import RecordLayout
from foregate.quantize.matrix import QuantizedMatrix

QUANTIZING = Path(__file__).parent / "results/quantizing_speed.json"
BITS, BACKBONE_BITS = (4, 3, 2), 8
NETWORK = 100e6 / 8  # bytes/s: a line of 100 Mbit/s
MODELS: dict[str, PretrainedConfig] = {  # where nothing is named, the defaults of transformers' own classes are right
    "allenai/OLMoE-1B-7B-0924-Instruct": OlmoeConfig(intermediate_size=1024),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": Qwen3MoeConfig(
        **{"num_hidden_layers": 48, "hidden_size": 2048, "head_dim": 128, "num_attention_heads": 32},
        **{"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        **{"vocab_size": 151936, "tie_word_embeddings": False},
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MixtralConfig(),
}


def main() -> None:
    """Print a table, and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    rows = {name: describe(config) for name, config in MODELS.items()}
    for name, row in rows.items():
        print(name, json.dumps(row))
    parser.parse_args().json.write_text(json.dumps({"assumed": assumptions(), "models": rows}, indent=1) + "\n")


def describe(config: PretrainedConfig) -> dict[str, Any]:
    """Sizes in bytes, times in seconds."""
    architecture = inspect_architecture(config)
    parameters = sum(parameter.numel() for parameter in architecture.model.parameters())
    experts = sum(layer.num_experts for layer in architecture.layers)
    weights = experts * sum(rows * cols for rows, cols in architecture.layers[0].params.values())
    records = {bits: record_bytes(architecture, bits) for bits in BITS}
    disk, memory = backbone_bytes(architecture)
    used = len(architecture.layers) * architecture.layers[0].top_k * records[BITS[0]]
    return {
        "parameters": parameters,
        "checkpoint_bytes": 2 * parameters,
        "record_bytes": records,
        "store_bytes": {bits: experts * size + disk for bits, size in records.items()},
        "experts_bytes": {bits: experts * size for bits, size in records.items()},
        "backbone_bytes": memory,
        "expert_bytes_a_token": used,
        "download_seconds": 2 * parameters / NETWORK,
        "convert_seconds": weights / assumptions()["weights_per_second"],
    }


def record_bytes(architecture: Architecture, bits: int) -> int:
    """One expert at so many bits."""
    params = architecture.layers[0].params
    return RecordLayout.of({name: QuantizedMatrix.outline(bits, *shape) for name, shape in params.items()}).nbytes


def backbone_bytes(architecture: Architecture) -> tuple[int, int]:
    """On disk and in memory, with its matrices at BACKBONE_BITS: the rest has 16 bits there and 32 here."""
    packed = backbone_matrices(architecture).shapes
    matrices = sum(
        RecordLayout.of({"w": QuantizedMatrix.outline(BACKBONE_BITS, *s)}).packed_bytes for s in packed.values()
    )
    elsewhere = {f"{layer.name}.{name}" for layer in architecture.layers for name in layer.params}
    elsewhere |= {f"{path}.weight" for path in packed}
    named = architecture.model.named_parameters()
    rest = sum(parameter.numel() for name, parameter in named if name not in elsewhere)
    return matrices + rest * torch.bfloat16.itemsize, matrices + rest * torch.float32.itemsize


def assumptions() -> dict[str, float]:
    """The network, bytes/s, and the quantizer's speed as it was measured."""
    (speed,) = [
        row["wall"]
        for row in json.loads(QUANTIZING.read_text())["rows"]
        if (row["quantizer"], row["bits"], row["threads"]) == ("refit", BITS[0], 2)
    ]
    return {"weights_per_second": 1e6 * speed, "network": NETWORK}


if __name__ == "__main__":
    main()
