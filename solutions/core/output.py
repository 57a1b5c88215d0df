"""What a request gives back: tokens turned into text as they come, and the records that callers see."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..batching.pooling import PooledSequence
from ..batching.sampling_params import RequestOutputKind, SamplingParams
from ..batching.sequence import FinishReason, Sequence, SequenceStatus
from .text.detokenizer import special_token_ids
from .text.logprobs import Logprob, PromptLog, TokenLog, TokenTexts
from .text.text_reader import TextReader

if TYPE_CHECKING:
    from .sampling.sampler import TokenLogprobs


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` sequences of a request. `text`, `token_ids` and `logprobs` hold everything so far, or, when the
    engine emits deltas, what is new since the last output."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    """None while running."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended the sequence; None for end of sequence."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def join(self, later: CompletionOutput) -> None:
        """Take in a later delta of the same sequence."""
        self.text += later.text
        self.token_ids = self.token_ids + later.token_ids
        self.cumulative_logprob = later.cumulative_logprob
        if later.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *later.logprobs]
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


@dataclass(slots=True)
class RequestMetrics:
    """Moments of a request on the clock of `time.monotonic`, in seconds, and what it cost."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """State of a request after a step."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache spared."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    pooled: NDArray[np.float32] | None = None
    """The prompt's vector, if it was to be pooled."""

    def join(self, later: RequestOutput) -> None:
        """Take in a later output of the same request, both of kind DELTA, as if one step had made both."""
        known = {sequence.index: sequence for sequence in self.outputs}
        for sequence in later.outputs:
            if sequence.index in known:
                known[sequence.index].join(sequence)
            else:
                self.outputs.append(sequence)
        self.finished = later.finished
        self.prompt_logprobs = later.prompt_logprobs or self.prompt_logprobs
        self.num_cached_tokens = later.num_cached_tokens


