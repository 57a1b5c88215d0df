"""Decides which form is compiled next, and which is refused when too many wait."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ...batching.sampling_params import StructuredOutput

MAX_WAITING = 64
"""Most forms that may wait."""
MAX_CLIENTS = 1024
"""Clients whose last turn is remembered."""
CHARACTERS_A_SECOND = 1000
"""A form goes before those of the same client that came later, by a second for so many characters that they are longer."""


class CompilingStoppedError(RuntimeError):
    """The engine is being shut down."""


@dataclass(slots=True, eq=False)
class Job:
    """A form that somebody waits for.

    Attributes:
        key: the same for the same form. waiters: each future with the client that it is for.
        is_long: it is known to take long.
        arrival: time of `time.monotonic`.
    """

    key: bytes
    wanted: StructuredOutput
    waiters: dict[Future[Any], str | None] = field(default_factory=dict)
    is_long: bool = False
    arrival: float = field(default_factory=time.monotonic)

    @property
    def rank(self) -> float:
        """Order among the forms of one client, lowest first: short before long, but nobody is overtaken for ever."""
        return self.arrival + len(self.wanted.definition) / CHARACTERS_A_SECOND


class FairQueue:
    """Clients take turns. Next is a client that has had no turn, or the one whose last turn is longest ago. Not thread-safe."""

    def __init__(self) -> None:
        self.waiting: list[Job] = []
        self._turns: OrderedDict[str | None, int] = OrderedDict()
        self._turn = 0

    def put(self, job: Job) -> Job | None:
        """Let a form wait.

        Returns:
            Who must leave, if too many wait: the last that came of the client with the most, which may be this one.
        """
        self.waiting.append(job)
        if len(self.waiting) <= MAX_WAITING:
            return None
        counts = Counter(client for one in self.waiting for client in set(one.waiters.values()))
        last = max(self.waiting, key=lambda one: (max(counts[client] for client in one.waiters.values()), one.arrival))
        self.waiting.remove(last)
        return last

    def take(self, is_long: bool) -> Job | None:
        """Whose turn it is, among the forms that are known to take long or among the others."""
        among = [job for job in self.waiting if job.is_long == is_long]
        if not among:
            return None
        job = min(among, key=lambda job: (min(self._turns.get(client, 0) for client in job.waiters.values()), job.rank))
        self.waiting.remove(job)
        self._turn += 1
        for client in job.waiters.values():
            self._turns[client] = self._turn
            self._turns.move_to_end(client)
        while len(self._turns) > MAX_CLIENTS:
            self._turns.popitem(last=False)
        return job
