"""`foregate serve`: an OpenAI-compatible server with a page that shows the experts."""

import contextlib
import sys
from pathlib import Path

import typer

from foregate.cli.generate import EXACT_HELP, KERNEL_HELP, MEMORY_HELP, POLICY_HELP, THREADS_HELP
from foregate.config import EngineConfig, ServeConfig

NAME = "serve"


def run(
    store: Path = typer.Argument(..., metavar="STORE", help="Folder of a converted model."),
    port: int = typer.Option(ServeConfig.port, min=0, max=65535, help="Port to listen on; 0 takes a free one."),
    host: str = typer.Option(ServeConfig.host, help="Address to listen on; by default only this machine can connect."),
    name: str = typer.Option(None, help="The model's name in the API; by default the folder's."),
    api_key_file: Path = typer.Option(
        None, metavar="FILE", help="File with the key clients must send; FOREGATE_API_KEY may hold it instead."
    ),
    memory: str = typer.Option(EngineConfig.memory, help=MEMORY_HELP),
    policy: str = typer.Option(EngineConfig.policy, help=POLICY_HELP),
    threads: int = typer.Option(EngineConfig.threads, help=THREADS_HELP),
    kernel: str = typer.Option(EngineConfig.kernel, help=KERNEL_HELP),
    exact: bool = typer.Option(EngineConfig.exact, help=EXACT_HELP),
    context: int = typer.Option(
        ServeConfig.context, help="Tokens of prompt and reply together; the model's own limit counts if it is smaller."
    ),
    max_running: int = typer.Option(ServeConfig.max_running, help="Replies that advance together."),
    max_waiting: int = typer.Option(ServeConfig.max_waiting, help="Replies that may wait; more are refused with 429."),
    prompt_chunk: int = typer.Option(
        ServeConfig.prompt_chunk, help="Prompt tokens computed between two tokens of the running replies."
    ),
) -> None:
    """Serve a model over HTTP: OpenAI's chat and completions API, metrics, and a page at / with a chat and the experts.

    Ctrl-C lets running replies finish; a second one does not wait.
    """
    from foregate import ForegateError

    try:
        from foregate.serve.server import Address, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise ForegateError(f"the server needs the package {error.name}: pip install 'foregate[serve]'") from None
    with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn when it has shut down
        serve(
            store,
            engine={"memory": memory, "policy": policy, "threads": threads, "kernel": kernel, "exact": exact},
            address=Address(host, port),
            name=name,
            key_file=api_key_file,
            limits={
                "context": context,
                "max_running": max_running,
                "max_waiting": max_waiting,
                "prompt_chunk": prompt_chunk,
            },
            announce=lambda line: print(line, file=sys.stderr, flush=True),
        )
