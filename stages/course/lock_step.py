"""For the tests of task 3.8: an engine whose other ranks are threads, and stand-ins that note who is told what and when."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from stages.batching.step_arrays import StepArrays
from stages.core.config import EngineConfig
from stages.core.executor import MultiProcExecutor
from stages.core.worker import Worker
from stages.core.worker_process import StepBoard
from stages.course.layers import of
from stages.course.ranks import ThreadCommunicator, Wires
from stages.models.loader import ModelSource


class ThreadRank:
    """Stands in for `WorkerProcess`: a rank in a thread, which does what it is told as a worker's process does.

    Args:
        make_worker: called in the thread. descriptor: of the board.
    """

    def __init__(self, make_worker: Callable[[], Worker], descriptor: int) -> None:
        self.death_seconds = 2.0
        self.messages: queue.Queue = queue.Queue()
        self.error: BaseException | None = None
        self._make_worker, self._board = make_worker, StepBoard(os.dup(descriptor))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def tell(self, **message: Any) -> None:
        self.messages.put(json.dumps(message))  # it goes through a pipe

    def check(self, seconds: float = 0.0) -> None:
        """Raise what this rank has died of, if it has."""
        self._thread.join(seconds)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.messages.put(None)
        self._thread.join(5)

    def _serve(self) -> None:
        try:
            worker = self._make_worker()
            while (line := self.messages.get()) is not None:
                message = json.loads(line)
                if "cache" in message:
                    worker.create_cache(*message["cache"])
                else:
                    worker.follow(self._board.read(message["step"]))
        except BaseException as error:
            self.error = error


def thread_executor(
    config: EngineConfig, source: ModelSource, device: torch.device, dtype: torch.dtype, *_: Any
) -> MultiProcExecutor:
    """The learner's executor with threads in place of the other ranks' processes."""
    executor = MultiProcExecutor.__new__(MultiProcExecutor)
    size = config.tensor_parallel_size
    wires = Wires(size)

    def make_worker(rank: int) -> Worker:
        return Worker(config, source, device, dtype, of(ThreadCommunicator(rank, size, wires)))

    executor._board = StepBoard()
    executor._others = [ThreadRank(lambda rank=rank: make_worker(rank), executor._board.descriptor) for rank in range(1, size)]
    executor.worker = make_worker(0)
    executor._finalizer = lambda: [other.stop() for other in executor._others]
    return executor


class Log:
    """Notes what happens, in order. It stands in for a rank's process, for a worker, for a model and for its KV cache.

    Attributes:
        events: (who, what, with which arguments).
    """

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def rank(self, name: str, error: Exception | None = None, told: Exception | None = None) -> _Noted:
        """A rank's process.

        Args:
            error: raised when somebody checks whether it lives. told: raised when it is told something.
        """
        return _Noted(self, name, {"check": error, "tell": told})

    def worker(self, error: Exception | None = None) -> _Noted:
        """Rank 0's worker; `error` is raised by `execute`."""
        return _Noted(self, "rank 0", {"execute": error})

    @property
    def order(self) -> list[str]:
        """Who did what, as short texts."""
        return [f"{who} {what}" for who, what, _ in self.events]


class _Noted:
    death_seconds = 2.0

    def __init__(self, log: Log, name: str, errors: dict[str, Exception | None]) -> None:
        self._log, self._name, self._errors = log, name, errors

    def __getattr__(self, what: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if what == "tell":
                json.dumps(named)  # it must fit into a line
            self._log.events.append((self._name, what, named or args))
            error = self._errors.get(what)
            if error is not None:
                raise error
            return self._log

        return call


def bare_executor(worker: Any, others: list[Any]) -> MultiProcExecutor:
    """The learner's executor around stand-ins."""
    executor = MultiProcExecutor.__new__(MultiProcExecutor)
    executor.worker, executor._others, executor._board = worker, others, StepBoard()
    return executor


def bare_worker(log: Log, num_tokens: int) -> Worker:
    """The learner's worker around stand-ins: its hidden states are the numbers of the rows, so logits tell of which rows."""
    worker = Worker.__new__(Worker)
    worker.device = torch.device("cpu")
    worker.cache = _Noted(log, "cache", {})
    worker.sampler = _Noted(log, "sampler", {})
    worker.model = _Model(log)

    def forward(step: StepArrays) -> torch.Tensor:
        log.events.append(("model", "forward", (step,)))
        return torch.arange(num_tokens)[:, None]

    worker.forward = forward
    return worker


class _Model:
    def __init__(self, log: Log) -> None:
        self._log = log

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self._log.events.append(("model", "logits", hidden[:, 0].tolist()))
        return hidden
