"""Arguments and options that several commands share, each with its help and completion, once.

Their defaults are given where a command uses them: `memory: options.Memory = EngineConfig.memory`.
"""

from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import completion
from foregate.config import CacheConfig


def example_line(command: str) -> str:
    """The last line of a command's help."""
    return f"Example: {command}"


# -- models ---------------------------------------------------------------------------------------------------------

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A store, a checkpoint folder or a hub id; the latter two are converted once, into a cache.",
        autocompletion=completion.models,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        metavar="BITS",
        help=f"Of a checkpoint's conversion: 16, 8, 4, 3 or 2 bits per expert weight; by default {CacheConfig.bits}.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Download and convert a checkpoint without asking.")]
Store = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder of a converted model.", autocompletion=completion.models)
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Checkpoint folder with safetensors weights, or a hub id.",
        autocompletion=completion.models,
    ),
]

# -- the engine -----------------------------------------------------------------------------------------------------

MEMORY_HELP = "A share of the experts (25%), or bytes for all that the process holds (8GiB); foregate plan shows them."
Memory = Annotated[str, typer.Option(metavar="SIZE", help=MEMORY_HELP)]
MemoryOfText = Annotated[str, typer.Option("--memory", metavar="SIZE", help=f"With --text: {MEMORY_HELP}")]
PlannedContext = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="N",
        min=1,
        help="Tokens that memory is planned for, prompt and reply together; by default those of this run.",
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What stays in memory and what is fetched ahead: lookahead (as the gates expect), lru (least recently used "
        "leaves), demand (nothing is kept), mixtral-offloading or mixtral-offloading-code (the baselines); auto is "
        "lookahead where the store has gates, otherwise lru.",
        autocompletion=completion.policies,
    ),
]
Threads = Annotated[int, typer.Option(metavar="N", help="Threads that compute; 0 is one per core.")]
Kernel = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What computes: cpu (native), triton (on a card), reference (PyTorch), or auto, the fastest that works here.",
        autocompletion=completion.kernels,
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Keep activations in float32 with quantized experts, otherwise rounded to int8 on the CPU, which is faster; "
        "with a device, compute all experts there.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Where the model is computed: cpu, cuda, auto (cuda where there is a card), or simulated (host memory stands "
        "for a device's). On a device, records lie in host memory, and --memory is the device's.",
        autocompletion=completion.devices,
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="With a device: bytes of host memory for records (16GiB); the rest stays on disk. By default all of them.",
    ),
]
Eager = Annotated[bool, typer.Option("--eager", help="On a card, do not capture the backbone's decode steps.")]
LinkBandwidth = Annotated[
    str | None, typer.Option(metavar="SPEED", help="Load records as if over a link this fast: 250MB, 1GB/s.")
]
LinkLatency = Annotated[
    str | None, typer.Option(metavar="TIME", help="Time that each record takes beside its bytes: 50us, 1.5ms.")
]

# -- text -----------------------------------------------------------------------------------------------------------

MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Stop after so many tokens.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the sampling.")]
TEMPERATURE_HELP = "0 is greedy; higher is more random."
TOP_P_HELP = "Sample from the likeliest tokens of this total share."
Temperature = Annotated[float, typer.Option(metavar="T", help=TEMPERATURE_HELP)]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", help=TOP_P_HELP)]
Texts = Annotated[list[Path], typer.Option("--text", metavar="FILE", help="UTF-8 text; may be given several times.")]
Window = Annotated[int, typer.Option("--window", metavar="N", help="With --text: tokens of a sequence.")]
Scratch = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="With --text: folder for the temporary trace; by default where the store lies."),
]

Context = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Tokens of prompt and reply together; the model's own limit counts if it is smaller.",
    ),
]

# -- results --------------------------------------------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text for people.")]
Report = Annotated[Path | None, typer.Option(metavar="FILE", help="Write every figure as JSON into this file.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw a picture: a name ending with .png, .svg or .pdf.")
]
