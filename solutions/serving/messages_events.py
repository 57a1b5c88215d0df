"""What a model says, as the content blocks and the events of Anthropic's Messages API.

The whole answer is made by the events' own code, so that a stream adds up to it.

Source: https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn", "abort": "end_turn"}


class MessageBuilder:
    """Builds one message piece by piece. Each method yields the events that say what is new.

    Args:
        message_id: begins with ``msg_``. model: the name that the request used.

    Attributes:
        message: the message as it is now.
    """

    def __init__(self, message_id: str, model: str) -> None:
        self.message: dict[str, Any] = {
            "id": message_id, "type": "message", "role": "assistant", "model": model, "content": [], "stop_reason": None,
            "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0},
        }  # fmt: skip
        self._arguments = ""
        self._call: int | None = None  # index of the call, in the chat's answer, whose block is open
        self._open: str | None = None  # type of the block that is open

    def start(self, usage: dict[str, int]) -> Iterator[Event]:
        """The message has begun."""
        self.message["usage"] = usage
        yield {"type": "message_start", "message": {**self.message, "content": []}}

    def text(self, delta: str) -> Iterator[Event]:
        """More of what the model says."""
        if self._open != "text":
            yield from self._begin({"type": "text", "text": ""})
        self.message["content"][-1]["text"] += delta
        yield self._delta({"type": "text_delta", "text": delta})

    def call(self, index: int, call_id: str | None, name: str | None, arguments: str) -> Iterator[Event]:
        """More of a call: its id and its name come with its first piece."""
        if self._open != "tool_use" or self._call != index:
            yield from self._begin({"type": "tool_use", "id": call_id, "name": name, "input": {}})
            self._call, self._arguments = index, ""
        if arguments:
            self._arguments += arguments
            yield self._delta({"type": "input_json_delta", "partial_json": arguments})

    def end(self, finish_reason: str, stop_sequence: str | None, usage: dict[str, int]) -> Iterator[Event]:
        """The model has ended, for a reason that chat completions have, or at a stop sequence."""
        yield from self._close()
        reason = STOP_REASONS[finish_reason] if stop_sequence is None else "stop_sequence"
        self.message |= {"stop_reason": reason, "stop_sequence": stop_sequence, "usage": usage}
        yield {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": stop_sequence}, "usage": usage}
        yield {"type": "message_stop"}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.message["content"]) - 1, "delta": delta}

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self.message["content"].append(block)
        self._open = block["type"]
        yield {"type": "content_block_start", "index": len(self.message["content"]) - 1, "content_block": dict(block)}

    def _close(self) -> Iterator[Event]:
        if self._open is None:
            return
        if self._open == "tool_use":
            self.message["content"][-1]["input"] = _arguments(self._arguments)
        self._open = None
        yield {"type": "content_block_stop", "index": len(self.message["content"]) - 1}


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call. A call that was cut off before they were complete has none."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
