"""A feed of what the engine does, for the live page: ``GET /live``, as server-sent events.

Each event is a frame as JSON (see `Snapshots`). The first frame of a connection is full, and its ``engine`` says how large
everything is; later frames hold what has changed. A client that reads too slowly misses frames, and then gets a full one.
Frames come at step borders, at most `FRAMES_PER_SECOND`, and none when nothing happens. Without a client nothing is recorded.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.staticfiles import StaticFiles

from ...batching.scheduler_config import QueueFullError
from ...batching.scheduler_output import SchedulerOutput
from ...batching.sequence import Sequence
from .snapshot import Snapshots
from .step_control import StepControl, StepControlRequest, StepControlState, SteppingThread

if TYPE_CHECKING:
    from ...core.engine import EngineStats

FRAMES_PER_SECOND = 10
MAX_UNREAD = 8
"""Most frames that wait for a client. A client that is further behind starts again with a full frame."""
MAX_CLIENTS = 16
PAGE = Path(__file__).parent / "page"


class LiveFeed:
    """An `EngineObserver` that sends frames to clients.

    The engine's thread takes snapshots and hands them to the loop; the clients' queues belong to the loop.

    Args:
        async_engine: whose engine is observed.
        model_name: as the API calls it. control: is released when the last client leaves.
    """

    def __init__(self, async_engine: SteppingThread, model_name: str, control: StepControl) -> None:
        self.async_engine, self.control = async_engine, control
        self._snapshots = Snapshots(async_engine.engine, model_name)
        self._loop: asyncio.AbstractEventLoop  # known from the first call on it
        self._clients: dict[asyncio.Queue[str], bool] = {}  # → whether it waits for a full frame; touched by the loop only
        self._is_watched = False  # set by the loop, read by the engine's thread; the two below are the thread's own
        self._shown: EngineStats | None = None  # of the last frame
        self._last = 0.0

    # -------------------------------------------------------------------------------------------- on the engine's thread

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """A step has ended: send a frame, unless the last one has just been sent."""
        if not self._is_watched:
            return
        self._snapshots.record(decision, now)
        if now - self._last >= 1 / FRAMES_PER_SECOND:
            self._last = now
            self._send_frame(full=False)

    def on_abort(self, sequences: Iterable[Sequence], now: float) -> None:
        """Sequences were aborted. The next frame will not have them."""

    def _send_frame(self, full: bool) -> None:
        self._shown = self.async_engine.engine.stats()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, self._snapshots.frame(full))

    def _send_full_frame(self) -> None:
        self._send_frame(full=True)

    def _send_rest(self) -> None:
        """Send what happened since the last frame if no step will do so: an abort, or a request that has to wait."""
        if self.async_engine.engine.stats() != self._shown:
            self._send_frame(full=False)

    # ------------------------------------------------------------------------------------------------------ on the loop

    def check_room(self) -> None:
        """Raises QueueFullError if there are `MAX_CLIENTS` already."""
        if len(self._clients) >= MAX_CLIENTS:
            raise QueueFullError(f"{MAX_CLIENTS} clients are watching, which is the limit; try again later")

    async def events(self) -> AsyncIterator[str]:
        """The events of one client, until it leaves or the server shuts down."""
        engine, queue = self.async_engine, asyncio.Queue[str](MAX_UNREAD)
        self._loop = asyncio.get_running_loop()
        if not self._clients:
            engine.between_steps(self._snapshots.forget)
        self._clients[queue] = True
        self._is_watched = True
        engine.between_steps(self._send_full_frame)
        try:
            while engine.is_running and not engine.is_draining:
                try:
                    yield await asyncio.wait_for(queue.get(), 2 / FRAMES_PER_SECOND)
                except TimeoutError:
                    engine.between_steps(self._send_rest)
        finally:
            del self._clients[queue]
            self._is_watched = bool(self._clients)
            if not self._is_watched:
                self.control.release()

    def _deliver(self, frame: dict[str, Any]) -> None:
        """Put a frame into the queue of every client that can use it."""
        text = f"data: {json.dumps(frame, separators=(',', ':'))}\n\n"
        for queue, needs_full in self._clients.items():
            if queue.full():  # its frames are out of date
                while not queue.empty():
                    queue.get_nowait()
                needs_full = self._clients[queue] = True
                self.async_engine.between_steps(self._send_full_frame)
            if frame["full"] or not needs_full:
                self._clients[queue] = False
                queue.put_nowait(text)


def add_live_page(app: FastAPI, async_engine: SteppingThread, model_name: str, **documented: Any) -> None:
    """Add the page, its feed, and its buttons that hold the engine.

    Args:
        documented: what the OpenAPI document says of the two routes.
    """
    control = StepControl(async_engine)
    feed = LiveFeed(async_engine, model_name, control)
    async_engine.engine.observers += [control, feed]

    @app.get("/live", **documented)
    async def live() -> StreamingResponse:
        """Frames of the engine's queues, blocks and steps, as server-sent events."""
        feed.check_room()
        return StreamingResponse(feed.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.post("/live/control", **documented)
    async def set_step_control(body: StepControlRequest) -> StepControlState:
        """Pause, step, or slow the engine down. It returns to full speed when the last client of ``/live`` leaves."""
        return control.change(body)

    @app.get("/", include_in_schema=False)
    async def page() -> RedirectResponse:
        return RedirectResponse("page/")

    app.mount("/page", StaticFiles(directory=PAGE, html=True))
