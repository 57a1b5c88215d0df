"""Turns the engine's outputs into OpenAI answers: whole ones, and streams of server-sent events."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any, TypedDict

from pydantic import BaseModel

from ..core.output import CompletionOutput, RequestOutput
from .async_engine import EngineDeadError
from .errors import error_body
from .openai_answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    Delta,
    FinishReason,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
)
from .openai_protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from .output_stream import OutputStream
from .token_logprobs import Position, chat_logprobs, completion_logprobs, prompt_logprobs, prompt_texts, without_texts

logger = logging.getLogger(__name__)

NOTHING: dict[str, Any] = {"text": "", "token_ids": [], "logprobs": [], "finish_reason": "length", "stop_reason": None}
"""What a sequence says when only its prompt is wanted."""


class Head(TypedDict):
    """What every answer and every chunk of a stream begins with."""

    id: str
    created: int
    model: str


class Reply(ABC):
    """The answer to one HTTP request: one engine request for each prompt, with `n` sequences each.

    Sequence j of prompt i is choice ``i * n + j``.

    Args:
        prompts: engine request id → the prompt's token ids, in the order of the prompts.
        tokenizer: the engine's, or None where token ids have no text.
    """

    def __init__(self, reply_id: str, request: GenerationRequest, prompts: dict[str, list[int]], tokenizer: Any) -> None:
        self.head: Head = {"id": reply_id, "created": int(time.time()), "model": request.model}
        self.request = request
        self.n = request.n or 1
        self.tokenizer = tokenizer
        self.prompts = prompts
        self._first_choice = {request_id: i * self.n for i, request_id in enumerate(prompts)}
        self._cached: dict[str, int] = {}
        self._tokens: Counter[int] = Counter()  # choice → tokens of what was generated for it so far
        self._ids: defaultdict[int, list[int]] = defaultdict(list)  # choice → those that no chunk had yet

    @property
    def usage(self) -> Usage:
        """All prompts' tokens, each prompt once, whatever `n`; all that are counted in `_tokens`; and what each prompt found in
        the cache (`_cached`)."""
        # Hint: `_first_choice` knows where a prompt's choices begin. And what a prompt found in the cache is said again
        # with every output.
        raise NotImplementedError("Stage 5 · Task 5.2: Reply.usage, see stages/stage5_production/GUIDE.md#task-5-2")

    def usage_so_far(self, index: int, num_tokens: int | None = None) -> Usage | None:
        """The usage of a chunk's choice so far, as vLLM reports it: its prompt, and its own tokens, which are `num_tokens` or
        those that went through `choices`. None unless the request asks for it."""
        if not self.request.continuous_usage:
            return None
        request_id = list(self.prompts)[index // self.n]
        prompt, completion = len(self.prompts[request_id]), self._tokens[index] if num_tokens is None else num_tokens
        cached = PromptTokensDetails(cached_tokens=self._cached.get(request_id, 0))
        return Usage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion, prompt_tokens_details=cached
        )  # fmt: skip

    def choices(self, output: RequestOutput) -> Iterable[tuple[int, CompletionOutput]]:
        """The sequences in an output with the index of their choice. Before it passes one on, it counts its tokens as those of
        its choice (`_tokens`); of the cached ones every output says the same again (`_cached`, by request)."""
        raise NotImplementedError("Stage 5 · Task 5.2: Reply.choices, see stages/stage5_production/GUIDE.md#task-5-2")

    def noted(self, choices: Iterable[tuple[int, CompletionOutput]]) -> Iterable[tuple[int, CompletionOutput]]:
        """The same choices; if the request asks for token ids, they are kept for `take_ids`."""
        for index, sequence in choices:
            if self.request.return_token_ids:
                self._ids[index] += sequence.token_ids
            yield index, sequence

    def take_ids(self, index: int) -> list[int] | None:
        """Token ids of a choice that went through `noted` since the last call; None unless the request asks for them."""
        return self._ids.pop(index, []) if self.request.return_token_ids else None

    def prompt_ids(self, index: int) -> list[int] | None:
        """Token ids of a choice's prompt; None unless the request asks for them."""
        return list(self.prompts.values())[index // self.n] if self.request.return_token_ids else None

    @abstractmethod
    def whole(self, outputs: list[RequestOutput]) -> BaseModel:
        """The answer, from the final output of every engine request."""
        ...

    @abstractmethod
    def opening(self) -> Iterable[BaseModel]:
        """Chunks that come just before the first token."""
        ...

    @abstractmethod
    def chunk(self, index: int, sequence: CompletionOutput) -> BaseModel:
        """The chunk that carries what is new in a choice."""
        ...

    @abstractmethod
    def closing(self) -> BaseModel:
        """The chunk with the usage and no choices."""
        ...


class CompletionReply(Reply):
    """``/v1/completions``."""

    request: CompletionRequest

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._offsets: dict[int, int] = {}  # choice → characters of its tokens so far
        # choice → texts and log-probabilities of its prompt's tokens, which are its first
        self._echoed: dict[int, tuple[list[str], list[Position | None]]] = {}
        self._scores: dict[str, list[Position | None]] = {}  # request → log-probabilities of its prompt
        self._begun: set[int] = set()  # choices that have their prompt
        self._told: set[int] = set()  # choices that have its token ids

    def whole(self, outputs: list[RequestOutput]) -> CompletionResponse:
        if self.request.best_of is not None:
            outputs = [self._best(output) for output in outputs]
        choices = [self._choice(index, sequence) for output in outputs for index, sequence in self.choices(output)]
        choices.sort(key=lambda choice: choice.index)
        return CompletionResponse(**self.head, choices=choices, usage=self.usage)

    def choices(self, output: RequestOutput) -> Iterable[tuple[int, CompletionOutput]]:
        """With `echo`, the first piece of a choice follows its prompt, unless the opening chunks hold the prompt."""
        if output.prompt_logprobs is not None:
            self._scores[output.request_id] = output.prompt_logprobs
        if self.request.is_echo_alone:
            output = replace(output, outputs=[replace(each, **NOTHING) for each in output.outputs])
        for index, sequence in self.noted(super().choices(output)):
            if not self.request.echo or self._opens_with_prompt or index in self._begun:
                yield index, sequence
            else:
                self._begun.add(index)
                yield index, self._with_prompt(output, index, sequence)

    @property
    def _opens_with_prompt(self) -> bool:
        """Whether a stream's first chunks are the prompts. With log-probabilities, prompts come with the first tokens."""
        return bool(self.request.echo and self.request.stream) and self.request.logprobs is None

    def opening(self) -> Iterable[CompletionResponse]:
        for index in range(len(self.prompts) * self.n) if self._opens_with_prompt else ():
            choice = CompletionChoice(index=index, text=self._echo(index))
            yield CompletionResponse(**self.head, choices=[choice], usage=self.usage_so_far(index, 0))

    def chunk(self, index: int, sequence: CompletionOutput) -> CompletionResponse:
        choice = self._choice(index, sequence)
        self._told.add(index)
        return CompletionResponse(**self.head, choices=[choice], usage=self.usage_so_far(index))

    def closing(self) -> CompletionResponse:
        return CompletionResponse(**self.head, choices=[], usage=self.usage)

    def _best(self, output: RequestOutput) -> RequestOutput:
        """The output with the `n` sequences that are likeliest per token. The usage counts the others too."""
        ranked = sorted(output.outputs, key=_likelihood, reverse=True)
        self._tokens[-1] += sum(len(each.token_ids) for each in ranked[self.n :])  # of no choice
        return replace(output, outputs=[replace(each, index=i) for i, each in enumerate(ranked[: self.n])])

    def _choice(self, index: int, sequence: CompletionOutput) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=sequence.text,
            logprobs=self._logprobs(index, sequence),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            token_ids=self.take_ids(index),
            prompt_token_ids=None if index in self._told else self.prompt_ids(index),
            prompt_logprobs=self._prompt_logprobs(index),
        )

    def _prompt_logprobs(self, index: int) -> PromptLogprobs:
        if self.request.prompt_logprobs is None:
            return None
        return prompt_logprobs(self._scores[list(self.prompts)[index // self.n]])

    def _with_prompt(self, output: RequestOutput, index: int, sequence: CompletionOutput) -> CompletionOutput:
        """A sequence, or its beginning, behind the prompt."""
        echo, prompt_ids = self._echo(index), output.prompt_token_ids
        logprobs = None
        if (scores := self._scores.get(output.request_id)) is not None:
            logprobs = sequence.logprobs
            self._echoed[index] = prompt_texts(self.tokenizer, self._prompt(index), prompt_ids, echo), scores
        return replace(sequence, text=echo + sequence.text, token_ids=prompt_ids + sequence.token_ids, logprobs=logprobs)

    def _prompt(self, index: int) -> str | list[int]:
        return self.request.prompt[index // self.n]

    def _echo(self, index: int) -> str:
        prompt = self._prompt(index)
        if isinstance(prompt, str):
            return prompt
        return "" if self.tokenizer is None else self.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)

    def _logprobs(self, index: int, sequence: CompletionOutput) -> CompletionLogprobs | None:
        if self.request.logprobs is None or sequence.logprobs is None:
            return None
        start, (echoed, scores) = self._offsets.get(index, 0), self._echoed.pop(index, ([], []))
        positions = [*scores, *sequence.logprobs]
        if self.request.return_tokens_as_token_ids:
            positions, echoed = without_texts(positions), [f"token_id:{token}" for token in sequence.token_ids[: len(echoed)]]
        result = completion_logprobs(sequence.token_ids, positions, start, echoed)
        self._offsets[index] = start + sum(map(len, result.tokens))
        return result


def _likelihood(sequence: CompletionOutput) -> float:
    """Mean log-probability of a sequence's tokens; whoever asks for the best of several has them computed."""
    assert sequence.cumulative_logprob is not None
    return sequence.cumulative_logprob / max(1, len(sequence.token_ids))


class ChatReply(Reply):
    """``/v1/chat/completions``."""

    request: ChatCompletionRequest

    def whole(self, outputs: list[RequestOutput]) -> ChatCompletionResponse:
        choices = [
            ChatChoice(
                index=index,
                message=self._message(index, sequence),
                logprobs=self._logprobs(sequence),
                finish_reason=self._reason(index, sequence),
                stop_reason=sequence.stop_reason,
                token_ids=self.take_ids(index),
            )
            for output in outputs
            for index, sequence in self.choices(output)
        ]
        choices.sort(key=lambda choice: choice.index)
        return ChatCompletionResponse(**self.head, choices=choices, usage=self.usage, **self.about_prompt(outputs))

    def _message(self, index: int, sequence: CompletionOutput) -> AssistantMessage:
        """What a choice says."""
        return AssistantMessage(content=sequence.text)

    def _reason(self, index: int, sequence: CompletionOutput) -> FinishReason | None:
        """Why a choice has ended."""
        return sequence.finish_reason

    def about_prompt(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """What an answer says of its prompt, if the request asks for it."""
        asked = self.request.prompt_logprobs is not None
        scores = prompt_logprobs(outputs[0].prompt_logprobs) if asked else None
        return {"prompt_token_ids": self.prompt_ids(0), "prompt_logprobs": scores}

    def choices(self, output: RequestOutput) -> Iterable[tuple[int, CompletionOutput]]:
        return self.noted(super().choices(output))

    def opening(self) -> Iterable[ChatCompletionChunk]:
        """A chunk for each choice: the role, an empty text, `usage_so_far` of no token; in the first alone the prompt's ids."""
        raise NotImplementedError("Stage 5 · Task 5.3: ChatReply.opening, see stages/stage5_production/GUIDE.md#task-5-3")

    def chunk(self, index: int, sequence: CompletionOutput) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=sequence.text),
            logprobs=self._logprobs(sequence),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            token_ids=self.take_ids(index),
        )
        return ChatCompletionChunk(**self.head, choices=[choice], usage=self.usage_so_far(index))

    def closing(self) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self.head, choices=[], usage=self.usage)

    def _logprobs(self, sequence: CompletionOutput) -> ChatLogprobs | None:
        if not self.request.logprobs or sequence.logprobs is None:
            return None
        positions = without_texts(sequence.logprobs) if self.request.return_tokens_as_token_ids else sequence.logprobs
        return chat_logprobs(self.tokenizer, sequence.token_ids, positions, self.request.top_logprobs or 0)


async def server_sent_events(reply: Reply, stream: OutputStream) -> AsyncIterator[str]:
    """The answer as server-sent events: the opening chunks, a chunk for each piece of a choice, the usage if the request asks
    for it, ``[DONE]``. Each is sent as soon as it is known. A piece without text or log-probabilities makes no event, unless
    it ends its choice. The opening waits for the first piece, because clients take the time of the first event for the time of
    the first token.

    An error after the start cannot change the HTTP status, which is sent already. It becomes one more event, before ``[DONE]``:
    503 and its message if the engine is dead, otherwise 500 and "internal server error"; the exception goes to the log.
    """
    # Hint: An async generator: what you yield goes out at once, and between two yields the client waits with you.
    raise NotImplementedError("Stage 5 · Task 5.3: server_sent_events, see stages/stage5_production/GUIDE.md#task-5-3")
    yield  # which makes it a generator; keep a yield


def _event(data: BaseModel) -> str:
    """An event as it goes over the wire: a line that begins with ``data: `` and holds the JSON, its nulls too, then an empty
    line (WHATWG HTML, §9.2)."""
    raise NotImplementedError("Stage 5 · Task 5.3: _event, see stages/stage5_production/GUIDE.md#task-5-3")
