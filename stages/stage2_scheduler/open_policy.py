"""Your own policy: ``make scoreboard`` plays it against fcfs, priority and lpm. See IMPLEMENTATION_GUIDE.md, "Open tasks".

What is here works: it is first come, first served. Whatever you write, name each request once. A request has `id` (ascending in
order of arrival), `client`, `priority` (lower is more urgent), `arrival`, `num_prompt_tokens`, `num_output_tokens` (so far),
`num_computed_tokens`, `num_cached_tokens` (while it waits: what the prefix cache has of it) and `num_preemptions`. Requests are
copies. What you want to remember, keep in `self`; a workload begins with a new `Policy`.
"""

from __future__ import annotations

from typing import Any


class Policy:
    """Decides who is admitted, and who is preempted when memory runs out."""

    def admit_order(self, waiting: list[Any], now: float) -> list[int]:
        """The ids of all waiting requests; the first is admitted first. `now` is in simulated seconds, like `arrival`."""
        return sorted(request.id for request in waiting)

    def run_order(self, running: list[Any], now: float) -> list[int]:
        """The ids of all running requests; the first gets its tokens first, the last is preempted first."""
        return sorted(request.id for request in running)
