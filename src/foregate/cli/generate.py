"""`foregate generate`: stream text from a store, then say how it went."""

import sys
import time
from pathlib import Path

import typer

from foregate.cli.units import parse_bandwidths, parse_seconds
from foregate.config import EngineConfig, GenerateConfig

NAME = "generate"
POLICY_HELP = (
    "What stays in memory and what is fetched ahead: lookahead (as the gates expect), lru (least recently used leaves), "
    "demand (nothing is kept), mixtral-offloading or mixtral-offloading-code (the baselines); auto is lookahead where "
    "the store has gates, otherwise lru."
)
MEMORY_HELP = "A share of the experts (25%), or bytes for backbone and experts together (8GiB)."

THREADS_HELP = "Threads that compute; 0 is one per core."
KERNEL_HELP = (
    "What computes: cpu (native), triton (on a card), reference (PyTorch), or auto, the fastest that works here."
)
EXACT_HELP = (
    "Keep activations in float32 with quantized experts, otherwise rounded to int8 on the CPU, which is faster; with a "
    "device, compute all experts there."
)
DEVICE_HELP = (
    "Where the model is computed: cpu, cuda, auto (cuda where there is a card), or simulated (host memory stands for a "
    "device's). On a device, records lie in host memory, and --memory is the device's."
)
HOST_MEMORY_HELP = (
    "With a device: bytes of host memory for records (16GiB); the rest stays on disk. Default: all of them."
)


def run(
    store: Path = typer.Argument(..., metavar="STORE", help="Folder of a converted model."),
    prompt: str = typer.Option(..., help="Text to continue."),
    max_new_tokens: int = typer.Option(GenerateConfig.max_new_tokens, help="Stop after so many tokens."),
    memory: str = typer.Option(EngineConfig.memory, help=MEMORY_HELP),
    policy: str = typer.Option(EngineConfig.policy, help=POLICY_HELP),
    threads: int = typer.Option(EngineConfig.threads, help=THREADS_HELP),
    kernel: str = typer.Option(EngineConfig.kernel, help=KERNEL_HELP),
    exact: bool = typer.Option(EngineConfig.exact, help=EXACT_HELP),
    device: str = typer.Option(EngineConfig.device, help=DEVICE_HELP),
    host_memory: str | None = typer.Option(EngineConfig.host_memory, help=HOST_MEMORY_HELP),
    eager: bool = typer.Option(EngineConfig.eager, help="On a card, do not capture the backbone's decode steps."),
    link_bandwidth: str | None = typer.Option(None, help="Load records as if over a link this fast: 250MB, 1GB/s."),
    link_latency: str | None = typer.Option(None, help="Seconds more for each record on the link: 50us, 1.5ms."),
    temperature: float = typer.Option(GenerateConfig.temperature, help="0 is greedy; higher is more random."),
    top_p: float = typer.Option(GenerateConfig.top_p, help="Sample from the likeliest tokens of this total share."),
    seed: int = typer.Option(GenerateConfig.seed, help="Seed of the sampling."),
    report: Path | None = typer.Option(None, help="Write a JSON report of the run to this file."),
) -> None:
    """Continue a prompt with only part of the model's experts in memory.

    The text goes to stdout as it comes, the summary to stderr. It is the same text for every memory size and policy.
    """
    generate_and_report(
        store,
        prompt,
        {"memory": memory, "policy": policy, "threads": threads, "kernel": kernel, "exact": exact}
        | {"device": device, "host_memory": host_memory, "eager": eager}
        | link_settings(link_bandwidth, link_latency),
        {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed},
        report,
    )


def link_settings(bandwidth: str | None, latency: str | None) -> dict[str, float]:
    """What the options of the link say to `foregate.load`; nothing where they are not given. Raises ForegateError."""
    settings = {}
    if bandwidth is not None:
        settings["link_bandwidth"] = parse_bandwidths(bandwidth, "--link-bandwidth")[0]
    if latency is not None:
        settings["link_latency"] = parse_seconds(latency, "--link-latency")
    return settings


def generate_and_report(
    store: Path, prompt: str, engine_settings: dict, generate_settings: dict, report_path: Path | None
) -> None:
    """Load, stream the text to stdout, print the summary to stderr and write the report if asked."""
    from foregate import load
    from foregate.checkpoint.store import Store
    from foregate.model.generate import generate, load_tokenizer
    from foregate.report import build_report, check_report_path, write_report

    if report_path is not None:
        check_report_path(report_path)
    start = time.perf_counter()
    Store(store)  # what is wrong with the folder is said before anything is loaded
    tokenizer = load_tokenizer(str(store))
    model = load(store, **engine_settings)
    load_seconds = time.perf_counter() - start
    result = generate(model, tokenizer, prompt, emit=_write, start=lambda: _write(prompt), **generate_settings)
    _write("\n")
    report = build_report(
        model.foregate,
        {**engine_settings, "policy": model.foregate.policy, **generate_settings},
        {"prompt": result.prompt_tokens, "generated": result.new_tokens},
        {"load": load_seconds, "first_token": result.first_token_seconds, "decode": result.decode_seconds},
    )
    if report_path is not None:
        write_report(report, report_path)
    from foregate.cli.summary import print_summary  # now: rich would count in the peak that the report names

    print_summary(report)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
