"""A chat completion's answer in the format of Anthropic's Messages API."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterable, Iterator

from ..core.output import RequestOutput
from .async_engine import EngineDeadError
from .messages_events import Event, MessageBuilder
from .openai_answers import ToolCall, ToolCallDelta, Usage
from .output_stream import OutputStream
from .responses import ChatReply, Reply
from .wire import Wire

logger = logging.getLogger(__name__)


class MessagesWire(Wire):
    """Translates one answer."""

    def whole(self, reply: Reply, outputs: list[RequestOutput]) -> str:
        assert isinstance(reply, ChatReply)
        (choice,) = reply.whole(outputs).choices
        builder = MessageBuilder(reply.head["id"], reply.head["model"])
        for _ in said(builder, choice.message.content, choice.message.tool_calls or ()):
            pass
        for _ in builder.end(choice.finish_reason or "stop", stop_sequence(choice.stop_reason), usage_of(reply.usage)):
            pass
        return json.dumps(builder.message)

    async def events(self, reply: Reply, stream: OutputStream) -> AsyncIterator[str]:
        """The stream's events, each with its type in a line before it. The last one is ``error`` if it fails."""
        assert isinstance(reply, ChatReply)
        builder, reason, stopped, begun = MessageBuilder(reply.head["id"], reply.head["model"]), "stop", None, False
        try:
            async for output in stream:
                for index, sequence in reply.choices(output):
                    for event in () if begun else builder.start(usage_of(reply.usage)):  # with the first token, as in a chat
                        yield wire_event(event)
                    begun = True
                    (choice,) = reply.chunk(index, sequence).choices
                    for event in said(builder, choice.delta.content, choice.delta.tool_calls or ()):
                        yield wire_event(event)
                    reason, stopped = choice.finish_reason or reason, stop_sequence(choice.stop_reason)
            for event in builder.end(reason, stopped, usage_of(reply.usage)):
                yield wire_event(event)
        except EngineDeadError as error:
            yield wire_event({"type": "error", "error": {"type": "overloaded_error", "message": str(error)}})
        except Exception:
            logger.exception("A stream has failed")
            yield wire_event({"type": "error", "error": {"type": "api_error", "message": "internal server error"}})


def said(builder: MessageBuilder, text: str | None, calls: Iterable[ToolCall | ToolCallDelta]) -> Iterator[Event]:
    """The events of a message, or of a piece of one."""
    if text:
        yield from builder.text(text)
    for position, call in enumerate(calls):
        index = call.index if isinstance(call, ToolCallDelta) else position
        yield from builder.call(index, call.id, call.function.name, call.function.arguments or "")


def stop_sequence(reason: int | str | None) -> str | None:
    """The stop sequence that ended an answer; a stop token is none."""
    return reason if isinstance(reason, str) else None


def usage_of(usage: Usage) -> dict[str, int]:
    """A usage as this API writes it: prompt tokens from the cache count by themselves."""
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }  # fmt: skip


def wire_event(event: Event) -> str:
    """An event as it goes over the wire: its type, and its JSON."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
