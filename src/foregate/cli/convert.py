"""`foregate convert`: a checkpoint becomes a store."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foregate.cli import options
from foregate.config import ConvertConfig

if TYPE_CHECKING:
    from foregate.checkpoint.store import Store

NAME = "convert"
EXAMPLE = "foregate convert path/to/checkpoint model.store --bits 4"
MIB = 2**20


def run(
    source: options.Source,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Where the store will be; must not exist yet.")],
    bits: Annotated[
        int,
        typer.Option(metavar="BITS", help="Bits per expert weight: 16 (the checkpoint's own), 8, 4, 3 or 2."),
    ] = ConvertConfig.bits,
    quantizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How to quantize: refit, hqq or rtn; with --trace gptq or refit."),
    ] = ConvertConfig.quantizer,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Trace of this model: errors are weighted by the inputs that experts really see."
        ),
    ] = None,
    backbone_bits: Annotated[
        int,
        typer.Option(metavar="BITS", help="Bits per weight of attention, shared experts and dense layers: 16, 8 or 4."),
    ] = ConvertConfig.backbone_bits,
    as_json: options.Json = False,
) -> None:
    """Convert a Hugging Face MoE checkpoint into a store, one expert at a time.

    Needs little memory whatever the model's size. Interrupted or killed, run the same command again: it resumes.
    """
    from foregate import convert
    from foregate.checkpoint.store import Store
    from foregate.cli.progress import byte_progress

    start = time.perf_counter()
    with byte_progress("converting") as progress:
        path = convert(
            source,
            destination,
            bits=bits,
            quantizer=quantizer,
            backbone_bits=backbone_bits,
            trace=trace,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    store = Store(path)
    if as_json:
        print(json.dumps(_facts(store, seconds), indent=1))
    else:
        _print(store, seconds)


def _facts(store: Store, seconds: float) -> dict:
    return {
        "store": str(store.path),
        "layers": len(store.layers),
        "experts": store.num_experts,
        "bits": store.manifest.bits,
        "quantizer": store.manifest.quantizer,
        "record_bytes": store.record_bytes,
        "backbone_bytes": store.manifest.backbone_bytes + store.matrices_bytes,
        "unused_tensors": store.manifest.unused_tensors,
        "kept_matrices": list(store.manifest.kept_matrices),
        "seconds": seconds,
    }


def _print(store: Store, seconds: float) -> None:
    if store.manifest.unused_tensors:
        print(f"left out: {store.manifest.unused_tensors} tensors that the text model has no place for")
    if kept := store.manifest.kept_matrices:
        print(f"not quantized: {len(kept)} linear modules whose weights are used in other ways too, first {kept[0]}")
    backbone_bytes = store.manifest.backbone_bytes + store.matrices_bytes
    print(
        f"{store.path}: {len(store.layers)} MoE layers, {store.num_experts} experts of "
        f"{store.record_bytes / MIB:.2f} MiB, backbone {backbone_bytes / MIB:.1f} MiB, in {seconds:.1f} s"
    )
