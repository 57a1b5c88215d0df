"""Speculative decoding: guess a few tokens cheaply, let the model check all of them in one step, keep what it agrees with.

A decode step reads all weights to compute one token a sequence; to compute five takes hardly longer, as long as the batch is
small. So tokens are drafted and put *on trial*: they stand at the end of `Sequence.tokens` while the step runs, which then is
nothing but a step with a few more tokens to compute. The sampler says how many of them stay (`rejection_sampler.py`); the rest
is taken off again, and its slots in the KV cache are written anew by whatever comes next. Source: Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", ICML 2023, §2; drafts from the text itself: Saxena, "Prompt Lookup
Decoding", 2023.

It pays while the model waits for memory. With many sequences in a step the model computes all the time, and a rejected token
costs as much as an accepted one: above `disable_by_batch_size` sequences nothing is drafted.
"""

from __future__ import annotations

import abc
import json
from dataclasses import dataclass, fields
from typing import Any

from ..attention.block_manager import BlockManager
from ..batching.scheduler_output import Draft, SchedulerOutput
from ..batching.sequence import Sequence
from ..models.config.model_config import ModelConfig
from .startup import Limits

METHODS = ("ngram", "draft_model")


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """How tokens are drafted; the keys of ``--speculative-config``. Names are vLLM's.

    Attributes:
        method: "ngram": what followed when the text last said the same; "draft_model": a smaller model.
        num_speculative_tokens: most tokens drafted for a sequence in a step.
        prompt_lookup_min, prompt_lookup_max: of "ngram", how many last tokens must have occurred before; the longest counts.
        model, quantization: of "draft_model"; the model's vocabulary must be the target's. A quantized copy of the target
            will do.
        disable_by_batch_size: with more sequences in a step nothing is drafted.

    Raises:
        ValueError: a value is out of range, or does not belong to the method.
    """

    method: str
    num_speculative_tokens: int = 4
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4
    model: str | None = None
    quantization: str | None = None
    disable_by_batch_size: int = 4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--speculative-config: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max", "disable_by_batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"--speculative-config: {name} must be an integer of at least 1, got {value!r}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("--speculative-config: prompt_lookup_min must not exceed prompt_lookup_max")
        for name in ("model", "quantization"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"--speculative-config: {name} must be a string, got {value!r}")
            if value is not None and self.method == "ngram":
                raise ValueError(f"--speculative-config: method ngram takes no {name}; it drafts from the text itself")
        if self.method == "draft_model" and self.model is None:
            raise ValueError("--speculative-config: method draft_model needs a model, such as the target's own name")

    @classmethod
    def parse(cls, given: str | dict[str, Any]) -> SpeculativeConfig:
        """From the JSON of ``--speculative-config``, or the same as a dictionary.

        Raises:
            ValueError: it is not a JSON object of known keys with good values; the message says what is wrong.
        """
        example = '{"method": "ngram", "num_speculative_tokens": 4}'
        try:
            values = json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise ValueError(f"--speculative-config is not valid JSON ({error}); write for example '{example}'") from None
        if not isinstance(values, dict) or "method" not in values:
            raise ValueError(f"--speculative-config must be a JSON object with a method, such as '{example}'")
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ValueError(f"--speculative-config: there is no {unknown[0]!r}; the keys are {', '.join(known)}")
        return cls(**values)


class Proposer(abc.ABC):
    """Where drafts come from.

    Args:
        config: how many tokens to draft, and when.

    Attributes:
        model_config: of the model that drafts, whose KV cache has blocks like the target's; None: there is no such model.
    """

    model_config: ModelConfig | None = None

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
    """

    def __init__(self, proposer: Proposer, block_manager: BlockManager, max_num_batched_tokens: int) -> None:
        self.proposer = proposer
        self.block_manager = block_manager
        self.max_num_batched_tokens = max_num_batched_tokens

    def draft(self, output: SchedulerOutput) -> None:
        """Add drafts to a step, behind the tokens of those who get a new one; none if it holds too many sequences."""
        active = len(output.scheduled) <= self.proposer.config.disable_by_batch_size
        wanted = self._find_room(output) if active else {}
        output.changed_tables |= self.block_manager.take_changed()
        self.proposer.update_states(output)
        if active:
            output.drafts = self.proposer.propose(output, wanted)
        for seq, draft in output.drafts.items():
            seq.tokens += draft.token_ids
            output.scheduled[seq] += len(draft.token_ids)

    def _find_room(self, output: SchedulerOutput) -> dict[Sequence, int]:
        """How many tokens may be drafted for each sampled sequence; there are slots for them."""
        wanted = {}
        budget = self.max_num_batched_tokens - sum(output.scheduled.values())
        for seq in output.sampled:
            # A step gives at least one token beside the accepted ones, and max_len ends the sequence.
            count = min(self.proposer.config.num_speculative_tokens, budget, seq.max_len - len(seq.tokens) - 1)
            if count > 0 and self.block_manager.extend(seq, count):
                wanted[seq] = count
                budget -= count
        return wanted


class NoDrafter:
    """In the place of a `Drafter` where nothing is drafted."""

    def draft(self, output: SchedulerOutput) -> None:
        """Leave a step as it is."""
        return
