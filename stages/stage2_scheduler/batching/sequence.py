"""One sequence being generated: its tokens, where it is, and what ends it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Literal, Protocol

from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


class TokenGuide(Protocol):
    """Says which tokens the form of an answer allows next; `core/structured/structured_output.py` has one."""

    def allow(self, outputs: list[list[int]], masks: Tensor) -> None:
        """See `Guide.allow`."""
        ...


class StopSearch(Protocol):
    """Looks for a request's stop strings in the text of a sequence; `core/text/detokenizer.py` has one."""

    def find(self, reason: str | None) -> str | None:
        """The stop string that the text holds, the newest token included; None if it holds none.

        Args:
            reason: why the sequence ends with this token anyway, "stop" or "length"; None: it goes on.
        """
        ...


class SequenceStatus(enum.Enum):
    """Where a sequence is. WAITING → RUNNING → FINISHED, with detours back from RUNNING when memory runs out."""

    WAITING = "waiting"
    """In the waiting queue, nothing in the KV cache."""
    RUNNING = "running"
    """Owns KV blocks and is given tokens at every step."""
    SWAPPED = "swapped"
    """In the waiting queue, its KV blocks copied to host memory."""
    FINISHED = "finished"


class Sequence:
    """One sequence being generated: its tokens and how many of them are already in the KV cache.

    There is no prefill or decode state. What a step still has to compute is always
    ``len(tokens) - num_computed_tokens``: a whole prompt at first, one token while decoding, everything again after a
    preemption by recomputation.

    Attributes:
        seq_id: unique in the engine, ascending in order of arrival.
        request_id: the caller's name; a request with ``n`` > 1 has one sequence for each `index`.
        tokens: prompt, then output; the last one is not in the KV cache until the next step computes it.
        num_computed_tokens: tokens whose K/V are in the cache, ``0 <= num_computed_tokens <= len(tokens)``.
        parent: sequence whose prompt blocks this one shares (``n`` > 1), or None.
        block_hashes: chained hashes of the full blocks of `tokens`, filled by the prefix cache as it needs them.
        eos_token_ids, max_model_len: properties of the model that end a sequence.
        adapter: slot of the adapter that computes it; 0: the model as it is.
        client: for whom it is; None: for nobody in particular. num_charged_tokens: tokens that count as its; see `FairOrder`.
        guide: says which tokens its form allows next; None: any.
        stop_search: looks for its stop strings; None: there are none.
        stop_ids: every token that ends it: end of sequence unless the request ignores it, and the request's stop tokens.
        max_len: tokens, prompt and output, at which it ends; the least of what max_model_len and max_tokens allow.
        max_len_reason: why it ends there, if that is not its length: its `stop_reason` then.
    """

    __slots__ = (
        "adapter",
        "arrival_time",
        "block_hashes",
        "cache_salt",
        "children",
        "client",
        "cumulative_logprob",
        "eos_token_ids",
        "finish_reason",
        "first_scheduled_time",
        "guide",
        "index",
        "max_len",
        "max_len_reason",
        "num_cached_tokens",
        "num_charged_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "params",
        "parent",
        "priority",
        "request_id",
        "seq_id",
        "status",
        "stop_ids",
        "stop_reason",
        "stop_search",
        "tokens",
    )  # fmt: skip

    def __init__(
        self, seq_id: int, prompt_token_ids: list[int], params: SamplingParams, *, request_id: str = "", index: int = 0,
        priority: int = 0, cache_salt: str | None = None, parent: Sequence | None = None, arrival_time: float = 0.0,
        eos_token_ids: tuple[int, ...] = (), max_model_len: int = 1 << 30, client: str | None = None,
    ) -> None:  # fmt: skip
        self.seq_id = seq_id
        self.request_id = request_id or str(seq_id)
        self.index = index
        self.tokens = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_charged_tokens = 0
        self.params = params
        self.adapter = 0
        self.guide: TokenGuide | None = None
        self.stop_search: StopSearch | None = None
        self.priority = priority
        self.client = client
        self.cache_salt = cache_salt
        self.parent = parent
        self.children: list[Sequence] = []
        self.block_hashes: list[bytes] = []
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0
        self.num_preemptions = 0
        self.arrival_time = arrival_time
        self.first_scheduled_time: float | None = None
        self.eos_token_ids = eos_token_ids
        ends = () if params.ignore_eos else eos_token_ids
        self.stop_ids = frozenset((*ends, *params.stop_token_ids))
        self.max_len = (
            max_model_len if params.max_tokens is None else min(max_model_len, self.num_prompt_tokens + params.max_tokens)
        )
        self.max_len_reason: str | None = None

    @property
    def prompt_token_ids(self) -> list[int]:
        """The tokens that the caller brought."""
        return self.tokens[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        # Hint: Nothing needs a loop or a copy but the output itself: everything else is a difference of lengths or a
        # comparison.
        raise NotImplementedError(
            "Stage 2 · Task 2.1: Sequence.output_token_ids, see stages/stage2_scheduler/GUIDE.md#task-2-1"
        )

    @property
    def num_output_tokens(self) -> int:
        """How many tokens are generated so far; asked at every step, so it copies no list."""
        raise NotImplementedError(
            "Stage 2 · Task 2.1: Sequence.num_output_tokens, see stages/stage2_scheduler/GUIDE.md#task-2-1"
        )

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens, of prompt and output alike, whose keys and values are not in the KV cache: what a step may still compute."""
        raise NotImplementedError(
            "Stage 2 · Task 2.1: Sequence.num_uncomputed_tokens, see stages/stage2_scheduler/GUIDE.md#task-2-1"
        )

    @property
    def finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token: int) -> bool:
        """Append a sampled token to `tokens`, a list that others hold, and decide whether it ends the sequence; if so,
        `finish` it.

        The order is that of vLLM: end-of-sequence token, stop token, length (`max_len`); the first two only once
        ``min_tokens`` are out, this one counted. The reason is "stop" or "length". The stop reason is the stop token; None for
        end of sequence; `max_len_reason` at `max_len`. With ``ignore_eos`` an end-of-sequence token is none, but it may be a
        stop token. Last, `stop_search` is asked, once for each token, which needs to know the reason so far. A stop string
        that it finds comes before all others: the reason is "stop", and the stop reason is the string.

        Returns:
            True when the sequence has ended.
        """
        raise NotImplementedError("Stage 2 · Task 2.1: Sequence.append_token, see stages/stage2_scheduler/GUIDE.md#task-2-1")

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End the sequence, and say what stopped it. Its blocks are the scheduler's to free."""
        self.status, self.finish_reason, self.stop_reason = SequenceStatus.FINISHED, reason, stop_reason

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.status.value}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}, computed={self.num_computed_tokens})"
        )
