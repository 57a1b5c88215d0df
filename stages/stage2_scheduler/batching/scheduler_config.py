"""Limits and policies of the scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .sequence import Sequence


def fcfs(seq: Sequence) -> tuple[int, ...]:
    """Sort key for first come, first served: by arrival, which `seq_id` counts; no clock is asked."""
    # Hint: A tuple is compared entry by entry, so a tie-break is a second entry. The module `bisect` can insert into a
    # sorted list.
    raise NotImplementedError("Stage 2 · Task 2.2: fcfs, see stages/stage2_scheduler/GUIDE.md#task-2-2")


def priority(seq: Sequence) -> tuple[int, ...]:
    """Sort key: the lower `priority` first, ties by arrival, which `seq_id` counts."""
    raise NotImplementedError("Stage 2 · Task 2.2: priority, see stages/stage2_scheduler/GUIDE.md#task-2-2")


POLICIES: dict[str, Callable[[Sequence], tuple[Any, ...]]] = {"fcfs": fcfs, "priority": priority, "lpm": fcfs, "fair": fcfs}
"""Sort keys. Both queues are kept in this order: the first is served first, the last is preempted first. "lpm" and "fair" sort
again at every step, because their orders depend on what is cached and on who was served: see `queue_order.py`."""

PREEMPTION_MODES = ("recompute", "swap")


@dataclass(slots=True)
class SchedulerConfig:
    """What a step may hold and who goes first.

    Attributes:
        max_num_seqs: most sequences running at once.
        max_num_batched_tokens: the token budget of one step.
        max_model_len: longest sequence, prompt and output together.
        enable_chunked_prefill: split prompts over steps; when off, a prompt must fit into one step's budget.
        long_prefill_token_threshold: most tokens of one prompt in one step, so that decodes are not held up (0: the budget).
        policy: a key of `POLICIES`; "fcfs": by arrival; "priority": lower `priority` first, ties by arrival; "lpm" (longest
            prefix match): the waiting sequence with the most cached tokens first; "fair": that of the client that was served
            least.
        preemption_mode: "recompute" drops a victim's KV blocks, "swap" copies them to host memory while there is room
            (and recomputes when there is none).
        max_num_waiting: sequences that may wait; None is unbounded.
        client_weights: with "fair": client → its share relative to others', which have 1.

    Raises:
        ValueError: a value is out of range or does not fit another one.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    policy: str = "fcfs"
    preemption_mode: str = "recompute"
    max_num_waiting: int | None = None
    client_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.long_prefill_token_threshold < 0:
            raise ValueError(f"long_prefill_token_threshold must be at least 0, got {self.long_prefill_token_threshold}")
        if self.policy not in POLICIES:
            raise ValueError(f"scheduling policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.preemption_mode not in PREEMPTION_MODES:
            raise ValueError(f"preemption mode must be one of {', '.join(PREEMPTION_MODES)}, got {self.preemption_mode!r}")
        if self.max_num_waiting is not None and self.max_num_waiting < 1:
            raise ValueError(f"max_num_waiting must be at least 1, got {self.max_num_waiting}")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"without chunked prefill a whole prompt must fit into one step: max_num_batched_tokens "
                f"({self.max_num_batched_tokens}) must be at least max_model_len ({self.max_model_len})"
            )


class QueueFullError(RuntimeError):
    """The waiting queue is full; try again later. `reason` says which of its limits is reached: "requests" or "tokens"."""

    def __init__(self, message: str, reason: str = "requests") -> None:
        super().__init__(message)
        self.reason = reason
