"""`foregate convert`: a checkpoint becomes a store."""

import time
from pathlib import Path

import typer

from foregate.config import ConvertConfig

NAME = "convert"


def run(
    source: str = typer.Argument(..., metavar="SRC", help="Checkpoint folder with safetensors weights, or a hub id."),
    destination: Path = typer.Argument(..., metavar="DST", help="Where the store will be; must not exist yet."),
    bits: int = typer.Option(
        ConvertConfig.bits, help="Bits per expert weight: 16 (the checkpoint's own), 8, 4, 3 or 2."
    ),
    quantizer: str = typer.Option(
        ConvertConfig.quantizer, help="How to quantize: refit, hqq or rtn; with --trace gptq or refit."
    ),
    trace: Path = typer.Option(
        None, metavar="DIR", help="Trace of this model: errors are weighted by the inputs that experts really see."
    ),
    backbone_bits: int = typer.Option(
        ConvertConfig.backbone_bits, help="Bits per weight of attention, shared experts and dense layers: 16, 8 or 4."
    ),
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
    store = Store(path)
    if store.manifest.unused_tensors:
        print(f"left out: {store.manifest.unused_tensors} tensors that the text model has no place for")
    if kept := store.manifest.kept_matrices:
        print(f"not quantized: {len(kept)} linear modules whose weights are used in other ways too, first {kept[0]}")
    backbone_bytes = store.manifest.backbone_bytes + store.matrices_bytes
    print(
        f"{path}: {len(store.layers)} MoE layers, {store.num_experts} experts of {store.record_bytes / 2**20:.2f} MiB, "
        f"backbone {backbone_bytes / 2**20:.1f} MiB, in {time.perf_counter() - start:.1f} s"
    )
