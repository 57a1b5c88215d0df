"""Waiting for an event in a test, however busy the machine is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PATIENCE = 10.0
"""Seconds after which what has not happened will not happen."""


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Return as soon as the condition holds.

    Args:
        what: names in the failure what did not happen.

    Raises:
        AssertionError: it has not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: it did not happen within {seconds:g} s")
        time.sleep(0.002)


async def turns(count: int = 20) -> None:
    """Let the event loop go round some times: every task that can go on does, again and again."""
    for _ in range(count):
        await asyncio.sleep(0)
