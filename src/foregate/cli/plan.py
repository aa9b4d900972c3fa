"""`foregate plan`: where every byte of a model will go, before it is downloaded, converted or loaded."""

import json
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import completion, options
from foregate.config import ConvertConfig, EngineConfig, PlanConfig

NAME = "plan"
EXAMPLE = "foregate plan path/to/checkpoint --memory 8GiB --context 8192"


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A store, a checkpoint's folder, or a hub id; config.json is all that is read.",
            autocompletion=completion.models,
        ),
    ],
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="A share of the experts (25%), or bytes for all that is held (8GiB).")
    ],
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="With a device: host memory for records; by default all it takes."),
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens that memory is planned for, prompt and reply together.")
    ] = EngineConfig.context,
    prompt: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of a prompt that one pass takes in.")
    ] = EngineConfig.prompt,
    max_running: Annotated[
        int, typer.Option(metavar="N", min=1, help="Replies that advance together, as of foregate serve.")
    ] = 1,
    bits: Annotated[
        int | None,
        typer.Option(metavar="BITS", help=f"Bits of the experts once converted; by default {PlanConfig.bits}."),
    ] = None,
    backbone_bits: Annotated[
        int, typer.Option(metavar="BITS", help="Bits of attention and shared experts.")
    ] = ConvertConfig.backbone_bits,
    policy: options.Policy = EngineConfig.policy,
    device: Annotated[str, typer.Option(metavar="NAME", help="Where the model runs: cpu or cuda.")] = "cpu",
    memory_bandwidth: Annotated[
        str | None, typer.Option(metavar="SPEED", help="Bytes a second that weights are read with, such as 40GB.")
    ] = None,
    link_bandwidth: Annotated[
        str | None, typer.Option(metavar="SPEED", help="Bytes a second of the disk, or of the bus to a device.")
    ] = None,
    machine: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Bandwidths that foregate doctor --json measured.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's bandwidths now.")] = False,
    as_json: options.Json = False,
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
        "sequences": max_running,
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
