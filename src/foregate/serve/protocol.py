"""uvicorn's HTTP protocol, which lets go of clients that stall: no slow request head, no reply that nobody takes."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedProtocol(H11Protocol):
    """Aborts a connection whose request head is incomplete, or whose client takes nothing, for `stalled_seconds`."""

    def __init__(self, stalled_seconds: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stalled_seconds = stalled_seconds
        self._head: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head = self._abort_later()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head = _stop(self._head)
        elif self._head is None:  # a further request has begun
            self._head = self._abort_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self._sending or self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sending = _stop(self._sending)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._sending = _stop(self._head), _stop(self._sending)
        super().connection_lost(exc)

    def _abort_later(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self._stalled_seconds, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
