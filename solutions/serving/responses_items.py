"""Input items of the Responses API as the messages of a chat, and output items as the message that they were.

Source: https://platform.openai.com/docs/api-reference/responses (create, input items).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any

from .errors import RequestError

TEXTS = ("input_text", "output_text", "reasoning_text", "text")
"""Types of content parts that hold a text."""
Message = dict[str, Any]


def messages_of(items: str | list[Any]) -> list[Message]:
    """The messages of an input: a text is what the user says. Calls of functions join the assistant's message before them, and
    thoughts the one behind them.

    Raises:
        RequestError: an item is none that this server knows; names its place.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Message] = []
    thought = ""
    for index, item in enumerate(items):
        place = f"input[{index}]"
        if not isinstance(item, dict):
            raise RequestError(f"{place} must be an object", place)
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            messages.append({"role": _text(item, "role", place), "content": _content(item.get("content"), f"{place}.content")})
        elif kind == "function_call":
            function = {"name": _text(item, "name", place), "arguments": _text(item, "arguments", place)}
            _add_call(messages, {"id": _text(item, "call_id", place), "type": "function", "function": function})
        elif kind == "function_call_output":
            result = _content(item.get("output"), f"{place}.output")
            messages.append({"role": "tool", "tool_call_id": _text(item, "call_id", place), "content": result})
        elif kind == "reasoning":
            thought = _content(item.get("content") or "", f"{place}.content")
            continue
        else:
            raise RequestError(f"{place}: this server takes no items of type {kind!r}", f"{place}.type")
        if thought and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thought
        thought = ""
    return messages


def message_of(output: Iterable[dict[str, Any]]) -> list[Message]:
    """What the assistant thought and said, from the items of an answer, for the next turn."""
    return messages_of(list(output))


def items_of(given: str | list[Any]) -> list[dict[str, Any]]:
    """An input as items with ids, for clients that ask what a response was made of."""
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [{"id": f"msg_{uuid.uuid4().hex}", "type": "message", **item} for item in given]


def _add_call(messages: list[Message], call: dict[str, Any]) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(item: dict[str, Any], key: str, place: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{place}.{key} must be a string", f"{place}.{key}")
    return value


def _content(value: Any, place: str) -> str:
    """A text, or the texts of parts joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError(f"{place} must be a string or a list of parts", place)
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in (*TEXTS, "refusal"):
            raise RequestError(
                f"{place}[{index}]: this server takes texts only, got a part of type {kind!r}", f"{place}[{index}]"
            )
        texts.append(_text(part, "refusal" if kind == "refusal" else "text", f"{place}[{index}]"))
    return "".join(texts)


def tool_of(index: int, tool: Any) -> dict[str, Any]:
    """A tool as a chat has it.

    Raises:
        RequestError: it is no function.
    """
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise RequestError(
            f"tools[{index}]: this server has tools of type function only, got {json.dumps(kind)}", f"tools[{index}]"
        )
    known = ("name", "description", "parameters", "strict")  # what else clients send changes nothing here
    return {"type": "function", "function": {key: tool[key] for key in known if tool.get(key) is not None}}
