"""`foregate serve`: an OpenAI-compatible server with a page that shows the experts."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import options
from foregate.config import EngineConfig, ServeConfig

NAME = "serve"
EXAMPLE = "foregate serve model.store --memory 25% --port 8000"


def run(
    model: options.Model,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = ServeConfig.port,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; by default only this machine can connect.")
    ] = ServeConfig.host,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The model's name in the API; by default the folder's.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the key clients must send; FOREGATE_API_KEY may hold it instead."),
    ] = None,
    memory: options.Memory = EngineConfig.memory,
    policy: options.Policy = EngineConfig.policy,
    threads: options.Threads = EngineConfig.threads,
    kernel: options.Kernel = EngineConfig.kernel,
    exact: options.Exact = EngineConfig.exact,
    device: options.Device = EngineConfig.device,
    host_memory: options.HostMemory = EngineConfig.host_memory,
    context: options.Context = ServeConfig.context,
    max_running: Annotated[
        int, typer.Option(metavar="N", help="Replies that advance together.")
    ] = ServeConfig.max_running,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", help="Replies that may wait; more are refused with 429.")
    ] = ServeConfig.max_waiting,
    prompt_chunk: Annotated[
        int, typer.Option(metavar="N", help="Prompt tokens computed between two tokens of the running replies.")
    ] = ServeConfig.prompt_chunk,
    bits: options.Bits = None,
    yes: options.Yes = False,
) -> None:
    """Serve a model over HTTP: OpenAI's chat and completions API, metrics, and a page at / with a chat and the experts.

    Ctrl-C lets running replies finish; a second one does not wait.
    """
    from foregate import ForegateError
    from foregate.cli.models import open_model

    try:
        from foregate.serve.server import Address, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise ForegateError(f"the server needs the package {error.name}: pip install 'foregate[serve]'") from None
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn when it has shut down
        serve(
            open_model(model, bits, yes),
            engine={
                "memory": memory,
                "policy": policy,
                "threads": threads,
                "kernel": kernel,
                "exact": exact,
                "device": device,
                "host_memory": host_memory,
                "eager": True,  # captured steps need one KV cache that stays where it is
            },
            address=Address(host, port),
            name=name or Path(model).expanduser().resolve().name,
            key_file=api_key_file,
            limits={
                "context": context,
                "max_running": max_running,
                "max_waiting": max_waiting,
                "prompt_chunk": prompt_chunk,
            },
            announce=lambda line: print(line, file=sys.stderr, flush=True),
        )
