"""`foregate plan`: where every byte of a model will go, before it is downloaded, converted or loaded."""

import json
from pathlib import Path

import typer

from foregate.cli.generate import CONTEXT_HELP, MEMORY_HELP, POLICY_HELP
from foregate.config import ConvertConfig, EngineConfig, PlanConfig

NAME = "plan"


def run(
    model: str = typer.Argument(
        ..., metavar="MODEL", help="A store, a checkpoint's folder, or a hub id; config.json is all that is read."
    ),
    memory: str = typer.Option(..., help=MEMORY_HELP.partition(";")[0] + "."),
    host_memory: str = typer.Option(None, help="With a device: host memory for records; by default all it takes."),
    context: int = typer.Option(EngineConfig.context, min=1, help=f"{CONTEXT_HELP}."),
    prompt: int = typer.Option(EngineConfig.prompt, min=1, help="Tokens of a prompt that one pass takes in."),
    bits: int = typer.Option(None, help=f"Bits of the experts once converted; by default {PlanConfig.bits}."),
    backbone_bits: int = typer.Option(ConvertConfig.backbone_bits, help="Bits of attention and shared experts."),
    policy: str = typer.Option(EngineConfig.policy, help=POLICY_HELP),
    device: str = typer.Option("cpu", help="Where the model runs: cpu or cuda."),
    memory_bandwidth: str = typer.Option(None, help="Bytes a second that weights are read with, such as 40GB."),
    link_bandwidth: str = typer.Option(None, help="Bytes a second of the disk, or of the bus to a device."),
    machine: Path = typer.Option(None, metavar="FILE", help="Bandwidths that foregate doctor --json measured."),
    measure: bool = typer.Option(False, "--measure", help="Measure this machine's bandwidths now."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON, for scripts."),
) -> None:
    """Say where a model's bytes will go, what fits at each bit width, the largest context, and how fast it may be.

    Nothing is downloaded but a configuration. `generate`, `serve` and `load` divide memory by the same plan.
    """
    import foregate
    from foregate.cli.units import parse_bandwidths

    if machine and measure:
        raise foregate.ForegateError("--machine and --measure both say how fast this machine is: leave one out")
    bandwidths = {
        name: parse_bandwidths(text, option)[0] if text else None
        for name, text, option in (
            ("memory_bandwidth", memory_bandwidth, "--memory-bandwidth"),
            ("link_bandwidth", link_bandwidth, "--link-bandwidth"),
        )
    }
    wanted = {
        "host_memory": host_memory,
        "context": context,
        "prompt": prompt,
        "bits": bits,
        "backbone_bits": backbone_bits,
        "policy": policy,
        "device": device,
        **bandwidths,
    }
    found = foregate.plan(model, memory, machine=machine, **wanted)
    if measure:  # after memory was planned: measuring takes some itself
        from foregate.doctor import examine

        found = foregate.plan(model, memory, machine=examine().to_json(), **wanted)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        from foregate.cli.plan_table import print_plan

        print_plan(found)
