"""`foregate demo`: a real trained MoE model writes text with a quarter of its experts in memory."""

import sys
from pathlib import Path

import typer

from foregate.cli.generate import MEMORY_HELP, POLICY_HELP, generate_and_report
from foregate.config import DemoConfig, EngineConfig

NAME = "demo"


def run(
    model: Path = typer.Option(DemoConfig.model, help="Checkpoint of the demo model, in the project's folder."),
    store: Path = typer.Option(DemoConfig.store, help="Where its store is kept; converted on first use."),
    prompt: str = typer.Option(DemoConfig.prompt, help="Text to continue."),
    memory: str = typer.Option(EngineConfig.memory, help=MEMORY_HELP),
    policy: str = typer.Option(EngineConfig.policy, help=POLICY_HELP),
    report: Path | None = typer.Option(None, help="Write a JSON report of the run to this file."),
) -> None:
    """Generate from the demo model with a quarter of its experts in memory. Run it in the project's folder."""
    from foregate import ForegateError, convert

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
    generate_and_report(store, prompt, engine, settings, report)
