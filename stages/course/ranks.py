"""Ranks for the tests of stage 3: as threads of the test, which start at once and tell what went wrong, and as processes.

Between threads a message is a tensor in a queue. Whoever waits too long for one gets an error that names both ranks, so that a
wrong order of calls is a failed test and not a test that hangs.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from solutions.parallelism.distributed import run_ranks  # the learner's own is a later task
from stages.course.catalog import STAGES_FOLDER
from stages.parallelism.communication import CommunicationError, Communicator, Traffic

PATIENCE = 2.0
"""Seconds that a thread waits for another one's message."""
THREAD_SECONDS = 8.0
"""How long threads may take in all."""
PROCESS_SECONDS = 25.0
"""How long processes may take, the first of which load PyTorch; less than a test may."""


@dataclass
class Wires:
    """What connects the threads of one run.

    Attributes:
        sent: rank → (target, elements) of each of its calls of `exchange`.
    """

    size: int
    sent: dict[int, list[tuple[int, list[float]]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        ranks = range(self.size)
        self._boxes = {(source, target): queue.Queue() for source in ranks for target in ranks}

    def put(self, source: int, target: int, call: str, x: Tensor) -> None:
        """Send `x` from one rank to another."""
        assert (source, target) in self._boxes, f"rank {source} sends to rank {target}; ranks go from 0 to {self.size - 1}"
        self._boxes[source, target].put((call, x.clone()))

    def get(self, source: int, target: int, call: str) -> Tensor:
        """What rank `source` has sent to rank `target`.

        Raises:
            TimeoutError: nothing has come.
            AssertionError: the other one is in another call.
        """
        assert (source, target) in self._boxes, f"rank {target} waits for rank {source}; ranks go from 0 to {self.size - 1}"
        try:
            theirs, x = self._boxes[source, target].get(timeout=PATIENCE)
        except queue.Empty:
            raise TimeoutError(f"rank {target} waits in {call} for rank {source}, and nothing comes") from None
        assert theirs == call, f"rank {target} is in {call} and rank {source} in {theirs}: all make the same calls in one order"
        return x


class ThreadCommunicator(Communicator):
    """The collectives of stage 3 between threads, counted as the real ones are."""

    def __init__(self, rank: int, size: int, wires: Wires) -> None:
        self.rank, self.size, self.wires = rank, size, wires
        self.traffic = defaultdict(Traffic)

    def exchange(self, outgoing: Tensor, target: int, incoming: Tensor, source: int) -> Tensor:
        self.wires.sent[self.rank].append((target, outgoing.flatten().tolist()))
        self.wires.put(self.rank, target, "exchange", outgoing)
        came = self._get(source, "exchange")
        assert came.shape == incoming.shape, (
            f"rank {self.rank} has room for {incoming.numel()} elements, and rank {source} sent {came.numel()}"
        )
        self._count("exchange", outgoing.nbytes)
        return incoming.copy_(came)

    def send(self, x: Tensor, target: int) -> None:
        raise AssertionError("where all send first, all wait for somebody who receives; exchange does both at once")

    def recv(self, x: Tensor, source: int) -> Tensor:
        raise AssertionError("where all receive first, all wait for somebody who sends; exchange does both at once")

    def all_reduce(self, x: Tensor) -> Tensor:
        parts = self._from_all("all_reduce", x)
        assert all(part.shape == x.shape for part in parts), f"shapes in all_reduce: {[list(p.shape) for p in parts]}"
        self._count("all_reduce", 2 * x.nbytes * (self.size - 1) // self.size)
        return x.copy_(torch.stack(parts).sum(0))

    def all_gather(self, x: Tensor) -> Tensor:
        parts = self._from_all("all_gather", x)
        assert all(part.shape == x.shape for part in parts), f"shapes in all_gather: {[list(p.shape) for p in parts]}"
        self._count("all_gather", (self.size - 1) * x.nbytes)
        return torch.cat(parts)

    def _from_all(self, call: str, x: Tensor) -> list[Tensor]:
        for target in range(self.size):
            self.wires.put(self.rank, target, call, x)
        return [self._get(source, call) for source in range(self.size)]

    def _get(self, source: int, call: str) -> Tensor:
        try:
            return self.wires.get(source, self.rank, call)
        except TimeoutError as error:
            raise CommunicationError(str(error)) from None

    def _count(self, name: str, bytes_sent: int) -> None:
        self.traffic[name].calls += 1
        self.traffic[name].bytes_sent += bytes_sent


def on_threads(size: int, function: Callable[..., Any], *args: Any, wires: Wires | None = None) -> list[Any]:
    """Call ``function(communicator, *args)`` on `size` ranks, each a thread; what each gave.

    Args:
        wires: to look afterwards at what was sent.

    Raises:
        AssertionError: a rank did not come back. Else what a rank raised, the most telling of all ranks'.
    """
    wires = wires or Wires(size)
    results: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadCommunicator(rank, size, wires), *args)
        except BaseException as error:
            error.add_note(f"on rank {rank} of {size}")
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    deadline = time.monotonic() + THREAD_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise min(errors.values(), key=_how_telling)
    for rank in range(size):
        assert rank in results, f"rank {rank} of {size} did not come back in {THREAD_SECONDS:g} s; is there an endless loop?"
    return [results[rank] for rank in range(size)]


def _how_telling(error: BaseException) -> int:
    """Low for what says most: a task that is not done first, and last that somebody waits, which the other errors lead to."""
    return 0 if isinstance(error, NotImplementedError) else 2 if isinstance(error, CommunicationError) else 1


def on_processes(size: int, function: Callable[..., Any], *args: Any, timeout: float = PROCESS_SECONDS) -> list[Any]:
    """Call ``function(communicator, *args)`` on `size` ranks, each a process, which talk over gloo; what each gave.

    Raises:
        NotImplementedError: a rank met a task that is not done.
        AssertionError: a rank failed.
        TimeoutError: one did not end in time.
    """
    try:
        return run_ranks(_enter, size, function, args, timeout=timeout)
    except RuntimeError as error:
        raise failure_of_a_rank(str(error)) from None


def _enter(_: object, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(Communicator(), *args)  # the learner's; what came is the reference's


def failure_of_a_rank(text: str) -> Exception:
    """What to raise in a test for a rank's traceback: what it says, and where in the learner's code."""
    missing = re.search(r"NotImplementedError: (Stage .*)", text)
    if missing:
        return NotImplementedError(missing[1])
    lines = text.strip().splitlines()
    said = [lines[0]] if len(lines) == 1 else [lines[0], lines[-1]]
    places = re.findall(rf'File "{re.escape(str(STAGES_FOLDER))}/(stage\d\S+)", line (\d+), in (\w+)', text)
    said += [f"your code stages/{file}:{line}, in {function}" for file, line, function in places[-1:]]
    return AssertionError("\n".join(said))
