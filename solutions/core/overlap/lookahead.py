"""Decides the next step while the device computes this one, so that neither waits for the other.

Without it the host decides a step, waits for its tokens, makes text of them, and the device idles meanwhile. Here the next step
is decided, laid out and begun before this one's tokens are known::

    host     decide 2 | wait | text of 1, decide 3 | wait | text of 2, decide 4 | ...
    device   step 1 .......... step 2 ............... step 3 ..............

So a step takes what the host or the device takes, whichever is longer, and not both. What the engine calls stays the same:
`LLMEngine.step` schedules, builds, executes and updates one step after the other; it is given those that were begun ahead.

*What the next step needs of this one's tokens.* That every sequence gets one, it supposes. Which, only the model has to know,
on the device: a place holder, -1 - r for row r of those sampled, stands for it (`known_ids`; SGLang's future token ids). All
else waits until the host has the tokens, as the step that was begun has computed no more than hidden states: forms, penalties
and seeds see a sequence as it is, and a form's mask is made while the layers run.

*Where it supposes wrong.* Who ends by a stop token, a stop string or an abort is in a step that has begun. It leaves before
that is sampled (`take`): its row was computed in vain. Who ends by its length is known to, and is not in it. All else is right
whatever the token, as a device does its work in the order in which it gets it: blocks that the running step writes may be given
away, since their next owner writes later.

Sources: NanoFlow (Zhu et al., 2024, §4.2), SGLang's ``event_loop_overlap``, vLLM's ``AsyncScheduler``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ...attention.block_manager import BlockManager
from ...batching.continuous_batch import ContinuousBatch, FlatBatch
from ...batching.scheduler_output import SchedulerOutput
from ...batching.sequence import Sequence

Hidden = TypeVar("Hidden")
Result = TypeVar("Result")
Meanwhile = Callable[[Tensor], None]
"""Called with a step's tokens [N], on the device, when all of the step is queued there and before anybody waits for it."""


class Device(Protocol[Hidden, Result]):
    """What computes steps, in the order in which it gets them.

    Attributes:
        ahead: begins steps before they are executed.
    """

    ahead: Lookahead[Hidden, Result] | None

    def begin(self, batch: FlatBatch, tokens: Tensor | None = None) -> Hidden:
        """Queue a step's layers. Place holders among its ids stand for `tokens`, those of the step before."""
        ...

    def finish(self, batch: FlatBatch, hidden: Hidden, meanwhile: Meanwhile | None = None) -> Result:
        """Sample what was begun, and wait for it."""
        ...


class Decider(Protocol):
    """What is needed of a scheduler, which asks `ahead` before it decides."""

    ahead: Lookahead[Any, Any] | None
    block_manager: BlockManager
    waiting: list[Sequence]
    running: list[Sequence]

    def schedule(self) -> SchedulerOutput: ...


def known_ids(input_ids: Tensor, tokens: Tensor) -> Tensor:
    """The ids of a step with the tokens of the step before in the places that were held for them.

    The host does not wait: no shape and no branch depends on what is in the tensors.

    Args:
        input_ids: [T], tokens, and place holders -1 - r. It stays as it is.
        tokens: [N], at least one, of which token r is that of row r.

    Returns:
        [T], without a place holder.
    """
    return torch.where(input_ids < 0, tokens[(-1 - input_ids).clamp_(min=0)], input_ids)


