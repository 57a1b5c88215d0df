"""Decides at every step which sequences run and how many tokens each computes, and keeps the books afterwards.

There is one kind of step. A sequence always has ``len(tokens) - num_computed_tokens`` tokens left to compute: that covers
prompts, chunks of prompts, decoding, prompts whose beginning was cached, and sequences that resume after a preemption.
Sources: iteration-level scheduling, Yu et al., "Orca", OSDI 2022, §3.1; preemption, SOSP 2023, §4.5; chunked prefill,
Agrawal et al., "Sarathi-Serve", OSDI 2024, §4.2.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from typing import Any

from ..attention.block_manager import BlockManager
from ..batching.queue_order import make_order
from ..batching.scheduler_config import QueueFullError, SchedulerConfig
from ..batching.scheduler_output import SchedulerOutput
from ..batching.sequence import Sequence, SequenceStatus
from .overlap.lookahead import Lookahead


class Scheduler:
    """Owns the queues. `waiting` and `running` are sorted by the policy's key: the first of `waiting` is admitted next, the
    last of `running` is preempted first.

    Args:
        config: limits and policy.
        block_manager: gives sequences their KV blocks.

    Attributes:
        num_steps, num_generation_tokens, num_preemptions: counters since the start.
        num_drafts, num_draft_tokens, num_accepted_tokens: the same of tokens on trial.
        accepted: number of accepted tokens → drafts that had so many.
        order: of the queues, by the policy.
        peak_usage: the largest share of the KV blocks that a step has had in use, 0 to 1.
        ahead: may have the next step decided already; None: nothing does.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        self.config = config
        self.block_manager = block_manager
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = self.num_steps = self.num_generation_tokens = 0
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.accepted: Counter[int] = Counter()
        self.peak_usage = 0.0
        self.ahead: Lookahead[Any, Any] | None = None
        self.order = make_order(config, block_manager.num_cached_blocks)
        self._key = self.order.key
        self._max_chunk = config.long_prefill_token_threshold or config.max_num_batched_tokens
        self._removed: list[int] = []

    def add(self, seq: Sequence) -> None:
        """Put a sequence into `waiting`, at the place that the policy's key gives it. The queue is in order already, so few
        keys need to be compared.

        Children come to the queue later, without being asked again, so each needs a place now: this sequence's, and those of
        every sequence that waits or runs.

        Raises:
            QueueFullError: more than `max_num_waiting` (None: no limit) would wait; the queue is as before.
        """
        limit = self.config.max_num_waiting
        if limit is not None:
            num_waiting = len(self.waiting) + sum(len(each.children) for each in (*self.waiting, *self.running))
            if num_waiting + 1 + len(seq.children) > limit:
                raise QueueFullError(f"{num_waiting} sequences are waiting, at most {limit} may; try again later")
        insort(self.waiting, seq, key=self._key)

    def has_unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting or self.running)

    def schedule(self) -> SchedulerOutput:
        """Decide the next step: running sequences first, then waiting ones, within one budget of tokens.

        Nothing is admitted in a step that preempted, or the victim would come straight back.
        """
        if self.ahead is not None and (decided := self.ahead.take()) is not None:
            return decided
        output = SchedulerOutput()
        self.block_manager.begin_step()
        budget = self.schedule_running(output)
        self.order.before_admission(self.waiting, self.config.max_num_seqs - len(self.running))
        if not output.preempted:
            self.admit_waiting(output, budget)
        # A sequence that is alone always fits, so a step that preempts has something to run.
        assert output.scheduled or not output.preempted, "the KV cache holds less than max_model_len tokens"
        if output.scheduled:
            output.copies += self.block_manager.take_copies()
            output.changed_tables = self.block_manager.take_changed()
            output.removed, self._removed = self._removed, []
            self.order.after_decision(output, self.waiting, self.running)
        return output

    def schedule_running(self, output: SchedulerOutput) -> int:
        """Give every running sequence its next tokens, in their order, preempting from the back when blocks run out.

        A sequence gets what it has left to compute, of which a prompt takes no more than `_max_chunk` and leaves one token of
        the budget for each sequence behind it (but always gets one). `append_slots` makes room for the tokens, after the blocks
        behind a sliding window are freed (`free_out_of_window`). While there is no room, the last of `running` leaves and is
        preempted, be it the sequence itself. The blocks that the step fills enter the prefix cache (`cache_full_blocks`).

        Args:
            output: receives the sequences, and the blocks to copy.

        Returns:
            What is left of the token budget.
        """
        budget = self.config.max_num_batched_tokens
        running, manager, index = self.running, self.block_manager, 0
        scheduled, sampled, windowed = output.scheduled, output.sampled, manager.sliding_window is not None
        while index < len(running) and budget > 0:
            seq = running[index]
            left = num_tokens = len(seq.tokens) - seq.num_computed_tokens
            if num_tokens > 1:
                # One token stays reserved for each sequence behind, so a long prompt never holds up a decode.
                num_tokens = min(num_tokens, max(1, budget - (len(running) - index - 1)), self._max_chunk)
            if windowed:
                manager.free_out_of_window(seq)
            if not manager.append_slots(seq, num_tokens, output.copies):
                self.preempt(running.pop(), output)
                continue
            scheduled[seq] = num_tokens  # `output.add`, without a call for each sequence of each step
            if num_tokens == left:
                sampled.append(seq)
            budget -= num_tokens
            index += 1
        for seq, num_tokens in scheduled.items():
            manager.cache_full_blocks(seq, num_tokens)
        return budget

    def admit_waiting(self, output: SchedulerOutput, budget: int) -> None:
        """Admit from the front of the queue while budget, memory and `max_num_seqs` allow; never skip the first.

        `_place` gives a sequence its blocks, or says that memory is short. One that has them computes its uncomputed tokens as
        far as the budget and `_max_chunk` go; the blocks that these fill enter the prefix cache (`cache_full_blocks`), and the
        sequence joins `running` at its place. Without chunked prefill, one with more tokens than the budget has left waits.
        `first_scheduled_time` is that of its first admission, by `time.monotonic`.

        Args:
            output: the step so far; receives the admitted sequences.
            budget: tokens that the step may still hold.
        """
        now = time.monotonic()
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            if not self.config.enable_chunked_prefill and len(seq.tokens) > budget:
                break
            if not self._place(seq, output):
                break
            del self.waiting[0]
            num_tokens = min(seq.num_uncomputed_tokens, budget, self._max_chunk)
            self.block_manager.cache_full_blocks(seq, num_tokens)
            output.add(seq, num_tokens)
            budget -= num_tokens
            seq.status = SequenceStatus.RUNNING
            if seq.first_scheduled_time is None:
                seq.first_scheduled_time = now
            insort(self.running, seq, key=self._key)

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
            num_copies = len(output.copies)
            manager.append_slots(seq, 1, output.copies)
            for source, _ in output.copies[num_copies:]:
                assert source not in manager.filling, f"block {source} is copied before the step that fills it has run"
        else:
            if not manager.can_allocate(seq, keep_watermark):
                return False
            seq.num_computed_tokens = manager.allocate(seq)
            if seq.num_preemptions == 0:
                seq.num_cached_tokens = seq.num_computed_tokens
        return True

    def swap_in(self, seq: Sequence, output: SchedulerOutput, keep_watermark: bool) -> bool:
        """Bring a swapped-out sequence's blocks back to the device, so that it goes on where it was stopped.

        Args:
            output: receives the blocks to move.
            keep_watermark: leave the watermark free.

        Returns:
            False, with nothing changed, when memory is short.
        """
        if not self.block_manager.can_swap_in(seq, keep_watermark):
            return False
        output.swap_in += self.block_manager.swap_in(seq)
        return True

    def preempt(self, seq: Sequence, output: SchedulerOutput) -> None:
        """Take the blocks of a sequence that has just left `running`, and put it into `waiting` at its place.

        With the mode "swap", and where the host has room, its blocks move there: it is SWAPPED, and what it has computed stays
        computed. Otherwise they are freed: it is WAITING, and nothing of it is computed any more. Its tokens stay either way.
        The sequence and the scheduler count the preemption; `output.preempted` and `_removed` note it, in both modes. Nothing
        else of the sequence changes.

        Args:
            output: receives the sequence, and the blocks to move.
        """
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._removed.append(seq.seq_id)
        output.preempted.append(seq)
        if self.config.preemption_mode == "swap" and self.block_manager.can_swap_out(seq):
            output.swap_out += self.block_manager.swap_out(seq)
            seq.status = SequenceStatus.SWAPPED
        else:
            self.block_manager.free(seq)
            seq.num_computed_tokens = 0
            seq.status = SequenceStatus.WAITING
        insort(self.waiting, seq, key=self._key)

    def update(self, output: SchedulerOutput, token_ids: list[list[int]]) -> None:
        """Enter the results of a step: count, advance, append, finish, free.

        The counters `num_steps` and `num_generation_tokens` (one for each of ``output.sampled``) and `peak_usage` are kept.
        With drafts, `_end_trial` comes before the sequences advance, so accepted tokens are appended like any other; when all
        are appended, `_keep_accepted` enters that they are computed. A sequence that a token ends gets no more of them: it
        gives its blocks back, leaves `running`, and is noted in `_removed`. The children of a sampled sequence are queued
        (`_release_children`), as the prompt that they share is computed now.

        Args:
            output: the decision that was carried out.
            token_ids: the new tokens of each sequence of ``output.sampled``, in that order: one, or those of its draft that
                were accepted and one more.
        """
        self.num_steps += 1
        self.num_generation_tokens += len(output.sampled)
        self.peak_usage = max(self.peak_usage, self.block_manager.usage)
        if output.drafts:
            self._end_trial(output)
        for seq, num_tokens in output.scheduled.items():
            seq.num_computed_tokens += num_tokens
        finished = False
        for seq, new in zip(output.sampled, token_ids, strict=True):
            for token in new:
                if seq.append_token(token):
                    finished = True
                    break
            if seq.children:
                self._release_children(seq)
        if output.drafts:
            self._keep_accepted(output)
        if finished:
            for seq in output.sampled:
                if seq.status is SequenceStatus.FINISHED:
                    self.block_manager.free(seq)
                    self._removed.append(seq.seq_id)
            self.running = [seq for seq in self.running if seq.status is not SequenceStatus.FINISHED]

    def _end_trial(self, output: SchedulerOutput) -> None:
        """Take a step's drafts off their sequences, as if they had not been scheduled."""
        for seq, draft in output.drafts.items():
            num_drafted = len(draft.token_ids)
            del seq.tokens[-num_drafted:]
            output.scheduled[seq] -= num_drafted
            self.num_drafts += 1
            self.num_draft_tokens += num_drafted

    def _keep_accepted(self, output: SchedulerOutput) -> None:
        """Enter that all new tokens of a sequence with a draft but the last are computed: the step has done it."""
        for seq in output.drafts:
            num_accepted = seq.num_uncomputed_tokens - 1
            self.block_manager.cache_full_blocks(seq, num_accepted)
            seq.num_computed_tokens += num_accepted
            output.scheduled[seq] += num_accepted
            self.num_accepted_tokens += num_accepted
            self.accepted[num_accepted] += 1
            self.num_generation_tokens += num_accepted

    def _release_children(self, parent: Sequence) -> None:
        """Queue the other sequences of a request once the prompt that they share is computed."""
        for child in parent.children:
            if not child.finished:
                insort(self.waiting, child, key=self._key)
        parent.children = []

    def abort(self, seq: Sequence) -> None:
        """End a sequence between steps, wherever it is, and free its blocks; nothing if it has ended."""
        if seq.finished:
            return
        queue = self.running if seq.status is SequenceStatus.RUNNING else self.waiting
        if seq in queue:  # a child whose parent is not through its prompt is in no queue yet
            queue.remove(seq)
        if seq.children:
            self._release_children(seq)
        self.block_manager.free(seq)
        self._removed.append(seq.seq_id)
        seq.finish("abort")

    def check_invariants(self) -> None:
        """Nothing is in two queues, states fit queues, limits hold, blocks cover what is computed.

        Raises:
            AssertionError: names the sequence that breaks the rule.
        """
        self.block_manager.check_invariants()
        everyone = self.waiting + self.running
        assert len({seq.seq_id for seq in everyone}) == len(everyone), "a sequence is queued twice"
        assert len(self.running) <= self.config.max_num_seqs
        for queue in (self.waiting, self.running) if self.order.is_fixed else (self.running,):
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
