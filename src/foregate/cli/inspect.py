"""`foregate inspect`: what a store or a checkpoint is."""

import json
from typing import Any

from foregate.cli import options
from foregate.sizes import format_bytes

NAME = "inspect"
EXAMPLE = "foregate inspect model.store"


def run(model: options.Model, as_json: options.Json = False) -> None:
    """Say what a store or checkpoint is: family, experts, sizes, quantization, gates. Exit code 2 if files are missing.

    Nothing is converted, and no weight is read. Of a hub id only configuration and tokenizer are downloaded.
    """
    from foregate.describe import describe

    facts = describe(model)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    rows = {**_model(facts), **(_store_sizes(facts) if facts["kind"] == "store" else _checkpoint_sizes(facts))}
    for name, value in {**rows, **_beside(facts)}.items():
        print(f"{name:<14} {value}")


def _model(facts: dict[str, Any]) -> dict[str, str]:
    least, most = facts["experts_per_layer"]
    count, used = facts["parameters"]["total"], facts["parameters"]["per_token"]
    return {
        facts["kind"]: facts["path"],
        "model": f"{facts['model']['class']} ({facts['model']['type']})",
        "experts": f"{facts['experts']:,}: {facts['moe_layers']} MoE layers of {least if least == most else f'{least}-{most}'}, "
        f"{facts['top_k']} used per token",
        "parameters": f"{_count(count)}, {_count(used)} of them for a token",
    }


def _store_sizes(facts: dict[str, Any]) -> dict[str, str]:
    size, tokens = facts["bytes"], facts["calibration_tokens"]
    calibrated = f", calibrated with {tokens:,} tokens" if tokens else ""
    return {
        "expert weights": f"{facts['bits']} bits{_by(facts['quantizer'])}{calibrated}",
        "backbone": f"{format_bytes(size['backbone'])}, {facts['backbone_bits']} bits{_by(facts['backbone_quantizer'])}",
        "a record": format_bytes(size["record"]),
        "all records": format_bytes(size["experts"]),
    }


def _checkpoint_sizes(facts: dict[str, Any]) -> dict[str, str]:
    total = facts["bytes"]["total"]
    rows = {"weights": "not downloaded" if total is None else f"{format_bytes(total)}, all files are there"}
    for bits, size in facts["as_store"].items():
        rows[f"at {bits} bits"] = f"experts {format_bytes(size['experts'])}, a record {format_bytes(size['record'])}"
    return rows


def _beside(facts: dict[str, Any]) -> dict[str, str]:
    gates = facts["gates"]
    rows = {"tokenizer": "yes" if facts["tokenizer"] else "none: text cannot be read or written"}
    rows["chat template"] = "yes" if facts["chat_template"] else "none"
    rows["gates"] = "none: foregate align trains them"
    if gates:
        recall = " / ".join(f"{value:.2f}" for value in gates["recall"] or ())
        rows["gates"] = f"{gates['horizon']} layers ahead, width {gates['width']}, {format_bytes(gates['bytes'])}" + (
            f", recall {recall}" if recall else ""
        )
    return rows


def _by(quantizer: str) -> str:
    return "" if quantizer == "none" else f" by {quantizer}"


def _count(parameters: int) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if parameters >= size:
            return f"{parameters / size:,.1f} {unit}"
    return f"{parameters:,}"
