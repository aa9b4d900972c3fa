"""`foregate demo`: a real trained MoE model writes text with a quarter of its experts in memory."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import options
from foregate.cli.generate import generate_and_report
from foregate.config import DemoConfig, EngineConfig

NAME = "demo"
EXAMPLE = "foregate demo --memory 50%"


def run(
    model: Annotated[
        Path, typer.Option(metavar="DIR", help="Checkpoint of the demo model, in the project's folder.")
    ] = Path(DemoConfig.model),
    store: Annotated[Path, typer.Option(metavar="DIR", help="Where its store is kept; converted on first use.")] = Path(
        DemoConfig.store
    ),
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")] = DemoConfig.prompt,
    memory: options.Memory = EngineConfig.memory,
    policy: options.Policy = EngineConfig.policy,
    report: options.Report = None,
) -> None:
    """Generate from the demo model with a quarter of its experts in memory. Run it in the project's folder."""
    from foregate import ForegateError, convert
    from foregate.report import check_report_path

    if report is not None:
        check_report_path(report)
    if not model.is_dir():
        raise ForegateError(f"no demo model in {model}: run this in the project's folder, or name it with --model")
    if not (store / "foregate.json").exists():
        path = convert(model, store)
        print(f"converted {model} to {path}", file=sys.stderr)
    settings = {
        "max_new_tokens": DemoConfig.max_new_tokens,
        "temperature": DemoConfig.temperature,
        "top_p": DemoConfig.top_p,
        "seed": DemoConfig.seed,
    }
    engine = {"memory": memory, "policy": policy, "threads": DemoConfig.threads}
    generate_and_report(store, prompt, engine, settings, report, as_json=False)
