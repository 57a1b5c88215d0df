"""The policies that open ones are measured against, written as a learner would write them."""

from __future__ import annotations

from typing import Protocol

from stages.course.grading.contest.player import Request

PATIENCE = 10.0
"""Seconds after which nobody overtakes a waiting request any more by what is cached, as in the engine's "lpm"."""


class Policy(Protocol):
    """See `stages/stage2_scheduler/open_policy.py`."""

    def admit_order(self, waiting: list[Request], now: float) -> list[int]:
        """The ids of all waiting requests; the first is admitted first."""
        ...

    def run_order(self, running: list[Request], now: float) -> list[int]:
        """The ids of all running requests; the first gets its tokens first, the last is preempted first."""
        ...


class Fcfs:
    """First come, first served."""

    def admit_order(self, waiting: list[Request], now: float) -> list[int]:
        return sorted(request.id for request in waiting)

    run_order = admit_order


class Priority:
    """The most urgent first; as urgent, by arrival."""

    def admit_order(self, waiting: list[Request], now: float) -> list[int]:
        return [request.id for request in sorted(waiting, key=lambda each: (each.priority, each.id))]

    run_order = admit_order


class LongestPrefix(Fcfs):
    """Of whose prompt most is cached goes first, but nobody overtakes one that was preempted or is overdue."""

    def admit_order(self, waiting: list[Request], now: float) -> list[int]:
        def key(request: Request) -> tuple[bool, int, int]:
            first = request.num_preemptions > 0 or request.arrival < now - PATIENCE
            return not first, 0 if first else -request.num_cached_tokens, request.id

        return [request.id for request in sorted(waiting, key=key)]


BASELINES: dict[str, type[Policy]] = {"fcfs": Fcfs, "priority": Priority, "lpm": LongestPrefix}
