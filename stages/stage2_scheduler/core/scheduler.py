"""Decides at every step which sequences run and how many tokens each computes, and keeps the books afterwards.

There is one kind of step. A sequence always has ``len(tokens) - num_computed_tokens`` tokens left to compute: that covers
prompts, chunks of prompts, decoding, prompts whose beginning was cached, and sequences that resume after a preemption.
Sources: iteration-level scheduling, Yu et al., "Orca", OSDI 2022, §3.1; preemption, SOSP 2023, §4.5; chunked prefill,
Agrawal et al., "Sarathi-Serve", OSDI 2024, §4.2.
"""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass, field

from ..attention.block_manager import BlockManager, BlockPairs
from ..batching.scheduler_config import POLICIES, SchedulerConfig
from ..batching.sequence import Sequence, SequenceStatus


class QueueFullError(RuntimeError):
    """As many sequences are waiting as may wait; try again later."""


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
    """

    scheduled: dict[Sequence, int] = field(default_factory=dict)
    sampled: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    swap_out: BlockPairs = field(default_factory=list)
    swap_in: BlockPairs = field(default_factory=list)
    copies: BlockPairs = field(default_factory=list)
    changed_tables: set[int] = field(default_factory=set)
    removed: list[int] = field(default_factory=list)

    def add(self, seq: Sequence, num_tokens: int) -> None:
        """Let a sequence compute its next `num_tokens` tokens."""
        # Hint: x
        raise NotImplementedError("Stage 2 · Task 2.3: SchedulerOutput.add, see IMPLEMENTATION_GUIDE.md#task-2-3")


class Scheduler:
    """Owns the queues. `waiting` and `running` are sorted by the policy's key: the first of `waiting` is admitted next, the
    last of `running` is preempted first.

    Args:
        config: limits and policy.
        block_manager: gives sequences their KV blocks.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self.config = config
        self.block_manager = block_manager
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._key = POLICIES[config.policy]
        self._max_chunk = config.long_prefill_token_threshold or config.max_num_batched_tokens
        self._removed: list[int] = []

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises:
            QueueFullError: `max_num_waiting` sequences wait already.
        """
        # Hint: x
        raise NotImplementedError("Stage 2 · Task 2.2: Scheduler.add, see IMPLEMENTATION_GUIDE.md#task-2-2")

    def has_unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting or self.running)

    def schedule(self) -> SchedulerOutput:
        """Decide the next step: running sequences first, then waiting ones, within one budget of tokens.

        Nothing is admitted in a step that preempted, or the victim would come straight back.
        """
        output = SchedulerOutput()
        budget = self.schedule_running(output)
        if not output.preempted:
            self.admit_waiting(output, budget)
        # A sequence that is alone always fits, so a step that preempts has something to run.
        assert output.scheduled or not output.preempted, "the KV cache holds less than max_model_len tokens"
        if output.scheduled:
            output.changed_tables = self.block_manager.take_changed()
            output.removed, self._removed = self._removed, []
        return output

    def schedule_running(self, output: SchedulerOutput) -> int:
        """Give every running sequence its next tokens, preempting from the back when blocks run out.

        Returns:
            What is left of the token budget.
        """
        # Hint: x
        raise NotImplementedError("Stage 2 · Task 2.4: Scheduler.schedule_running, see IMPLEMENTATION_GUIDE.md#task-2-4")

    def admit_waiting(self, output: SchedulerOutput, budget: int) -> None:
        """Admit from the front of the queue while budget, memory and `max_num_seqs` allow; never skip the first."""
        raise NotImplementedError("Stage 2 · Task 2.3: Scheduler.admit_waiting, see IMPLEMENTATION_GUIDE.md#task-2-3")

    def _place(self, seq: Sequence, output: SchedulerOutput) -> bool:
        """Give a waiting sequence its blocks: swapped in, forked from its parent, or allocated.

        Returns:
            False, with nothing changed, when memory is short.
        """
        manager, parent = self.block_manager, seq.parent
        # Alone, a sequence may use the last block; beside others the watermark stays free.
        keep_watermark = bool(self.running)
        if seq.status is SequenceStatus.SWAPPED:
            return self.swap_in(seq, output, keep_watermark)
        if parent is not None and seq.num_preemptions == 0 and manager.holds(parent, seq.num_prompt_tokens - 1):
            if not manager.can_fork(keep_watermark):
                return False
            # All of the prompt but its last token is shared; that one is computed again to get logits of its own.
            seq.num_computed_tokens = seq.num_prompt_tokens - 1
            manager.fork(parent, seq, seq.num_computed_tokens)
            manager.append_slots(seq, 1, output.copies)
        else:
            if not manager.can_allocate(seq, keep_watermark):
                return False
            seq.num_computed_tokens = manager.allocate(seq)
            if seq.num_preemptions == 0:
                seq.num_cached_tokens = seq.num_computed_tokens
        return True

    def swap_in(self, seq: Sequence, output: SchedulerOutput, keep_watermark: bool) -> bool:
        """Bring a swapped-out sequence's blocks back to the device, so that it goes on where it was stopped.

        Returns:
            False, with nothing changed, when memory is short.
        """
        raise NotImplementedError("Stage 2 · Task 2.5: Scheduler.swap_in, see IMPLEMENTATION_GUIDE.md#task-2-5")

    def preempt(self, seq: Sequence, output: SchedulerOutput) -> None:
        """Take a running sequence's blocks away and put it back into the queue."""
        # Hint: x
        raise NotImplementedError("Stage 2 · Task 2.5: Scheduler.preempt, see IMPLEMENTATION_GUIDE.md#task-2-5")

    def update(self, output: SchedulerOutput, token_ids: list[int]) -> None:
        """Enter the results of a step: advance, append, finish, free.

        Args:
            output: the decision that was carried out.
            token_ids: one new token for each sequence of ``output.sampled``, in that order.
        """
        raise NotImplementedError("Stage 2 · Task 2.4: Scheduler.update, see IMPLEMENTATION_GUIDE.md#task-2-4")

    def _release_children(self, parent: Sequence) -> None:
        """Queue the other sequences of a request once the prompt that they share is computed."""
        for child in parent.children:
            if not child.finished:
                insort(self.waiting, child, key=self._key)
        parent.children = []

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence between steps, wherever it is: aborted by the caller, or at a stop string."""
        if seq.finished:
            return
        queue = self.running if seq.status is SequenceStatus.RUNNING else self.waiting
        if seq in queue:  # a child whose parent is not through its prompt is in no queue yet
            queue.remove(seq)
        if seq.children:
            self._release_children(seq)
        self.block_manager.free(seq)
        self._removed.append(seq.seq_id)
        seq.status, seq.finish_reason, seq.stop_reason = SequenceStatus.FINISHED, reason, stop_reason

    def check_invariants(self) -> None:
        """Nothing is in two queues, states fit queues, limits hold, blocks cover what is computed.

        Raises:
            AssertionError: names the sequence that breaks the rule.
        """
        self.block_manager.check_invariants()
        everyone = self.waiting + self.running
        assert len({seq.seq_id for seq in everyone}) == len(everyone), "a sequence is queued twice"
        assert len(self.running) <= self.config.max_num_seqs
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=self._key), "a queue is not in the order of the policy"
        tables, host_tables, size = (
            self.block_manager.tables,
            self.block_manager.host_tables,
            self.block_manager.block_size,
        )
        assert tables.keys() == {seq.seq_id for seq in self.running}, "block tables and running sequences differ"
        swapped = {seq.seq_id for seq in self.waiting if seq.status is SequenceStatus.SWAPPED}
        assert host_tables.keys() == swapped, "host block tables and swapped sequences differ"
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING, f"{seq} is in the running queue"
            assert 0 <= seq.num_computed_tokens < len(seq.tokens), f"{seq} has nothing to compute"
            assert seq.num_computed_tokens <= len(tables[seq.seq_id]) * size, f"{seq} has tokens without a slot"
        for seq in self.waiting:
            assert seq.status in (SequenceStatus.WAITING, SequenceStatus.SWAPPED), f"{seq} is in the waiting queue"
            if seq.status is SequenceStatus.WAITING:
                assert seq.num_computed_tokens == 0, f"{seq} holds nothing but counts as computed"
