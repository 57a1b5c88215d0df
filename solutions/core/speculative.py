"""Speculative decoding: guess a few tokens cheaply, let the model check all of them in one step, keep what it agrees with.

A decode step reads all weights to compute one token a sequence; to compute five takes hardly longer, as long as the batch is
small. So tokens are drafted and put *on trial*: they stand at the end of `Sequence.tokens` while the step runs, which then is
nothing but a step with a few more tokens to compute. The sampler says how many of them stay (`rejection_sampler.py`); the rest
is taken off again, and its slots in the KV cache are written anew by whatever comes next. Source: Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", ICML 2023, §2; drafts from the text itself: Saxena, "Prompt Lookup
Decoding", 2023.

It pays while the model waits for memory. With many sequences in a step the model computes all the time, and a rejected token
costs as much as an accepted one. So how much is drafted follows what is measured (`speculation/draft_lengths.py`).
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable

from ..attention.block_manager import BlockManager
from ..batching.scheduler_output import Draft, SchedulerOutput
from ..batching.sequence import Sequence
from ..batching.tree_rows import TreeDraft
from ..models.config.model_config import ModelConfig
from .speculation.draft_gains import Gains
from .speculation.draft_lengths import DraftLengths
from .speculation.settings import SpeculativeConfig
from .startup import Limits


class Proposer(abc.ABC):
    """Where drafts come from.

    Args:
        config: how many tokens to draft, and when.

    Attributes:
        model_config: of the model that drafts, whose KV cache has blocks like the target's; None: there is no such model.
        foretells: what it drafts follows from the text alone and costs little, so it may be asked only to see if it is right.
        gains: what its drafts are worth, if they branch.
    """

    model_config: ModelConfig | None = None
    foretells = False
    gains: Gains | None = None

    def __init__(self, config: SpeculativeConfig) -> None:
        self.config = config

    def create_cache(self, limits: Limits, tables: dict[int, list[int]]) -> None:
        """Set up a KV cache of as many blocks as the target's, over the block manager's `tables`, where one is needed."""
        return

    @abc.abstractmethod
    def propose(self, output: SchedulerOutput, wanted: dict[Sequence, int]) -> dict[Sequence, Draft]:
        """Draft up to so many tokens for each sequence of `wanted`; none is fine.

        Args:
            output: the step that is about to run.
            wanted: some of ``output.sampled``; all their tokens, and as many slots more, have a place in their block tables.
        """
        ...

    def num_missed(self, seq: Sequence) -> int:
        """Tokens of a sequence that have to be computed before anything is drafted for it."""
        return 0

    def update_states(self, output: SchedulerOutput) -> None:
        """Take note of a step, before `propose` or in its stead: blocks that move, sequences that have left."""
        return


class NgramIndex:
    """What followed each n-gram of one text, the last time that it occurred; a token takes O(1) to add and to look up.

    Args:
        min_n, max_n: lengths of the n-grams, in tokens.
    """

    def __init__(self, min_n: int, max_n: int) -> None:
        self.min_n, self.max_n = min_n, max_n
        self._next: dict[tuple[int, ...], int] = {}
        """n-gram → index of the token behind its last occurrence."""
        self._num_read = 0

    def update(self, tokens: list[int]) -> None:
        """Read the tokens that are new since the last call.

        An n-gram is entered when the token behind it is there, so the one at the very end of the text is not found as its own
        earlier occurrence.

        Args:
            tokens: the whole text, which has only grown.
        """
        for index in range(self._num_read, len(tokens)):
            for n in range(self.min_n, min(self.max_n, index) + 1):
                self._next[tuple(tokens[index - n : index])] = index
        self._num_read = len(tokens)

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """What followed when the text last said what it says now: the last `max_n` tokens, or fewer, down to `min_n`.

        Where that occurrence is so recent that fewer than `count` tokens follow it, the copy goes on with what it has copied
        itself, so a text of period p is continued with that period, however short (the overlapping copy of Ziv and Lempel,
        1977).

        Args:
            tokens: the whole text, as given to `update`.
            count: tokens wanted, at least 1.

        Returns:
            `count` tokens, or none where no n-gram has occurred before.
        """
        for n in range(self.max_n, self.min_n - 1, -1):
            start = self._next.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if start is not None:
                draft = tokens[start : start + count]
                period = len(tokens) - start
                while len(draft) < count:
                    draft.append(draft[-period])
                return draft
        return []


class NgramProposer(Proposer):
    """Drafts from each sequence's own text."""

    foretells = True

    def __init__(self, config: SpeculativeConfig) -> None:
        super().__init__(config)
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, output: SchedulerOutput, wanted: dict[Sequence, int]) -> dict[Sequence, Draft]:
        drafts = {}
        for seq, count in wanted.items():
            index = self._indices.get(seq.seq_id)
            if index is None:
                index = NgramIndex(self.config.prompt_lookup_min, self.config.prompt_lookup_max)
                self._indices[seq.seq_id] = index
            index.update(seq.tokens)
            if token_ids := index.propose(seq.tokens, count):
                drafts[seq] = Draft(token_ids)
        return drafts

    def num_missed(self, seq: Sequence) -> int:
        return 0 if seq.seq_id in self._indices else len(seq.tokens)

    def update_states(self, output: SchedulerOutput) -> None:
        for seq_id in output.removed:
            self._indices.pop(seq_id, None)


