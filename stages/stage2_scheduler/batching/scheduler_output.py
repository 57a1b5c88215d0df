"""The decision for one step: who computes how many tokens, which blocks move before, which tokens are on trial."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor

BlockPairs = list[tuple[int, int]]
"""(source, destination) block ids."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed for one sequence.

    Attributes:
        token_ids: the K of them.
        probs: [K, V] float32, the distributions that they were drawn from; None: nothing was drawn at random, or in a way that
            the target's own draw repeats (see `rejection_sampler.verify`).
    """

    token_ids: list[int]
    probs: Tensor | None = None


@dataclass(slots=True)
class SchedulerOutput:
    """The decision for one step.

    Attributes:
        scheduled: sequence → number of tokens to compute, in the order of the batch.
        sampled: those of `scheduled` that will have computed all their tokens and therefore get a new one, in that order.
        preempted: sequences that lost their blocks in this step.
        swap_out, swap_in, copies: (source, destination) blocks to copy before the step, in this order.
        changed_tables: ids of sequences whose block table differs from the step before.
        removed: ids of sequences that left the running set since the step before.
        drafts: tokens on trial, which stand at the end of these sequences (see `speculative.py`).
    """

    scheduled: dict[Sequence, int] = field(default_factory=dict)
    sampled: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    swap_out: BlockPairs = field(default_factory=list)
    swap_in: BlockPairs = field(default_factory=list)
    copies: BlockPairs = field(default_factory=list)
    changed_tables: set[int] = field(default_factory=set)
    removed: list[int] = field(default_factory=list)
    drafts: dict[Sequence, Draft] = field(default_factory=dict)

    def add(self, seq: Sequence, num_tokens: int) -> None:
        """Let a sequence compute its next `num_tokens` tokens; if none is left after them, it is one of `sampled`."""
        # Hint: A loop that looks at waiting[0] and nothing else: each turn either admits it or ends the loop.
        raise NotImplementedError("Stage 2 · Task 2.3: SchedulerOutput.add, see stages/stage2_scheduler/GUIDE.md#task-2-3")
