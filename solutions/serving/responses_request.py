"""A request of the Responses API, and the chat completion that answers it.

Source: https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, model_validator

from .answer_forms import StructuredOutputs
from .drawing_fields import DrawingFields
from .errors import RequestError
from .openai_fields import Bool, Int, Number, Request
from .responses_items import Message, messages_of, tool_of
from .translated_chat import TranslatedChat


def _input(value: Any) -> Any:
    """A text or a list. A pydantic union would put the names of its members into the path of an error."""
    if isinstance(value, str | list):
        return value
    raise ValueError("must be a string or a list of items")


class TextFormat(Request):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Bool | None = None


class TextOptions(Request):
    format: TextFormat | None = None


class ResponsesChat(TranslatedChat):
    """The chat completion that answers a response."""

    prompt_field = "input"
    limit_field = "max_output_tokens"
    names: ClassVar[dict[str, str]] = {"reasoning_effort": "reasoning.effort", "response_format": "text.format"}


class ResponsesRequest(DrawingFields):
    """Body of ``POST /v1/responses``. None is "not set" throughout."""

    model: str
    input: Annotated[Any, PlainValidator(_input, json_schema_input_type=str | list[Any])]
    """A text, or items; see `messages_of`."""
    instructions: str | None = None
    """The system's message. It holds for this response alone, not for those that follow it."""
    previous_response_id: str | None = None
    store: Bool | None = None
    """Kept for `previous_response_id` and for being fetched, unless false."""
    background: Bool | None = None
    """Answer at once, and compute the response while the client is gone; it fetches or cancels it by its id."""
    stream: Bool | None = None
    max_output_tokens: Int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_logprobs: Int | None = None
    include: list[str] | None = None
    """``message.output_text.logprobs`` asks for log-probabilities. Other parts of an answer do not exist here."""
    text: TextOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    """vLLM's way to ask for a form of the answer."""
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Bool | None = None
    truncation: Literal["disabled", "auto"] | None = None
    """With "auto", a prompt that is too long loses its beginning."""
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    conversation: None = None
    """OpenAI's store of conversations, which this server does not have; likewise its store of prompts, `prompt`."""
    prompt: None = None
    stream_options: dict[str, Any] | None = None
    """Accepted: what OpenAI has here changes no answer."""

    @model_validator(mode="after")
    def _check_background(self) -> ResponsesRequest:
        if self.background and (self.stream or self.store is False):
            raise ValueError("background needs a response that is stored and not streamed: leave out stream and store")
        return self

    @property
    def logprobs(self) -> bool:
        """Whether the answer carries log-probabilities."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())

    def messages(self, before: list[Message]) -> list[Message]:
        """The conversation, from the messages of the responses before this one, without instructions.

        Raises:
            RequestError: an item is not valid.
        """
        return [*before, *messages_of(self.input)]

    def chat(self, messages: list[Message]) -> ResponsesChat:
        """The chat completion that answers.

        Raises:
            RequestError: a field is not valid.
        """
        system: list[dict[str, Any]] = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        body = {
            "model": self.model, "messages": system + messages, "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "stream": self.stream, "response_format": self._form(),
            "logprobs": self.logprobs or None, "top_logprobs": self.top_logprobs, "user": self.user,
            "reasoning_effort": (self.reasoning or {}).get("effort"), "structured_outputs": self.structured_outputs,
            "truncate_prompt_tokens": -1 if self.truncation == "auto" else None,
        } | {name: getattr(self, name) for name in DrawingFields.model_fields}  # fmt: skip
        if self.tools:
            choice = self.tool_choice
            if isinstance(choice, dict) and choice.get("type") == "function":
                choice = {"type": "function", "function": {"name": choice.get("name")}}
            elif isinstance(choice, dict) and choice.get("type") == "allowed_tools":
                choice = {"type": "allowed_tools", "allowed_tools": choice}
            body["tools"] = [tool_of(index, tool) for index, tool in enumerate(self.tools)]
            body |= {"tool_choice": choice, "parallel_tool_calls": self.parallel_tool_calls}
        return ResponsesChat.read(body)

    def _form(self) -> dict[str, Any] | None:
        form = self.text and self.text.format
        if not form:
            return None
        if form.type != "json_schema":
            return {"type": form.type}
        if form.schema_ is None:
            raise RequestError("text.format.schema is required for the type json_schema", "text.format.schema")
        schema = {"name": form.name or "answer", "schema": form.schema_, "strict": form.strict, "description": form.description}
        return {"type": "json_schema", "json_schema": {key: value for key, value in schema.items() if value is not None}}

    def echo(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a response that say what was asked for; `defaults` hold for what was left open."""
        reasoning = {"effort": None, "summary": None} | (self.reasoning or {})
        said = {"temperature": self.temperature, "top_p": self.top_p}
        drawn = {name: defaults.get(name, 1.0) if value is None else value for name, value in said.items()}
        form = (
            self.text.format.model_dump(by_alias=True, exclude_none=True)
            if self.text and self.text.format
            else {"type": "text"}
        )
        return {
            "background": bool(self.background), "instructions": self.instructions, "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {}, "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id, "reasoning": reasoning, "store": self.store is not False,
            "temperature": drawn["temperature"], "text": {"format": form},
            "tool_choice": self.tool_choice or "auto", "tools": self.tools or [], "top_logprobs": self.top_logprobs or 0,
            "top_p": drawn["top_p"], "truncation": self.truncation or "disabled", "user": self.user,
        }  # fmt: skip