class Drafter:
    """Puts tokens on trial behind those of a step that the scheduler has decided.

    They get what is left of the step's token budget and of the KV blocks above the watermark, so nobody waits or is preempted
    for a guess. `Scheduler.update` ends the trial.

    Args:
        proposer: makes the drafts.
        block_manager: gives them their slots.
        max_num_batched_tokens: the budget of a step.
        lengths: decides how many tokens are drafted, and learns by `on_step`; None: as many as the settings say.
        clock: the time in seconds, as `on_step` is told it.

    Attributes:
        observer: what has to be told of every step, if anything has.
    """

    def __init__(
        self, proposer: Proposer, block_manager: BlockManager, max_num_batched_tokens: int, lengths: DraftLengths | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.proposer = proposer
        self.block_manager = block_manager
        self.max_num_batched_tokens = max_num_batched_tokens
        self.lengths = lengths
        self.observer = self if lengths is not None else None
        self._clock = clock
        self._guesses: list[tuple[Sequence, int, list[int]]] = []
        """Sequence, its length before the step, what was drafted for it, on trial or not."""
        self._begin = 0.0
        self._spent = 0.0
        """Seconds that the proposer took since the last step of decoding alone."""

    @property
    def mean_length(self) -> float:
        """Tokens that are drafted for a sequence in a step, on average, as it was last decided."""
        return 0.0 if self.lengths is None else self.lengths.mean_length

    def draft(self, output: SchedulerOutput) -> None:
        """Add drafts to a step, behind the tokens of those who get a new one; none if it holds too many sequences."""
        if self.lengths is not None:
            self._draft_what_pays(output, self.lengths)
            return
        most = self.proposer.config.most(len(output.scheduled))
        wanted = self._find_room(output, dict.fromkeys(output.sampled, most))
        self._take_note(output)
        if most:
            self._put_on_trial(output, self.proposer.propose(output, wanted))

    def _draft_what_pays(self, output: SchedulerOutput, lengths: DraftLengths) -> None:
        """`draft`, with as many tokens as pay. A step that holds parts of prompts computes all the time: it gets no drafts, but
        a draft model reads the prompt along."""
        lengths.forget(output.removed)
        sampled, proposer = output.sampled, self.proposer
        self._guesses = []
        decodes = len(sampled) == len(output.scheduled) == sum(output.scheduled.values())
        most = proposer.config.most(len(sampled)) if decodes else 0
        wanted: dict[Sequence, int] = {}
        if not decodes:
            lengths.wake()
        elif most and not lengths.rests():
            room = [min(most, seq.max_len - len(seq.tokens) - 1) for seq in sampled]
            counts = lengths.choose([seq.seq_id for seq in sampled], room, [proposer.num_missed(seq) for seq in sampled])
            wanted = self._find_room(output, dict(zip(sampled, counts, strict=True)))
        self._take_note(output)
        if wanted or (lengths.pays(len(output.scheduled)) and not decodes and proposer.config.most(len(output.scheduled))):
            missed = [proposer.num_missed(seq) for seq in wanted]
            begin = self._clock()
            drafts = proposer.propose(output, wanted)
            seconds = self._clock() - begin
            self._spent += seconds
            if wanted:
                lengths.drafted(seconds, max(wanted.values()), missed)
            self._guesses = [(seq, len(seq.tokens), draft.token_ids) for seq, draft in drafts.items()]
            self._put_on_trial(output, drafts)
        others = {seq: 1 for seq in sampled if seq not in wanted} if decodes and lengths.may_look() else {}
        if others:
            self._look(output, others, lengths)
        self._begin = self._clock()

    def _look(self, output: SchedulerOutput, others: dict[Sequence, int], lengths: DraftLengths) -> None:
        """Draft a token for each of the other sequences, only to see later if it is the one that comes."""
        start = self._clock()
        drafts = self.proposer.propose(output, others)
        self._guesses += [(seq, len(seq.tokens), draft.token_ids) for seq, draft in drafts.items()]
        lengths.looked(self._clock() - start)

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """See which drafts were right, and what the step took."""
        assert self.lengths is not None  # or nobody would be told
        num_new = len(decision.sampled)
        for seq, length, draft in self._guesses:
            if seq in decision.drafts:
                num_new += len(seq.tokens) - length - 1
            if isinstance(tree := decision.drafts.get(seq), TreeDraft):
                self.lengths.judge_tree(seq.seq_id, len(draft), tree.kept)
                continue
            came = seq.tokens[length : length + len(draft)]
            wrong = (place for place, token in enumerate(came) if token != draft[place])
            num_right = next(wrong, len(came))
            self.lengths.judge(seq.seq_id, num_right, len(draft) if num_right < len(came) else len(came))
        num_drafted = sum(len(draft.token_ids) for draft in decision.drafts.values())
        if sum(decision.scheduled.values()) == num_new and len(decision.scheduled) == len(decision.sampled):
            self.lengths.ran(len(decision.sampled), num_drafted, num_new, now - self._begin, self._spent)
            self._spent = 0.0

    def on_abort(self, sequences: list[Sequence], now: float) -> None:
        """Nothing: what is known of a sequence is forgotten with the next step."""

    def _find_room(self, output: SchedulerOutput, counts: dict[Sequence, int]) -> dict[Sequence, int]:
        """How many of these tokens may be drafted for each sampled sequence; there are slots for them."""
        wanted = {}
        budget = self.max_num_batched_tokens - sum(output.scheduled.values())
        for seq, most in counts.items():
            # A step gives at least one token beside the accepted ones, and max_len ends the sequence.
            count = min(most, budget, seq.max_len - len(seq.tokens) - 1)
            if count > 0 and self.block_manager.extend(seq, count):
                wanted[seq] = count
                budget -= count
        return wanted

    def _take_note(self, output: SchedulerOutput) -> None:
        output.changed_tables |= self.block_manager.take_changed()
        self.proposer.update_states(output)

    @staticmethod
    def _put_on_trial(output: SchedulerOutput, drafts: dict[Sequence, Draft]) -> None:
        output.drafts = drafts
        for seq, draft in drafts.items():
            seq.tokens += draft.token_ids
            output.scheduled[seq] += len(draft.token_ids)


class NoDrafter:
    """In the place of a `Drafter` where nothing is drafted."""

    observer = None
    mean_length = 0.0

    def draft(self, output: SchedulerOutput) -> None:
        """Leave a step as it is."""
        return


def make_drafter(proposer: Proposer | None, block_manager: BlockManager, limits: Limits) -> Drafter | NoDrafter:
    """What drafts by this proposer, whose KV cache is made; None: nothing does."""
    if proposer is None:
        return NoDrafter()
    proposer.create_cache(limits, block_manager.tables)
    lengths = DraftLengths(proposer.foretells, proposer.gains) if proposer.config.adaptive else None
    return Drafter(proposer, block_manager, limits.max_num_batched_tokens, lengths)
