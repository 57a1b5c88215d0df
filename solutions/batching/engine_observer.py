"""Who is told what an engine does."""

from __future__ import annotations

from typing import Protocol

from .scheduler_output import SchedulerOutput
from .sequence import Sequence


class EngineObserver(Protocol):
    """Is told what the engine does, on the thread that steps it. Times are from `time.monotonic`."""

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """A step has ended, and at `now` the sequences of ``decision.sampled`` got their tokens."""

    def on_abort(self, sequences: list[Sequence], now: float) -> None:
        """A request was aborted; those of its sequences that had not finished have the reason "abort"."""
