"""What a model says, as the content blocks and the events of Anthropic's Messages API.

Source: https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .openai_answers import Usage
from .translated_wire import AnswerBuilder, Event

STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn", "abort": "end_turn"}


class MessageBuilder(AnswerBuilder):
    """Builds one message.

    Args:
        message_id: begins with ``msg_``. model: the name that the request used.

    """

    def __init__(self, message_id: str, model: str) -> None:
        self.answer = {
            "id": message_id, "type": "message", "role": "assistant", "model": model, "content": [], "stop_reason": None,
            "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0},
        }  # fmt: skip
        self._arguments = ""
        self._call: int | None = None  # index of the call, in the chat's answer, whose block is open
        self._open: str | None = None  # type of the block that is open

    def begin(self, usage: Usage) -> Iterator[Event]:
        self.answer["usage"] = usage_of(usage)
        yield {"type": "message_start", "message": {**self.answer, "content": []}}

    def thought(self, delta: str) -> Iterator[Event]:
        if self._open != "thinking":
            yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
        self.answer["content"][-1]["thinking"] += delta
        yield self._delta({"type": "thinking_delta", "thinking": delta})

    def text(self, delta: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if self._open != "text":
            yield from self._begin({"type": "text", "text": ""})
        self.answer["content"][-1]["text"] += delta
        yield self._delta({"type": "text_delta", "text": delta})

    def call(self, index: int, call_id: str | None, name: str | None, arguments: str) -> Iterator[Event]:
        if self._open != "tool_use" or self._call != index:
            yield from self._begin({"type": "tool_use", "id": call_id, "name": name, "input": {}})
            self._call, self._arguments = index, ""
        if arguments:
            self._arguments += arguments
            yield self._delta({"type": "input_json_delta", "partial_json": arguments})

    def end(self, finish_reason: str, stop_reason: int | str | None, usage: Usage) -> Iterator[Event]:
        """A stop string is this API's stop sequence; a stop token is none."""
        yield from self._close()
        sequence = stop_reason if isinstance(stop_reason, str) else None
        reason = STOP_REASONS[finish_reason] if sequence is None else "stop_sequence"
        self.answer |= {"stop_reason": reason, "stop_sequence": sequence, "usage": usage_of(usage)}
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield {"type": "message_delta", "delta": delta, "usage": self.answer["usage"]}
        yield {"type": "message_stop"}

    def fail(self, message: str, status: int) -> Iterator[Event]:
        kind = "overloaded_error" if status == 503 else "api_error"
        yield {"type": "error", "error": {"type": kind, "message": message}}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.answer["content"]) - 1, "delta": delta}

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self.answer["content"].append(block)
        self._open = block["type"]
        yield {"type": "content_block_start", "index": len(self.answer["content"]) - 1, "content_block": dict(block)}

    def _close(self) -> Iterator[Event]:
        if self._open is None:
            return
        if self._open == "tool_use":
            self.answer["content"][-1]["input"] = _arguments(self._arguments)
        self._open = None
        yield {"type": "content_block_stop", "index": len(self.answer["content"]) - 1}


def usage_of(usage: Usage) -> dict[str, int]:
    """A usage as this API writes it: prompt tokens from the cache count by themselves."""
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }  # fmt: skip


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call. A call that was cut off before they were complete has none."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
