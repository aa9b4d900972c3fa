"""`foregate generate`: stream text from a model, then say how it went."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import options
from foregate.cli.units import link_settings
from foregate.config import EngineConfig, GenerateConfig, ReportConfig

NAME = "generate"
EXAMPLE = "foregate generate model.store --prompt 'Once upon a time' --memory 25%"


def run(
    model: options.Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")],
    max_new_tokens: options.MaxNewTokens = GenerateConfig.max_new_tokens,
    memory: options.Memory = EngineConfig.memory,
    context: options.PlannedContext = None,
    policy: options.Policy = EngineConfig.policy,
    threads: options.Threads = EngineConfig.threads,
    kernel: options.Kernel = EngineConfig.kernel,
    exact: options.Exact = EngineConfig.exact,
    device: options.Device = EngineConfig.device,
    host_memory: options.HostMemory = EngineConfig.host_memory,
    eager: options.Eager = EngineConfig.eager,
    link_bandwidth: options.LinkBandwidth = None,
    link_latency: options.LinkLatency = None,
    temperature: options.Temperature = GenerateConfig.temperature,
    top_p: options.TopP = GenerateConfig.top_p,
    seed: options.Seed = GenerateConfig.seed,
    report: options.Report = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text and report as one JSON object on stdout, at the end.")
    ] = False,
    bits: options.Bits = None,
    yes: options.Yes = False,
) -> None:
    """Continue a prompt with only part of the model's experts in memory.

    The text goes to stdout as it comes, the summary to stderr.
    On the CPU, and on a card with --exact, the text does not depend on memory size and policy.
    """
    from foregate.cli.models import open_model
    from foregate.report import check_report_path

    if report is not None:
        check_report_path(report)
    generate_and_report(
        open_model(model, bits, yes),
        prompt,
        {"memory": memory, "policy": policy, "threads": threads, "kernel": kernel, "exact": exact}
        | {"device": device, "host_memory": host_memory, "eager": eager}
        | link_settings(link_bandwidth, link_latency),
        {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed},
        report,
        context,
        as_json,
    )


def generate_and_report(
    store: Path,
    prompt: str,
    engine_settings: dict,
    generate_settings: dict,
    report_path: Path | None,
    context: int | None = None,
    as_json: bool = False,
) -> None:
    """Load a checked store and write its text to stdout as it comes, then the summary to stderr; or all of it as JSON."""
    from foregate import load
    from foregate.model.generate import count_tokens, generate, load_tokenizer
    from foregate.report import build_report, to_text, write_report

    start = time.perf_counter()
    tokenizer = load_tokenizer(str(store))
    prompt_tokens = count_tokens(tokenizer, prompt)
    context = context or prompt_tokens + max(generate_settings["max_new_tokens"], 1)
    model = load(store, **engine_settings, context=context, prompt=min(prompt_tokens, GenerateConfig.prompt_piece))
    load_seconds = time.perf_counter() - start
    emit = _ignore if as_json else _write
    if report_path is not None or as_json:
        model.foregate.recorder.record_timeline(ReportConfig.events)
    result = generate(model, tokenizer, prompt, emit=emit, start=lambda: emit(prompt), **generate_settings)
    emit("\n")
    report = build_report(
        model.foregate,
        {**engine_settings, "policy": model.foregate.policy, **generate_settings},
        {"prompt": result.prompt_tokens, "generated": result.new_tokens},
        {"load": load_seconds, "first_token": result.first_token_seconds, "decode": result.decode_seconds},
    )
    if report_path is not None:
        write_report(report, report_path)
    if as_json:
        print(to_text({"prompt": prompt, "text": result.text, **report}), end="")
        return
    from foregate.cli.summary import print_summary  # now: rich would count in the peak that the report names

    print_summary(report)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    pass
