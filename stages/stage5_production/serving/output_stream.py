"""What a client reads: the outputs of its requests, from when the engine makes them until they are fetched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from ..core.output import RequestOutput


class OutputStream(AsyncIterator[RequestOutput]):
    """The outputs of all requests of one submission, in the order in which they come. Ends when all have finished.

    At most one output a request waits here: for a reader who is slower than the engine, unread outputs are merged, so the
    backlog never exceeds the answer's text.

    `close` aborts what is unfinished; call it (or leave an ``async with``) whenever the stream is not read to its end.

    Args:
        abort: takes the ids of requests that nobody reads any more.
        delta: whether an output holds what is new (outputs that wait are joined) or all so far (the newest replaces).
    """

    def __init__(self, request_ids: list[str], abort: Callable[[list[str]], None], delta: bool = False) -> None:
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting: dict[str, RequestOutput] = {}  # oldest request first
        self._unfinished = set(request_ids)
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._abort = abort
        self._delta = delta

    async def __anext__(self) -> RequestOutput:
        """The output of the request that has waited longest, or the next one to come. Then the error, if the engine has failed,
        once; and the end, when all requests have finished.

        Raises:
            StopAsyncIteration: nothing will come any more.
        """
        # Hint: Who may touch what? The engine: only its thread. Streams: only the loop. What crosses the border is a
        # callable, in one direction or the other.
        raise NotImplementedError("Stage 5 · Task 5.5: OutputStream.__anext__, see stages/stage5_production/GUIDE.md#task-5-5")

    async def __aenter__(self) -> OutputStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort the unfinished requests, drop what waits; whoever waits for an output sees the end of the stream. A second time
        changes nothing."""
        # Hint: Follow what is held: the connection knows who left, the stream knows which requests were his, the engine
        # has their blocks. Each tells the next.
        raise NotImplementedError("Stage 5 · Task 5.6: OutputStream.close, see stages/stage5_production/GUIDE.md#task-5-6")

    def accept(self) -> None:
        """The engine took all requests."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def fail(self, error: Exception) -> None:
        """End the stream with an error, raised by the submission or, once that has succeeded, by the iteration."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
        else:
            self._error = error
            self._changed.set()

    def put(self, output: RequestOutput) -> None:
        """Take an output of the engine, for who reads next: joined to one of the same request that still waits."""
        raise NotImplementedError("Stage 5 · Task 5.5: OutputStream.put, see stages/stage5_production/GUIDE.md#task-5-5")
