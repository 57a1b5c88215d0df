"""The conversation of a request: messages, calls of tools in them, and their results.

Source: https://platform.openai.com/docs/api-reference/chat/create; `function_call` and the role ``function`` are older names.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from .errors import RequestError
from .openai_fields import Request, text_or_list, unless_empty


class TextPart(Request):
    type: Literal["text"]
    text: str


def _text_or_parts(value: Any, check_parts: ValidatorFunctionWrapHandler) -> Any:
    """A text or parts, as they came. A pydantic union would put the names of its members into the path of an error."""
    return value if isinstance(value, str) else check_parts([_readable(part) for part in text_or_list(value)])


def _readable(part: Any) -> Any:
    """What an assistant has refused to say is a text to the model."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _as_text(value: Any) -> Any:
    """Arguments as some clients send them back: as an object."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def _known_role(role: str) -> str:
    """OpenAI's newer name of the role system is the same to every template."""
    return "system" if role == "developer" else role


class CalledFunction(Request):
    name: str
    arguments: Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str)]
    """The text of a JSON object."""


class ToolCall(Request):
    """A call of an earlier turn."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Request):
    role: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$"), AfterValidator(_known_role)]
    """Any that the model's chat template takes."""
    content: Annotated[list[TextPart], WrapValidator(_text_or_parts, json_schema_input_type=str | list[TextPart])]
    """A text or parts, as they came; an assistant's content may be null."""
    tool_calls: Annotated[list[ToolCall] | None, BeforeValidator(unless_empty)] = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    name: str | None = None
    """Of the function, in a result; elsewhere it changes nothing."""
    reasoning_content: str | None = None
    """What the assistant thought before it said that, for templates that repeat it; `reasoning` is vLLM's newer name."""
    reasoning: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Role and content, thoughts, and what there is about tools, for a chat template."""
        content = self.content
        parts = content if isinstance(content, str) else [{"type": part.type, "text": part.text} for part in content]
        thought = self.reasoning if self.reasoning_content is None else self.reasoning_content
        fields: dict[str, Any] = {"tool_call_id": self.tool_call_id, "reasoning_content": thought, "reasoning": thought}
        if self.function_call is not None:
            fields["function_call"] = self.function_call.model_dump()
        if self.tool_calls is not None:
            fields["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.role in ("tool", "function"):
            fields["name"] = self.name
        fields = {name: value for name, value in fields.items() if value is not None}
        return {"role": self.role, "content": parts, **fields}

    @model_validator(mode="before")
    @classmethod
    def _allow_silence(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") == "assistant" and data.get("content") is None:
            return {**data, "content": data.get("refusal") or "", "refusal": None}
        return data


def conversation_of(given: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a chat template; calls in them have their results.

    Raises:
        RequestError: one is missing.
    """
    messages = [message.as_dict() for message in given]
    link_calls(messages)
    return messages


def link_calls(messages: list[dict[str, Any]]) -> None:
    """Check that each result answers a call and each call has its result; of older fields make the newer ones, in place. The
    arguments of calls become values.

    Raises:
        RequestError: something is missing; `param` is the message.
    """
    waiting: list[str] = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if (old := message.pop("function_call", None)) is not None:
            message["tool_calls"] = [{"id": f"call_{index}", "type": "function", "function": old}]
        if message["role"] == "function":
            message |= {"role": "tool", "tool_call_id": waiting[0] if waiting else ""}
        if message["role"] == "tool":
            if message.get("tool_call_id") not in waiting:
                raise RequestError(
                    f"{place}: a message of the role 'tool' must answer a call of 'tool_calls' in a message before it, by its "
                    "'tool_call_id'", f"{place}.tool_call_id" if message.get("tool_call_id") else f"{place}.role",
                )  # fmt: skip
            waiting.remove(message["tool_call_id"])
        elif waiting:
            raise _unanswered(index, waiting)
        for number, call in enumerate(message.get("tool_calls", ())):
            where = f"{place}.tool_calls[{number}]"
            if message["role"] != "assistant":
                raise RequestError(f"{place}: only the assistant calls tools", f"{place}.tool_calls")
            if call["id"] in waiting:
                raise RequestError(f"{where}.id: the id {call['id']!r} is there twice", f"{where}.id")
            waiting.append(call["id"])
            call["function"]["arguments"] = _arguments(call["function"]["arguments"], f"{where}.function.arguments")
    if waiting:
        raise _unanswered(len(messages), waiting)


def _unanswered(index: int, waiting: list[str]) -> RequestError:
    return RequestError(
        "an assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'; these did "
        f"not have response messages: {', '.join(waiting)}", f"messages[{index - 1}]",
    )  # fmt: skip


def _arguments(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError(f"{place}: must be the text of a JSON object", place)
    return value
