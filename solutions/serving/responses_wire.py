"""A chat completion's answer in the format of the Responses API."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from ..core.output import RequestOutput
from .async_engine import EngineDeadError
from .openai_answers import ChatLogprobs, ToolCall, ToolCallDelta, Usage
from .output_stream import OutputStream
from .responses import ChatReply, Reply
from .responses_events import Event, ResponseBuilder
from .wire import Wire

logger = logging.getLogger(__name__)


class ResponsesWire(Wire):
    """Translates one answer.

    Args:
        builder: of the response.
        on_end: called when the response is whole, or has failed.
    """

    def __init__(self, builder: ResponseBuilder, on_end: Callable[[], None]) -> None:
        self._builder, self._on_end = builder, on_end

    def whole(self, reply: Reply, outputs: list[RequestOutput]) -> str:
        assert isinstance(reply, ChatReply)
        (choice,) = reply.whole(outputs).choices
        for _ in self._builder.created():
            pass
        for _ in self._said(choice.message.content, choice.message.tool_calls or (), choice.logprobs):
            pass
        for _ in self._builder.end(choice.finish_reason or "stop", usage_of(reply.usage)):
            pass
        self._on_end()
        return json.dumps(self._builder.response)

    async def events(self, reply: Reply, stream: OutputStream) -> AsyncIterator[str]:
        """The stream's events, each with its type in a line before it. An error becomes the event ``response.failed``."""
        assert isinstance(reply, ChatReply)
        reason, begun = "stop", False
        try:
            async for output in stream:
                for index, sequence in reply.choices(output):
                    for event in () if begun else self._builder.created():  # with the first token, as in a chat
                        yield wire_event(event)
                    begun = True
                    (choice,) = reply.chunk(index, sequence).choices
                    for event in self._said(choice.delta.content, choice.delta.tool_calls or (), choice.logprobs):
                        yield wire_event(event)
                    reason = choice.finish_reason or reason
            for event in self._builder.end(reason, usage_of(reply.usage)):
                yield wire_event(event)
        except EngineDeadError as error:
            for event in self._builder.fail(str(error)):
                yield wire_event(event)
        except Exception:
            logger.exception("A stream has failed")
            for event in self._builder.fail("internal server error"):
                yield wire_event(event)
        self._on_end()

    def _said(
        self, text: str | None, calls: Iterable[ToolCall | ToolCallDelta], logprobs: ChatLogprobs | None
    ) -> Iterator[Event]:
        """The events of a message, or of a piece of one."""
        if text:
            scores = [] if logprobs is None else [each.model_dump() for each in logprobs.content]
            yield from self._builder.text(text, scores)
        for position, call in enumerate(calls):
            index = call.index if isinstance(call, ToolCallDelta) else position
            yield from self._builder.call(index, call.id, call.function.name, call.function.arguments or "")


def usage_of(usage: Usage) -> dict[str, Any]:
    """A usage as this API writes it."""
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens, "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }  # fmt: skip


def wire_event(event: Event) -> str:
    """An event as it goes over the wire: its type, and its JSON."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
