"""A chat completion's answer as the answer of another API, whole or as events.

The whole answer is made of the same events, so that a stream adds up to it.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from ..core.output import RequestOutput
from .async_engine import EngineDeadError
from .openai_answers import ChatLogprobs, ToolCall, ToolCallDelta, Usage
from .output_stream import OutputStream
from .responses import ChatReply, Reply
from .wire import Wire

logger = logging.getLogger(__name__)
Event = dict[str, Any]
"""Has a ``type``."""


class AnswerBuilder(ABC):
    """Builds one answer of another API piece by piece. Each method yields the events that say what is new.

    Attributes:
        answer: the answer as it is now.
    """

    answer: dict[str, Any]

    @abstractmethod
    def begin(self, usage: Usage) -> Iterator[Event]:
        """The model has begun; the usage counts the prompt."""
        ...

    @abstractmethod
    def thought(self, delta: str) -> Iterator[Event]:
        """More of what the model thinks."""
        ...

    @abstractmethod
    def text(self, delta: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """More of what the model says to the user, and the log-probabilities of its tokens, if they are asked for."""
        ...

    @abstractmethod
    def call(self, index: int, call_id: str | None, name: str | None, arguments: str) -> Iterator[Event]:
        """More of a call: its id and its name come with its first piece."""
        ...

    @abstractmethod
    def end(self, finish_reason: str, stop_reason: int | str | None, usage: Usage) -> Iterator[Event]:
        """The model has ended, for reasons that chat completions have."""
        ...

    @abstractmethod
    def fail(self, message: str, status: int) -> Iterator[Event]:
        """It cannot go on; an HTTP status says why."""
        ...


class TranslatedWire(Wire):
    """Translates one answer.

    Args:
        on_end: called when the answer is whole, or has failed.
    """

    def __init__(self, builder: AnswerBuilder, on_end: Callable[[], None] = lambda: None) -> None:
        self._builder, self._on_end = builder, on_end

    def whole(self, reply: Reply, outputs: list[RequestOutput]) -> str:
        """The whole answer, as JSON."""
        assert isinstance(reply, ChatReply)
        (choice,) = reply.whole(outputs).choices
        builder, message = self._builder, choice.message
        _run(builder.begin(reply.usage))
        _run(self._said(message.reasoning, message.content, message.tool_calls or (), choice.logprobs))
        _run(builder.end(choice.finish_reason or "stop", choice.stop_reason, reply.usage))
        self._on_end()
        return json.dumps(builder.answer)

    async def events(self, reply: Reply, stream: OutputStream) -> AsyncIterator[str]:
        """The answer as server-sent events, each with its type in a line before it. The first ones come with the first
        token, as in a chat. An error becomes an event of the API's own."""
        async for event in self._events(reply, stream):
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        self._on_end()

    async def _events(self, reply: Reply, stream: OutputStream) -> AsyncIterator[Event]:
        assert isinstance(reply, ChatReply)
        reason, stopped, begun = "stop", None, False
        try:
            async for output in stream:
                for index, sequence in reply.choices(output):
                    for event in () if begun else self._builder.begin(reply.usage):
                        yield event
                    begun = True
                    (choice,) = reply.chunk(index, sequence).choices
                    new = choice.delta
                    for event in self._said(new.reasoning, new.content, new.tool_calls or (), choice.logprobs):
                        yield event
                    reason, stopped = choice.finish_reason or reason, choice.stop_reason
            for event in self._builder.end(reason, stopped, reply.usage):
                yield event
            return
        except EngineDeadError as error:
            failure = str(error), 503
        except Exception:
            logger.exception("A stream has failed")
            failure = "internal server error", 500
        for event in () if begun else self._builder.begin(reply.usage):  # clients want to know what has failed
            yield event
        for event in self._builder.fail(*failure):
            yield event

    def _said(
        self, thought: str | None, text: str | None, calls: Iterable[ToolCall | ToolCallDelta], logprobs: ChatLogprobs | None
    ) -> Iterator[Event]:
        """The events of a message, or of a piece of one."""
        if thought:
            yield from self._builder.thought(thought)
        if text:
            scores = [] if logprobs is None else [each.model_dump() for each in logprobs.content]
            yield from self._builder.text(text, scores)
        for position, call in enumerate(calls):
            index = call.index if isinstance(call, ToolCallDelta) else position
            yield from self._builder.call(index, call.id, call.function.name, call.function.arguments or "")


def _run(events: Iterator[Event]) -> None:
    """Build what the events say, without sending them."""
    deque(events, maxlen=0)
