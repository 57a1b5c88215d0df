"""An event loop whose clock stands still while anybody works and jumps to the next appointment when all wait: an hour of load
takes a moment, and the same moment on every machine."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class _Selector(selectors.SelectSelector):
    """Waits for no time that passes: moves the loop's clock on instead."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everybody waits for something that nobody will ever do")
        self._loop.seconds += max(0.0, timeout)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """See the module. `seconds` is its time, from 0."""

    def __init__(self) -> None:
        self.seconds = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.seconds


def simulate(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end in simulated time, and return what it returns. Works in a notebook too, which has a loop of
    its own that runs.

    Raises:
        RuntimeError: it waits for something that never comes.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_run, work).result()


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(work)
