"""One engine behind an endpoint that others share: the server's application without a socket, and how calls reach it.

Nothing here knows of Ray: `ray_app` and `ray_two_phase` start a `Replica` in an actor each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from ...core.config import EngineConfig
from ...core.platform.machine import settle_heap
from ..app import create_app
from ..async_engine import AsyncEngine

logger = logging.getLogger(__name__)

Head = tuple[int, list[tuple[bytes, bytes]]]
"""Status and headers of an answer."""


@dataclass(slots=True)
class HttpCall:
    """An HTTP request on its way to a replica."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def scope(self) -> dict[str, Any]:
        """What an ASGI application is told of it."""
        return {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "",
            "method": self.method, "path": self.path, "raw_path": self.path.encode(), "query_string": self.query,
            "headers": self.headers, "client": None, "server": None,
        }  # fmt: skip


async def answer(app: FastAPI, call: HttpCall) -> AsyncIterator[Head | bytes]:
    """An application's answer, piece by piece: first its head, then its body as it comes. Whoever leaves the iteration is to
    the application a client that has left."""
    pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
    gone = asyncio.Event()
    requests = iter([{"type": "http.request", "body": call.body, "more_body": False}])

    async def receive() -> Message:
        if (request := next(requests, None)) is not None:
            return request
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        is_head = message["type"] == "http.response.start"
        pieces.put_nowait((message["status"], list(message["headers"])) if is_head else message.get("body", b""))

    async def run() -> None:
        try:
            await app(call.scope(), receive, send)
        except Exception:
            logger.exception("A request has failed")
        finally:
            pieces.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (piece := await pieces.get()) is not None:
            while isinstance(piece, bytes) and not pieces.empty():  # what has come meanwhile goes in one piece
                more = pieces.get_nowait()
                if not isinstance(more, bytes):
                    pieces.put_nowait(more)
                    break
                piece += more
            if piece:
                yield piece
    finally:
        gone.set()
        await task


class Replica:
    """One engine and its server's application, without a socket."""

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self, config: EngineConfig, served_model_names: list[str], api_keys: list[str] | None
    ) -> None:
        from ...core.engine import LLMEngine

        self.engine = AsyncEngine(LLMEngine(config))
        self.engine.engine.input.start_compiling()
        settle_heap()
        self.app = create_app(self.engine, served_model_names, api_keys)
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()

    async def check_health(self) -> None:
        """Serve replaces a replica for which this fails.

        Raises:
            RuntimeError: the engine has failed.
        """
        if not self.engine.is_running:
            raise RuntimeError("the engine has failed; the replica's log has the cause")

    async def forward(self, call: HttpCall, keys: list[bytes]) -> AsyncIterator[Head | bytes]:
        """See `answer`; `keys` are for the router."""
        async for piece in answer(self.app, call):
            yield piece

    async def __del__(self) -> None:
        if hasattr(self, "_lifespan"):
            await self._lifespan.__aexit__(None, None, None)
            self.engine.engine.close()
