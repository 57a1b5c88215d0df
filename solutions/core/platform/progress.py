"""How far work is: bars on standard error for people, silent where that is no terminal, and what a start has taken."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOW_AFTER = 1.0
"""Seconds."""


class LateBar:
    """A bar over bytes on standard error that appears after `SHOW_AFTER`, and only on a terminal.

    Args:
        text: what is being done.
        total: bytes in all.
        enabled: False shows nothing.
    """

    def __init__(self, text: str, total: int, enabled: bool = True) -> None:
        self._text, self._total, self._done = text, total, 0
        self._start = time.monotonic()
        self._enabled = enabled and sys.stderr.isatty()
        self._bar: Progress | None = None

    def __enter__(self) -> LateBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """Count `num_bytes` more as done."""
        self._done += num_bytes
        if self._bar is None and self._enabled and time.monotonic() - self._start > SHOW_AFTER:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
            self._bar.add_task(self._text, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)


class GenerationProgress:
    """Counts finished requests and shows tokens a second, on standard error; silent where that is no terminal.

    Args:
        num_requests: requests to finish.
        enabled: False shows nothing.
    """

    def __init__(self, num_requests: int, enabled: bool) -> None:
        self._num_tokens = 0
        self._start = time.perf_counter()
        self._bar = Progress(
            TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[rate]}"),
            console=Console(file=sys.stderr), disable=not (enabled and sys.stderr.isatty()), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("requests", total=num_requests, rate="")

    def __enter__(self) -> GenerationProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, num_tokens: int) -> None:
        """Count one finished request, and the tokens of its answers."""
        self._num_tokens += num_tokens
        rate = self._num_tokens / max(1e-9, time.perf_counter() - self._start)
        self._bar.update(self._task, advance=1, rate=f"{rate:.0f} tok/s")


class PhaseClock:
    """Seconds that each phase of a start takes."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """A phase is over, or a part of it."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
