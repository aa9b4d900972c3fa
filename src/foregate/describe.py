"""What a store or a checkpoint is, from its manifest or configuration and the headers of its files: no weight is read."""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from foregate.checkpoint.architecture import Architecture, inspect_architecture
from foregate.checkpoint.source import (
    GATES_FILE,
    STORE_MANIFEST,
    download_settings,
    find_checkpoint,
    load_config,
    open_checkpoint,
)
from foregate.checkpoint.store import UNQUANTIZED, RecordLayout, Store, Weight
from foregate.checkpoint.tensors import read_header
from foregate.errors import ForegateError
from foregate.lookahead.gates import GatesHeader
from foregate.quantize.matrix import BITS, QuantizedMatrix

Facts = dict[str, Any]


def describe(source: str) -> Facts:
    """Facts about the store, checkpoint or hub id `source`, fit for JSON; sizes in bytes.

    Of a hub id that was never downloaded only configuration and tokenizer are fetched. Raises ForegateError for what is
    none of these, and for files that are missing, cut short or do not fit each other.
    """
    path = Path(source).expanduser()
    if (path / STORE_MANIFEST).is_file():
        return describe_store(Store(path))
    folder = find_checkpoint(source)
    if path.is_dir():
        return describe_checkpoint(path.resolve())
    downloaded = folder is not None and any(folder.glob("*.safetensors"))
    return describe_checkpoint(folder if downloaded else download_settings(source), with_weights=downloaded)


def describe_store(store: Store) -> Facts:
    """Facts about an opened store."""
    manifest = store.manifest
    expert = [sum(prod(param.shape) for param in layer.layout.params) for layer in store.layers]
    experts = sum(n * layer.num_experts for n, layer in zip(expert, store.layers, strict=True))
    backbone = sum(prod(entry.shape) for entry in read_header(store.backbone_path).values())
    backbone += sum(prod(matrix.shape) for matrix in store.matrices)
    backbone_bytes = manifest.backbone_bytes + store.matrices_bytes
    return {
        "kind": "store",
        "path": str(store.path),
        "model": {"class": manifest.model_class, "type": manifest.model_type},
        **_shape([(layer.num_experts, layer.top_k) for layer in store.layers]),
        "parameters": _parameters(backbone, experts, expert, [layer.top_k for layer in store.layers]),
        "bits": manifest.bits,
        "quantizer": manifest.quantizer,
        "calibration_tokens": manifest.calibration.tokens if manifest.calibration else None,
        "backbone_bits": manifest.backbone_bits,
        "backbone_quantizer": manifest.backbone_quantizer,
        "bytes": {
            "backbone": backbone_bytes,
            "record": store.record_bytes,
            "experts": store.experts_bytes,
            "total": backbone_bytes + store.experts_bytes,
        },
        **_side_files(store.path),
    }


def describe_checkpoint(folder: Path, *, with_weights: bool = True) -> Facts:
    """Facts about the checkpoint in `folder`; `with_weights` checks that all its weights are there."""
    tensors = open_checkpoint(folder).tensors if with_weights else None
    architecture = inspect_architecture(load_config(folder))
    layers = architecture.layers
    expert = [sum(map(prod, layer.params.values())) for layer in layers]
    experts = sum(n * layer.num_experts for n, layer in zip(expert, layers, strict=True))
    backbone = sum(param.numel() for param in architecture.model.parameters()) - experts
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "model": {"class": architecture.class_name, "type": architecture.model.config.model_type},
        **_shape([(layer.num_experts, layer.top_k) for layer in layers]),
        "parameters": _parameters(backbone, experts, expert, [layer.top_k for layer in layers]),
        "bytes": {"total": None if tensors is None else sum(entry.nbytes for entry in tensors.values())},
        "as_store": {str(bits): _as_store(architecture, bits) for bits in (UNQUANTIZED, *reversed(BITS))},
        **_side_files(folder),
    }


def _shape(layers: list[tuple[int, int]]) -> Facts:
    """layers: (experts, top-k) of each."""
    counts, top_k = zip(*layers, strict=True)
    return {
        "moe_layers": len(layers),
        "experts": sum(counts),
        "experts_per_layer": [min(counts), max(counts)],
        "top_k": max(top_k),
    }


def _parameters(backbone: int, experts: int, expert: list[int], top_k: list[int]) -> Facts:
    """expert: of one expert of each layer. Shared experts and embeddings count as backbone, and for every token."""
    per_token = backbone + sum(n * k for n, k in zip(expert, top_k, strict=True))
    return {"total": backbone + experts, "backbone": backbone, "experts": experts, "per_token": per_token}


def _as_store(architecture: Architecture, bits: int) -> Facts:
    """Sizes of records once converted to `bits`, of the largest one and of all."""
    sizes = [_record_layout(layer.params, bits).nbytes for layer in architecture.layers]
    counts = [layer.num_experts for layer in architecture.layers]
    return {"record": max(sizes), "experts": sum(size * n for size, n in zip(sizes, counts, strict=True))}


def _record_layout(params: dict[str, tuple[int, ...]], bits: int) -> RecordLayout:
    def outline(shape: tuple[int, ...]) -> Weight:
        if bits == UNQUANTIZED or len(shape) != 2:
            return torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return QuantizedMatrix.outline(bits, *shape)

    return RecordLayout.of({name: outline(shape) for name, shape in params.items()})


def _side_files(folder: Path) -> Facts:
    tokenizer = any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )
    return {"tokenizer": tokenizer, "chat_template": _has_chat_template(folder), "gates": _gates(folder / GATES_FILE)}


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _gates(path: Path) -> Facts | None:
    """What the header of a file of lookahead gates says: recall is the mean over sources, nearest layer first."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = GatesHeader.from_json(file.metadata()["foregate"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        raise ForegateError(f"{path} is damaged: train the gates again with foregate align {path.parent}") from None
    recalls = [source["recall"] for source in header.trained.get("sources", ())]
    means = [sum(values) / len(values) for values in zip(*recalls, strict=False)]
    return {"horizon": header.horizon, "width": header.width, "bytes": path.stat().st_size, "recall": means or None}
