"""Between the batcher's thread and the client: pieces as they come, events on the wire, and an end when the client leaves."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from foregate.serve.batcher import Batcher
from foregate.serve.sequence import Order, Piece

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class Replies:
    """The replies to one request. Places for the orders must have been reserved; make it in the event loop."""

    def __init__(self, batcher: Batcher, orders: Sequence[Order]) -> None:
        self._batcher, self._queue = batcher, asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._sequences = [batcher.submit(order, self._emitter(index)) for index, order in enumerate(orders)]

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(index of the order, piece) as they come, until each order has had its last."""
        left = len(self._sequences)
        while left:
            index, piece = await self._queue.get()
            left -= piece.last
            yield index, piece

    def cancel(self) -> None:
        """Stop what is not finished."""
        for sequence in self._sequences:
            self._batcher.cancel(sequence)

    def _emitter(self, index: int) -> Callable[[Piece], None]:
        def emit(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: a server stopped by force has nobody to tell
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return emit


class ClientLeft(Exception):
    """The client closed the connection before its answer was complete."""


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled with ClientLeft when the client closes the connection first."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, left):
            each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: each item as one event's JSON, then [DONE]. `close` runs at the end, however it comes."""

    def __init__(self, items: AsyncIterator[dict[str, Any]], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._items, self._close = items, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientLeft):
                await unless_client_leaves(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for item in self._items:
            await send({"type": "http.response.body", "body": event(item), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


def event(item: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(item, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
