"""Tools, calls and their results in words, for a chat template that knows only texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .tool_format import Function, ToolFormat

INSTRUCTIONS = """You can call functions. To call one, answer with nothing but the call, in this form:
{example}
You get the result, and then answer. If no function is of use, answer without a call.
These are the functions, with the JSON schemas of their arguments:
{functions}"""
"""What a model is told that was not trained on tools."""


def instructions(tool_format: ToolFormat, functions: Sequence[Function]) -> str:
    """`INSTRUCTIONS` for a format and functions."""
    example = tool_format.write([("name_of_the_function", {"name_of_an_argument": "value"})])
    told = "\n".join(json.dumps(each.as_tool()["function"], ensure_ascii=False) for each in functions)
    return INSTRUCTIONS.format(example=example, functions=told)


def in_words(
    messages: Sequence[dict[str, Any]], functions: Sequence[Function], tool_format: ToolFormat
) -> list[dict[str, Any]]:
    """A conversation of texts: functions become a part of the first message, the system's, calls what the assistant has said,
    and results what the user says next."""
    told: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for message in messages:
        text, role = _text(message.get("content")), message["role"]
        calls = message.get("tool_calls") or []
        names |= {call["id"]: call["function"]["name"] for call in calls}
        if calls:
            written = tool_format.write([(call["function"]["name"], call["function"]["arguments"]) for call in calls])
            text = f"{text}\n{written}" if text else written
        if role == "tool":
            role, text = "user", f"Result of {names.get(message['tool_call_id'], 'the call')}: {text}"
            if told and told[-1]["role"] == "user":
                told[-1]["content"] += f"\n{text}"
                continue
        if role == "user" and told and told[-1]["role"] == "user":  # behind results
            told[-1]["content"] += f"\n{text}"
        else:
            told.append({"role": role, "content": text})
    if functions:
        rules = instructions(tool_format, functions)
        if told and told[0]["role"] == "system":
            told[0]["content"] += f"\n\n{rules}"
        else:
            told.insert(0, {"role": "system", "content": rules})
    return told


def _text(content: str | list[dict[str, str]] | None) -> str:
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""