class Request(Protocol):
    """What the output side needs to know of a request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float


class _RequestState:
    """A request between `OutputProcessor.add` and its last output."""

    __slots__ = ("delta", "final_only", "metrics", "num_unfinished", "prompt_log", "request", "started", "states")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.delta = request.params.output_kind is RequestOutputKind.DELTA
        self.final_only = request.params.output_kind is RequestOutputKind.FINAL_ONLY
        self.metrics = RequestMetrics(request.arrival_time)
        self.states: list[_SequenceState] = []  # ascending index
        self.num_unfinished = 0
        self.started = False  # whether an output has gone out
        self.prompt_log: PromptLog | None = None

    def output(self, states: list[_SequenceState]) -> RequestOutput:
        request, log, finished = self.request, self.prompt_log, self.num_unfinished == 0
        prompt_logprobs = None if log is None or (self.delta and self.started and not finished) else log.entries
        self.started = True
        seq = self.states[0].seq
        pooled = seq.vector() if finished and isinstance(seq, PooledSequence) else None
        completions = [states[0].completion()] if len(states) == 1 else [state.completion() for state in states]
        return RequestOutput(
            request.request_id, request.prompt, request.prompt_token_ids, completions, finished, prompt_logprobs,
            seq.num_cached_tokens, self.metrics, pooled,
        )  # fmt: skip


class _SequenceState(TextReader):
    """What has come out of one sequence so far, and what is new since the last output."""

    __slots__ = ("lazy", "logprobs", "new_text", "num_given", "num_ready", "request", "text")

    def __init__(self, request: _RequestState, seq: Sequence, texts: TokenTexts | None, special_ids: frozenset[int]) -> None:
        super().__init__(seq, None if texts is None else texts.tokenizer, special_ids)
        self.request = request
        # Where nobody reads on the way, the text can wait for the end.
        self.lazy = request.final_only and seq.params.logprobs is None
        self.text = ""
        self.new_text = ""
        self.num_given = seq.num_prompt_tokens  # tokens that an output has carried, prompt included
        self.num_ready: int | None = None  # tokens that an output may carry, prompt included; None: all
        self.logprobs: list[dict[int, Logprob]] | None = None

    def completion(self) -> CompletionOutput:
        seq, logprobs = self.seq, self.logprobs
        ready = len(seq.tokens) if self.num_ready is None else self.num_ready
        if self.request.delta:
            text, start = self.new_text, self.num_given
            self.num_given = ready
            if logprobs is not None:
                self.logprobs = []
        else:
            text, start = self.text, seq.num_prompt_tokens
            if logprobs is not None:
                logprobs = logprobs.copy()
        total = None if logprobs is None else seq.cumulative_logprob
        tokens = seq.tokens[start:ready]
        return CompletionOutput(seq.index, text, tokens, total, logprobs, seq.finish_reason, seq.stop_reason)


class _LoggedState(_SequenceState):
    """The same with log-probabilities: a token waits until its text is sure."""

    __slots__ = ()

    def __init__(self, request: _RequestState, seq: Sequence, texts: TokenTexts | None, special_ids: frozenset[int]) -> None:
        super().__init__(request, seq, texts, special_ids)
        self.logprobs: list[dict[int, Logprob]] = []
        self.log: TokenLog = TokenLog(seq, self.detokenizer, None if self.detokenizer is None else texts)
        self.num_ready: int = seq.num_prompt_tokens

    def read(self, ended: bool) -> str:
        """New text, that of the tokens whose text is sure, and their log-probabilities."""
        text, entries = self.log.give(super().read(ended), ended)
        self.logprobs += entries
        self.num_ready += len(entries)
        return text


class OutputProcessor:
    """Turns the tokens of each step into the outputs that callers see.

    What an output holds is the request's `output_kind`:

    - CUMULATIVE: at every step of the request, all of its sequences in full.
    - DELTA: at every step, the sequences that advanced, with their new text, tokens and logprobs. Tokens are given out
      in the step that made them, their text as soon as it is sure (a whole character, no beginning of a stop string),
      so an output may have a token and no text. The last one always comes and brings what was held back. Where logprobs
      are wanted, a token waits for its text, so that the texts of an output's tokens, joined, are its text.
    - FINAL_ONLY: once, when all sequences have finished. Without stop strings no token is read before.

    In each case the text is the same (see `TextReader`). All outputs of a request share its `prompt_token_ids` and its
    `metrics`, of which `num_preemptions` is set at the end. Prompt logprobs come with every output, of DELTA only with
    the first and the last.

    Not thread-safe: it belongs to the thread that steps the engine.

    Args:
        tokenizer: a transformers fast tokenizer, or None: all texts are empty.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer: Tokenizer | None = None if tokenizer is None else tokenizer.backend_tokenizer
        self._special_ids = frozenset() if self._tokenizer is None else special_token_ids(self._tokenizer)
        self._requests: dict[str, _RequestState] = {}
        self._states: dict[int, _SequenceState] = {}
        self._logs: dict[int, TokenLog] = {}  # of the sequences whose log-probabilities are wanted
        self._texts = None if self._tokenizer is None else TokenTexts(self._tokenizer)
        self.num_pooled = 0
        """Prompts that became vectors."""
        self.num_prompt_tokens = 0
        """Of the prompts that got a first token; a prompt counts once, whatever `n`."""

    @property
    def num_requests(self) -> int:
        """Requests that have not had their last output."""
        return len(self._requests)

    def add(self, request: Request, sequences: Iterable[Sequence]) -> None:
        """Register a request and its `n` sequences before their first step; they get a `stop_search` if it has stop strings.

        Raises:
            ValueError: stop strings are wanted without a tokenizer.
        """
        params = request.params
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer and this model has none; use stop_token_ids")
        state = _RequestState(request)
        if params.prompt_logprobs is not None:
            state.prompt_log = PromptLog(request.prompt_token_ids, self._texts if params.detokenize else None)
        for seq in sorted(sequences, key=lambda seq: seq.index):
            if params.logprobs is None:
                each = _SequenceState(state, seq, self._texts, self._special_ids)
            else:
                each = _LoggedState(state, seq, self._texts, self._special_ids)
                self._logs[seq.seq_id] = each.log
            state.states.append(each)
            self._states[seq.seq_id] = each
        state.num_unfinished = len(state.states)
        self._requests[request.request_id] = state

    def sequences(self, request_id: str) -> list[Sequence]:
        """Those of a request that has not had its last output; none if there is no such request."""
        request = self._requests.get(request_id)
        return [] if request is None else [state.seq for state in request.states]

    def add_logprobs(
        self, sampled: dict[Sequence, list[TokenLogprobs]], prompts: list[tuple[str, int, list[TokenLogprobs]]]
    ) -> None:
        """Take the log-probabilities of a step, before its tokens are appended: the texts of tokens are read with them.

        A prompt computed in chunks brings several lists; one computed again after a preemption brings the same again.

        Args:
            sampled: one entry a new token, for the sequences whose request wants them.
            prompts: request, position of the first entry, which is 1 or more as nothing predicts token 0, one entry a token.
        """
        for seq, entries in sampled.items():
            self._logs[seq.seq_id].add(entries)
        for request_id, start, entries in prompts:
            log = self._requests[request_id].prompt_log
            assert log is not None
            log.add(start, entries)

    def emit(self, sequences: list[Sequence], now: float) -> list[RequestOutput]:
        """Outputs of one step: at most one a request, made by `_RequestState.output`.

        `_read` takes in a sequence's new text and closes it when it has ended; where the sequence is `lazy` this waits for the
        end. A request with FINAL_ONLY gets its one output when `num_unfinished` has come to 0. With DELTA an output holds the
        sequences that advanced, otherwise all. The metrics keep the times of the first and the last token, and with the first
        token when the request's first sequence was first scheduled; with it `num_prompt_tokens` counts the request's prompt.

        Args:
            sequences: those that got tokens in this step, one or with speculation several. Some may have ended with it: they
                are FINISHED.
            now: the time, from `time.monotonic`.
        """
        outputs: list[RequestOutput] = []
        advanced: dict[str, list[_SequenceState]] = {}  # of requests with several sequences
        states, finished = self._states, SequenceStatus.FINISHED
        for seq in sequences:
            state = states[seq.seq_id]
            request = state.request
            metrics = request.metrics
            if metrics.first_token_time is None:
                metrics.first_scheduled_time = request.states[0].seq.first_scheduled_time
                metrics.first_token_time = now
                self.num_prompt_tokens += len(request.request.prompt_token_ids)
            metrics.last_token_time = now
            ended = seq.status is finished
            if ended or not state.lazy:
                self._read(state, ended, now)
                if len(request.states) > 1:
                    advanced.setdefault(seq.request_id, []).append(state)
                elif ended or not request.final_only:
                    outputs.append(request.output(request.states))
        for group in advanced.values():
            request = group[0].request
            if request.num_unfinished == 0 or not request.final_only:
                outputs.append(request.output(group if request.delta else request.states))
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """The last output of a request that was given up, with all it has produced; None if the request is unknown.

        Those of its sequences that had not finished have ended with the reason "abort" by now.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        aborted = [state for state in request.states if state.seq.finish_reason == "abort"]
        for state in aborted:
            self._read(state, True, monotonic())
        return request.output(aborted if request.delta else request.states)

    def _read(self, state: _SequenceState, ended: bool, now: float) -> None:
        """Take in a sequence's new text; if it has `ended`, close it, and with its last sequence the request."""
        state.new_text = text = state.read(ended)
        request = state.request
        if not request.delta:
            state.text += text
        if not ended:
            return
        self.num_pooled += isinstance(state.seq, PooledSequence) and state.seq.finish_reason == "stop"
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            request.metrics.finished_time = now
            request.metrics.num_preemptions = sum(each.seq.num_preemptions for each in request.states)
            del self._requests[request.request.request_id]
            for each in request.states:
                del self._states[each.seq.seq_id]
                self._logs.pop(each.seq.seq_id, None)
