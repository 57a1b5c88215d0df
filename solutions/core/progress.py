"""The progress bar of offline generation."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .output import RequestOutput


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

    def advance(self, output: RequestOutput) -> None:
        """Count one finished request."""
        self._num_tokens += sum(len(o.token_ids) for o in output.outputs)
        rate = self._num_tokens / max(1e-9, time.perf_counter() - self._start)
        self._bar.update(self._task, advance=1, rate=f"{rate:.0f} tok/s")
