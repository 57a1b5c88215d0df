"""A request of Anthropic's Messages API, and the chat completion that answers it.

Source: https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from .errors import RequestError
from .openai_fields import Int, Number, Request
from .translated_chat import TranslatedChat

UNHEARD = "redacted_thinking"
"""A type of content blocks that nobody here can read."""


class MessagesChat(TranslatedChat):
    """The chat completion that answers a message. Clients send a budget of thoughts to every model."""

    insists = False
    names: ClassVar[dict[str, str]] = {
        "thinking_token_budget": "thinking.budget_tokens", "reasoning_effort": "output_config.effort",
        "response_format": "output_config.format",
    }  # fmt: skip


class OutputFormat(Request):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Request):
    effort: str | None = None
    """How much the model shall think."""
    format: OutputFormat | None = None


class CountTokensRequest(Request):
    """Body of ``POST /v1/messages/count_tokens``."""

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: Any = None
    """A text or blocks of text."""
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    """Of the type ``enabled``, perhaps with `budget_tokens`, or ``disabled``: for a model that thinks, and whose template knows
    `enable_thinking`."""

    def chat(self) -> MessagesChat:
        """The chat completion that answers.

        Raises:
            RequestError: a field is not valid.
        """
        return MessagesChat.read(self._fields())

    def _fields(self) -> dict[str, Any]:
        system: list[dict[str, Any]] = (
            [] if self.system is None else [{"role": "system", "content": _texts(self.system, "system")}]
        )
        messages = [each for index, message in enumerate(self.messages) for each in _messages(message, f"messages[{index}]")]
        fields: dict[str, Any] = {"model": self.model, "messages": system + messages}
        last = messages[-1]
        if last["role"] == "assistant" and last["content"] and "tool_calls" not in last:
            fields["continue_final_message"] = True  # the beginning of the answer
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking.get("type") != "disabled"}
            fields["thinking_token_budget"] = self.thinking.get("budget_tokens")
        if self.tools:
            fields["tools"] = [_tool(index, tool) for index, tool in enumerate(self.tools)]
            fields |= _tool_choice(self.tool_choice or {"type": "auto"})
        return fields


class MessagesRequest(CountTokensRequest):
    """Body of ``POST /v1/messages``."""

    max_tokens: Int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Int | None = None
    metadata: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The older name of `output_config`'s `format`."""

    def _fields(self) -> dict[str, Any]:
        config = self.output_config or OutputConfig()
        form = config.format or self.output_format
        schema = None if form is None else {"name": "answer", "schema": form.schema_}
        return super()._fields() | {
            "reasoning_effort": config.effort,
            "response_format": None if schema is None else {"type": "json_schema", "json_schema": schema},
            "max_completion_tokens": self.max_tokens, "stop": self.stop_sequences or None, "stream": self.stream,
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
        }  # fmt: skip


def _messages(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """A message in a chat's form: results of tools become messages of their own, before what the user says besides.

    Raises:
        RequestError: a part of it is none that this server knows.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise RequestError(f"{place}.role must be user or assistant, got {json.dumps(role)}", f"{place}.role")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RequestError(f"{place}.content must be a string or a list of blocks", f"{place}.content")
    texts, thoughts, calls, results = [], [], [], []
    for index, block in enumerate(content):
        where = f"{place}.content[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_text(block, "text", where))
        elif kind == "tool_use" and role == "assistant":
            function = {
                "name": _text(block, "name", where),
                "arguments": json.dumps(block.get("input", {}), ensure_ascii=False),
            }
            calls.append({"id": _text(block, "id", where), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            result = _texts(block.get("content") or "", f"{where}.content")
            results.append({"role": "tool", "tool_call_id": _text(block, "tool_use_id", where), "content": result})
        elif kind == "thinking" and role == "assistant":
            thoughts.append(_text(block, "thinking", where))
        elif kind != UNHEARD:
            raise RequestError(
                f"{where}: this server takes no blocks of type {json.dumps(kind)} from the {role}", f"{where}.type"
            )
    said: dict[str, Any] = {"role": role, "content": "".join(texts) if texts or not calls else None}
    if calls:
        said["tool_calls"] = calls
    if thoughts:
        said["reasoning_content"] = "".join(thoughts)
    return [*results, said] if texts or calls or not results else results


def _texts(value: Any, place: str) -> str:
    """A text, or the texts of blocks joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError(f"{place} must be a string or a list of blocks", place)
    for index, block in enumerate(value):
        if not isinstance(block, dict) or block.get("type") != "text":
            raise RequestError(f"{place}[{index}]: this server takes blocks of type text only", f"{place}[{index}]")
    return "".join(_text(block, "text", f"{place}[{index}]") for index, block in enumerate(value))


def _text(block: dict[str, Any], key: str, place: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{place}.{key} must be a string", f"{place}.{key}")
    return value


def _tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    place = f"tools[{index}]"
    if tool.get("type") not in (None, "custom"):
        raise RequestError(
            f"{place}: this server has tools of type custom only, got {json.dumps(tool['type'])}", f"{place}.type"
        )
    function = {"name": _text(tool, "name", place), "parameters": tool.get("input_schema") or {"type": "object"}}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    """The fields of a chat completion that say what may be called."""
    choices: dict[Any, Any] = {
        "auto": "auto", "any": "required", "none": "none",
        "tool": {"type": "function", "function": {"name": choice.get("name")}},
    }  # fmt: skip
    kind = choice.get("type")
    if not isinstance(kind, str) or kind not in choices:
        raise RequestError(f"tool_choice.type must be one of {', '.join(choices)}; got {json.dumps(kind)}", "tool_choice.type")
    fields = {"tool_choice": choices[kind]}
    return fields | {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else fields
