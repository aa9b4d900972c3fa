"""`foregate serve`: open the socket, load the model, answer until told to stop."""

import functools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from foregate.config import ServeConfig
from foregate.errors import ForegateError
from foregate.serve.app import Service, create_app
from foregate.serve.guard import Rules, loopback_names
from foregate.serve.protocol import BoundedProtocol

KEY_VARIABLE = "FOREGATE_API_KEY"


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in loopback_names() or self.host.startswith("127.")

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def serve(
    store: Path,
    *,
    engine: dict[str, Any],
    address: Address,
    name: str | None,
    key_file: Path | None,
    limits: dict[str, int],
    announce: Callable[[str], None],
) -> None:
    """Serve a store until interrupted. `engine`: settings of `foregate.load`; `limits`: those of `Service.start`.

    Raises ForegateError for a store, an address, a key or limits that cannot be used.
    """
    from foregate.checkpoint.store import Store
    from foregate.model.generate import load_tokenizer
    from foregate.model.loading import load

    for limit, value in limits.items():
        if value < (0 if limit == "max_waiting" else 1):
            raise ForegateError(f"--{limit.replace('_', '-')} {value}: too small")
    key = read_key(key_file)
    Store(store)
    with _listen(address) as listening:
        address = Address(address.host, listening.getsockname()[1])
        tokenizer = load_tokenizer(str(store))
        model = load(
            store,
            **engine,
            context=limits["context"],
            prompt=limits["prompt_chunk"],
            sequences=limits["max_running"],
        )
        service = Service.start(model, tokenizer, name or store.resolve().name, **limits)
        for line in _greeting(service, address, key):
            announce(line)
        app = create_app(service, rules(address, key))
        uvicorn.Server(server_config(app)).run(sockets=[listening])


def server_config(app: Any, stalled_seconds: float = ServeConfig.stalled_seconds) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=functools.partial(BoundedProtocol, stalled_seconds),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=ServeConfig.max_connections,
        timeout_graceful_shutdown=ServeConfig.shutdown_seconds,
    )


def rules(address: Address, key: str | None) -> Rules:
    """With a key any name will do: a page elsewhere does not know it. Without one on loopback, only this machine's own."""
    hosts = loopback_names([address.host]) if address.is_loopback and key is None else None
    return Rules(key=key, hosts=hosts)


def read_key(file: Path | None) -> str | None:
    """The API key in the file, else in the environment, else None. Raises ForegateError for one that cannot be used."""
    if file is not None:
        try:
            key, where = file.read_text(), f"--api-key-file {file}"
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ForegateError(f"--api-key-file {file} cannot be read: {reason}") from None
    elif KEY_VARIABLE in os.environ:
        key, where = os.environ[KEY_VARIABLE], f"the environment variable {KEY_VARIABLE}"
    else:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ForegateError(f"{where} holds no usable API key: it must be one word of ASCII characters")
    return key


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address.host, address.port))
        listening.listen(ServeConfig.max_connections)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ForegateError(
            f"cannot listen on {address.host} port {address.port} ({reason}): choose another with --host and --port"
        ) from None
    return listening


def _greeting(service: Service, address: Address, key: str | None) -> list[str]:
    lines = [f"{service.name}: page {address.url}/  API {address.url}/v1"]
    if not service.encoder.has_template:
        lines.append('no chat template in this model: chats are written as lines "role: content"')
    if service.batcher.max_running == 1:
        lines.append("one reply at a time")
    if key is None and not address.is_loopback:
        lines.append(f"anyone who reaches {address.host} can use this server: set {KEY_VARIABLE} to ask for a key")
    return lines
