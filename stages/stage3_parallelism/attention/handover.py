"""Hands the blocks of prompts over to other engines: after each step, what it has filled of them goes to an outbox.

Whatever a prompt finds in the prefix cache is handed over with it. The blocks themselves stay the engine's own, which frees and
reuses them as ever. Source of the idea: Zhong et al., "DistServe", OSDI 2024, §4.3; Patel et al., "Splitwise", ISCA 2024, §4.2.
"""

from __future__ import annotations

from ..batching.scheduler_output import SchedulerOutput
from ..batching.sequence import Sequence
from ..memory.transfer.outbox import Outbox
from .tiered_manager import TieredBlockManager


class Handover:
    """An observer of an engine that computes prompts for others.

    Args:
        manager: the engine's. outbox: its tier.
    """

    def __init__(self, manager: TieredBlockManager, outbox: Outbox) -> None:
        self._manager, self._outbox = manager, outbox

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """Put into the outbox what a step has filled, before anybody hears that it has run. Blocks of sequences that ended with
        it are free, but nothing has been written into them since."""
        for seq, num_tokens in decision.scheduled.items():
            self._hand_over(seq, seq.num_computed_tokens - num_tokens)

    def on_abort(self, sequences: list[Sequence], now: float) -> None:
        """What a request that was aborted has handed over stays for the length of its lease."""

    def _hand_over(self, seq: Sequence, before: int) -> None:
        """Give away the full blocks of a prompt that are computed with this step, and were not with an earlier one.

        What a prompt has found in the prefix cache (`num_cached_tokens`) goes with its first step. The block of the prompt's
        last token stays, as whoever goes on computes that token again. Nothing goes if the prompt is read (`reads_prompt`), for
        then all of it is computed again.

        A block that is in the outbox already gets one lease more there. Of the others those go that the prefix cache still
        knows (`block_of`), up to the first that it does not, and as many as the outbox has room for; `num_skipped` counts the
        rest. They are read by one call of ``rows.read`` and stored by one of `store`, or neither is called.

        Args:
            before: tokens of the sequence that were computed when the step began.
        """
        # Hint: Three small machines. Draw each: which blocks are new behind a step, who still wants a block, and what
        # the next byte on the wire means.
        raise NotImplementedError("Stage 3 · Task 3.10: Handover._hand_over, see stages/stage3_parallelism/GUIDE.md#task-3-10")


def handover_of(manager: TieredBlockManager) -> Handover | None:
    """What an engine with such blocks needs as an observer, if it computes prompts for others."""
    return Handover(manager, manager.tier) if isinstance(manager.tier, Outbox) else None
