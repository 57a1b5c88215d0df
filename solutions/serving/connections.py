"""Time limits of a connection, for requests that arrive too slowly and answers that nobody reads."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import TYPE_CHECKING, Any

from .errors import error_body

if TYPE_CHECKING:  # which of uvicorn's two it is depends on what is installed; both have what is used here
    from uvicorn.protocols.http.h11_impl import H11Protocol as AutoHTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol


class TimedConnection(AutoHTTPProtocol):
    """uvicorn's connection with two limits that uvicorn does not have.

    - A request must be complete `seconds` after its first byte (or after the connection was made). Otherwise it gets a 408 and
      the connection closes. Without this limit a few thousand clients that send a byte a minute could hold all connections.
    - A client that reads nothing from a full send buffer for `seconds` is cut off, and its request is aborted.

    Between requests uvicorn's own limit holds, ``timeout_keep_alive``.
    """

    def __init__(self, *args: Any, seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds = seconds
        self._arrival: TimerHandle | None = None
        self._departure: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._arrival = self.loop.call_later(self.seconds, self._give_up_request)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_arriving:
            self._stop_arrival()
        elif self._arrival is None:
            self._arrival = self.loop.call_later(self.seconds, self._give_up_request)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._departure = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_departure()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_arrival()
        self._stop_departure()

    def _stop_arrival(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _stop_departure(self) -> None:
        if self._departure is not None:
            self._departure.cancel()
            self._departure = None

    @property
    def _is_arriving(self) -> bool:
        """Whether a request has begun to arrive and is not complete: its head, which has no cycle yet, or its body."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _give_up_request(self) -> None:
        body = error_body(f"the request did not arrive within {self.seconds:g} s", 408).model_dump_json().encode()
        head = "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length:"
        self.transport.write(f"{head} {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
