"""A real server on loopback, in a thread of this process, with the trained demo model."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI

import foregate
from foregate.model.generate import load_tokenizer
from foregate.serve.app import Service, create_app
from foregate.serve.guard import Rules
from foregate.serve.server import server_config

MOSES = "And the LORD said unto Moses,"
JSON = {"Content-Type": "application/json"}


@dataclass
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The JSON of a stream's events; checks that it ends as it should."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@dataclass
class Live:
    """A running server."""

    port: int
    service: Service
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """A request with `body` as JSON, or as it is if it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes | type(None)) else json.dumps(body)
            connection.request(method, path, data, JSON if headers is None else headers)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def complete(self, **body: Any) -> Answer:
        return self.request("POST", "/v1/completions", {"temperature": 0, **body})

    def chat(self, content: str, **body: Any) -> Answer:
        messages = [{"role": "user", "content": content}]
        return self.request("POST", "/v1/chat/completions", {"messages": messages, "temperature": 0, **body})

    def connect(self, data: bytes, receive_buffer: int = 65536) -> socket.socket:
        """A connection of one's own, `data` sent."""
        connection = socket.socket()
        connection.settimeout(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(data)
        return connection

    def idle_within(self, seconds: float) -> bool:
        """Whether every place is free before so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.service.batcher.load() == {"running": 0, "waiting": 0}:
                return True
            time.sleep(0.02)
        return False


def post(path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a request."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


@contextlib.contextmanager
def serving(store: Path, rules: Rules, stalled_seconds: float, **limits: int) -> Iterator[Live]:
    """A server in a thread, shut down at the end."""
    model = foregate.load(store, memory="25%", threads=1)
    service = Service.start(model, load_tokenizer(str(store)), "demo", **limits)
    server = uvicorn.Server(server_config(create_app(service, rules), stalled_seconds))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # what a client does not take shows soon
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Live(listening.getsockname()[1], service, server)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
