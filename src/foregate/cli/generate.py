"""`foregate generate`: stream text from a store, then say how it went."""

import sys
import time
from pathlib import Path

import typer

from foregate.config import EngineConfig, GenerateConfig

NAME = "generate"
POLICY_HELP = (
    "What stays in memory and what is fetched ahead: lookahead (as the gates expect), lru (least recently used leaves), "
    "demand (nothing is kept), mixtral-offloading or mixtral-offloading-code (the baselines); auto is lookahead where "
    "the store has gates, otherwise lru."
)
MEMORY_HELP = "A share of the experts (25%), or bytes for all that the process holds (8GiB); foregate plan shows them."
CONTEXT_HELP = "Tokens that memory is planned for, prompt and reply together"

THREADS_HELP = "Threads that compute; 0 is one per core."
KERNEL_HELP = "What computes: cpu (native), reference (PyTorch), or auto, the faster that works here."
EXACT_HELP = "Keep activations in float32 with quantized experts; otherwise they are rounded to int8, which is faster."


def run(
    store: Path = typer.Argument(..., metavar="STORE", help="Folder of a converted model."),
    prompt: str = typer.Option(..., help="Text to continue."),
    max_new_tokens: int = typer.Option(GenerateConfig.max_new_tokens, help="Stop after so many tokens."),
    memory: str = typer.Option(EngineConfig.memory, help=MEMORY_HELP),
    context: int = typer.Option(None, min=1, help=f"{CONTEXT_HELP}; by default those of this run."),
    policy: str = typer.Option(EngineConfig.policy, help=POLICY_HELP),
    threads: int = typer.Option(EngineConfig.threads, help=THREADS_HELP),
    kernel: str = typer.Option(EngineConfig.kernel, help=KERNEL_HELP),
    exact: bool = typer.Option(EngineConfig.exact, help=EXACT_HELP),
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
        {"memory": memory, "policy": policy, "threads": threads, "kernel": kernel, "exact": exact},
        {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed},
        report,
        context,
    )


def generate_and_report(
    store: Path,
    prompt: str,
    engine_settings: dict,
    generate_settings: dict,
    report_path: Path | None,
    context: int | None = None,
) -> None:
    """Load, stream the text to stdout, print the summary to stderr and write the report if asked."""
    from foregate import load
    from foregate.checkpoint.store import Store
    from foregate.model.generate import count_tokens, generate, load_tokenizer
    from foregate.report import build_report, check_report_path, write_report

    if report_path is not None:
        check_report_path(report_path)
    start = time.perf_counter()
    Store(store)  # what is wrong with the folder is said before anything is loaded
    tokenizer = load_tokenizer(str(store))
    prompt_tokens = count_tokens(tokenizer, prompt)
    context = context or prompt_tokens + max(generate_settings["max_new_tokens"], 1)
    model = load(store, **engine_settings, context=context, prompt=prompt_tokens)
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