class Lookahead(Generic[Hidden, Result]):
    """Stands between the engine and what it is made of, whose `ahead` it is: the scheduler gives what `take` gives, the engine
    lays out by `build`, the device runs steps by `execute`. Of the engine's observers it is the first.

    Args:
        scheduler: decides. batch: lays steps out. device: computes them.

    Attributes:
        num_steps: steps begun ahead. num_in_vain: sequences that were in one of them and had ended.
    """

    def __init__(self, scheduler: Decider, batch: ContinuousBatch, device: Device[Hidden, Result]) -> None:
        self.num_steps = self.num_in_vain = 0
        self._scheduler, self._batch, self._device = scheduler, batch, device
        scheduler.ahead = device.ahead = self
        self._begun: tuple[FlatBatch, Hidden] | None = None

    def take(self) -> SchedulerOutput | None:
        """The decision that was made ahead, as far as it still holds.

        Who has ended since is in it no more (`_leave_out_finished`). Blocks whose last token was a place holder could not enter
        the prefix cache when the step was decided. Now all tokens are known, and `cache_full_blocks` is told of each sequence
        that is left, as in `Scheduler.schedule_running`. The step stays begun until `execute`.

        Returns:
            None if nothing has begun, or nobody is left in it. Then nothing is begun any more.
        """
        if self._begun is None:
            return None
        batch = self._begun[0]
        decision = batch.decision
        if any(seq.finished for seq in decision.scheduled):
            self._leave_out_finished(batch)
        if not decision.scheduled:
            self._begun = None
            return None
        for seq, num_tokens in decision.scheduled.items():
            self._scheduler.block_manager.cache_full_blocks(seq, num_tokens)  # those, too, that held a place holder
        return decision

    def build(self, decision: SchedulerOutput, tables: dict[int, list[int]]) -> FlatBatch:
        """Lay out a step, unless it was."""
        if self._begun is not None and self._begun[0].decision is decision:
            return self._begun[0]
        return self._batch.build(decision, tables)

    def execute(self, batch: FlatBatch) -> Result:
        """Run a step, or what is left of it, and decide the next one before waiting for it."""
        hidden = self._device.begin(batch) if self._begun is None else self._begun[1]
        self._begun = None
        return self._device.finish(batch, hidden, partial(self._look_ahead, batch))

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """Let those go who were preempted when the next step was decided, and ended with this one."""
        if self._begun is not None and any(seq.finished for seq in self._begun[0].decision.preempted):
            self._scheduler.waiting = [seq for seq in self._scheduler.waiting if not seq.finished]

    def on_abort(self, sequences: list[Sequence], now: float) -> None:
        """Nothing: `take` sees who has ended."""

    def _look_ahead(self, batch: FlatBatch, tokens: Tensor) -> None:
        """Decide, lay out and begin the step behind the one that runs, whose tokens are known to the device alone.

        The scheduler sees what will be: who runs has computed what it computes now, and whoever is sampled has one token more,
        a place holder, at which `_batch` looks, too. A sequence that reaches its `max_len` by that has ended whatever its token
        is: it runs no more, its blocks are free for this very decision, and the decision has it in `removed`.

        Afterwards nobody but the decision knows of it: tokens are as before, and counts of computed tokens lack what was
        supposed, so that `Scheduler.update` of the running step makes them right. (Of one that the decision has preempted that
        is a count below 0 until then.) This holds, too, when deciding or laying out raises.

        Nothing is begun, or counted in `num_steps`, if the decision schedules nobody.

        Args:
            batch: the step that runs.
            tokens: its tokens [N], on the device: to be handed on, and not to be looked at.
        """
        running, scheduler = batch.decision, self._scheduler
        for seq, num_tokens in running.scheduled.items():
            seq.num_computed_tokens += num_tokens
        for row, seq in enumerate(running.sampled):
            seq.tokens.append(-1 - row)
        following = None
        try:
            at_their_length = [seq for seq in running.sampled if len(seq.tokens) >= seq.max_len]
            if at_their_length:
                scheduler.running = [seq for seq in scheduler.running if seq not in at_their_length]
                for seq in at_their_length:
                    scheduler.block_manager.free(seq)
            decided = scheduler.schedule()
            if decided.scheduled:
                decided.removed += [seq.seq_id for seq in at_their_length]
                following = self._batch.build(decided, scheduler.block_manager.tables)
        finally:
            for seq in running.sampled:
                del seq.tokens[-1]
            for seq, num_tokens in running.scheduled.items():
                seq.num_computed_tokens -= num_tokens  # below 0 for one that was preempted, until `Scheduler.update` adds it
        if following is not None:
            self._begun = following, self._device.begin(following, tokens)
            self.num_steps += 1

    def _leave_out_finished(self, batch: FlatBatch) -> None:
        """Take the sequences that have ended out of a step that has begun.

        They are neither in the decision's `scheduled` and `sampled` nor in the batch's `sampled`; all others keep their order.
        `logits_indices` has the rows of those who are sampled. The batch's other arrays stay as they are: they are what the
        device computes. `num_in_vain` counts whoever was scheduled.
        """
        decision = batch.decision
        rows = [row for row, seq in enumerate(decision.sampled) if not seq.finished]
        self.num_in_vain += sum(seq.finished for seq in decision.scheduled)
        decision.scheduled = {seq: count for seq, count in decision.scheduled.items() if not seq.finished}
        batch.logits_indices = batch.logits_indices[rows]
        batch.sampled = decision.sampled = [decision.sampled[row] for row in rows]
