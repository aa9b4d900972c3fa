"""What every request passes first: is it meant for this server, may the client ask, is its body small and soon here."""

import asyncio
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foregate.config import ServeConfig
from foregate.serve.errors import ApiError
from foregate.serve.metrics import Metrics

PROTECTED = ("/v1/", "/metrics")  # the page and /health hold nothing secret


@dataclass(frozen=True)
class Rules:
    """Who may ask. `hosts`: names the server answers to, None for all. `key`: None asks for no key."""

    key: str | None = None
    hosts: frozenset[str] | None = None
    max_body_bytes: int = ServeConfig.max_body_bytes
    body_seconds: float = ServeConfig.stalled_seconds


class Guard:
    """ASGI middleware; hands the application a request whose body is complete, and counts the answers."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
            body = await self._body(Headers(scope=scope), receive)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), counted)

    def _check(self, path: str, headers: Headers) -> None:
        rules = self._rules
        if rules.hosts is not None and _host_name(headers.get("host", "")) not in rules.hosts:
            raise ApiError(403, "this server answers to its own address only: ask for localhost, or give it an API key")
        if rules.key is not None and path.startswith(PROTECTED):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), rules.key.encode()):
                raise ApiError(
                    401,
                    "a valid API key is needed: send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, or None when the client left before it was complete."""
        limit = self._rules.max_body_bytes
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise _too_large(limit)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._rules.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._rules.body_seconds:g} s", headers=CLOSE
            ) from None


CLOSE = {"Connection": "close"}  # the rest of the body is not read


def loopback_names(extra: Iterable[str] = ()) -> frozenset[str]:
    """The names of this machine to itself. A page elsewhere that has a name point here (DNS rebinding) has another."""
    return frozenset({"localhost", "127.0.0.1", "::1", *extra})


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {limit} bytes that this server reads", headers=CLOSE)


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body first, then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
