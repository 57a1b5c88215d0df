"""Pause, single steps and slow motion, to see what the engine does between two steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

from ...batching.scheduler_output import SchedulerOutput
from ...batching.sequence import Sequence

if TYPE_CHECKING:
    from ...core.engine import LLMEngine

MAX_DELAY = 10.0
"""Seconds between two steps in the slowest motion."""


class StepControlRequest(BaseModel):
    """What to change. Fields that are not given stay as they are. ``steps`` pauses after that many more steps."""

    model_config = ConfigDict(extra="forbid", strict=True)

    paused: bool | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    delay: Annotated[float, Field(ge=0, le=MAX_DELAY)] | None = None


class SteppingThread(Protocol):
    """What the live page needs of the thread that steps the engine. `AsyncEngine` is one, and describes its attributes."""

    engine: LLMEngine
    may_step: Callable[[], bool]
    is_draining: bool

    @property
    def is_running(self) -> bool:
        """Whether the engine works."""
        ...

    def between_steps(self, command: Callable[[], None]) -> None:
        """Run something at the next step border."""
        ...


class StepControlState(BaseModel):
    """Whether the engine is held, and the seconds between two steps."""

    paused: bool
    delay: float


class StepControl:
    """An `EngineObserver` that holds an engine between steps. Requests are still accepted and aborted meanwhile. A server that
    shuts down is not held.

    Args:
        async_engine: whose engine is held.
    """

    def __init__(self, async_engine: SteppingThread) -> None:
        self.async_engine = async_engine
        self.paused, self.delay = False, 0.0
        self._steps = 0  # that a paused engine may still take
        self._last = 0.0
        self._loop: asyncio.AbstractEventLoop  # known from the first call on it
        async_engine.may_step = self._may_step

    def change(self, request: StepControlRequest) -> StepControlState:
        """Set what the request names; on the event loop."""
        self._loop = asyncio.get_running_loop()
        if request.paused is not None:
            self.paused, self._steps = request.paused, 0
        if request.delay is not None:
            self.delay = request.delay
        if request.steps is not None:
            self.paused, self._steps = True, request.steps
        self._wake()
        return StepControlState(paused=self.paused, delay=self.delay)

    def release(self) -> None:
        """Return to full speed, because nobody watches any more."""
        self.paused, self.delay, self._steps = False, 0.0, 0
        self._wake()

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """A step has ended; in slow motion the next one comes later."""
        self._last, self._steps = now, max(0, self._steps - 1)
        if self.delay and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.call_later, self.delay, self._wake)

    def on_abort(self, sequences: Iterable[Sequence], now: float) -> None:
        """Aborts take no step."""

    def _may_step(self) -> bool:
        if self.async_engine.is_draining:
            return True
        if self.paused and not self._steps:
            return False
        return time.monotonic() - self._last >= self.delay

    def _wake(self) -> None:
        """Let the engine's thread ask again whether it may step."""
        self.async_engine.between_steps(lambda: None)
