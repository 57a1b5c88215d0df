"""Writes every step of the engine to a file, which the live page can show later, even without a server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from ...batching.scheduler_output import SchedulerOutput
from ...batching.sequence import Sequence
from .snapshot import Snapshots

if TYPE_CHECKING:
    from ...core.engine import LLMEngine

FLUSH_SECONDS = 1.0


class TraceRecorder:
    """An `EngineObserver` that writes a frame after each step, a line of JSON each (see `Snapshots`); the first is full.

    Args:
        file: open for writing; `close` closes it.
        engine: whose steps are recorded. model_name: as the API calls it.
    """

    def __init__(self, file: TextIO, engine: LLMEngine, model_name: str) -> None:
        self._file = file
        self._snapshots = Snapshots(engine, model_name)
        self._flushed = 0.0
        self._write(full=True)

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """A step has ended."""
        self._snapshots.record(decision, now)
        self._write(full=False)

    def on_abort(self, sequences: Iterable[Sequence], now: float) -> None:
        """Sequences were aborted, and their blocks are free."""
        self._write(full=False)

    def close(self) -> None:
        """Stop recording."""
        self._file.close()

    def _write(self, full: bool) -> None:
        if self._file.closed:
            return
        self._file.write(json.dumps(self._snapshots.frame(full), separators=(",", ":")) + "\n")
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()
