"""The OpenAI API as data: requests, checked field by field, and the error body. Answers are in `openai_answers.py`.

A field that this server cannot honour is refused by name, never ignored. Only a value that means "not set" passes:
``null``, or the default that OpenAI documents (see `UNSUPPORTED`).

Source: https://platform.openai.com/docs/api-reference (completions, chat, models); the fields beyond it are vLLM's.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..batching.sequence import MAX_LOGPROBS, RequestOutputKind, SamplingParams, StructuredOutput

MAX_CHOICES = 128
"""Most choices (`n`) a request may ask for, the OpenAI limit."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "include_obfuscation": (None, False),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "name": (None,),
    "annotations": (None, []),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None,),
    "refusal": (None,),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_call_id": (None,),
    "tool_calls": (None, []),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields of the OpenAI API that are refused, each with the values that mean "not set" and therefore pass."""

Int = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]


def _text_or_list(value: Any) -> Any:
    """One text is a list of one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise ValueError("must be a string or a list")


Strings = Annotated[list[str], BeforeValidator(_text_or_list, json_schema_input_type=str | list[str])]


class RequestError(Exception):
    """A request that is refused: an HTTP status, one clear line, and the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


# ---------------------------------------------------------------------------------------------------------- errors


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: int
    """The HTTP status."""


class ErrorBody(BaseModel):
    error: ErrorDetail


MAX_MESSAGE = 500
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(message: str, status: int, param: str | None = None) -> ErrorBody:
    """The body of every answer that is not a success."""
    if len(message) > MAX_MESSAGE:  # it may quote what the client sent
        message = message[:MAX_MESSAGE] + "…"
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=status))


def describe_validation_error(error: dict[str, Any]) -> tuple[str, str | None]:
    """The first of pydantic's errors as one line and the path of the field, such as ``messages[1].name``."""
    kind, loc = error["type"], [part for part in error["loc"] if part != "body"]
    if kind == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at character {loc[0]}", None
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    if not path:
        if kind == "value_error":
            return error["msg"].removeprefix("Value error, "), None
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    if kind == "extra_forbidden":
        known = loc[-1] in UNSUPPORTED
        return f"{path} is not supported by this server" if known else f"{path} is not a field of this request", path
    if kind == "missing":
        return f"{path} is required", path
    return f"{path}: {error['msg'].removeprefix('Value error, ')}", path


# --------------------------------------------------------------------------------------------------------- requests


class Request(BaseModel):
    """Base of all requests: unknown fields are errors, unsupported ones pass only where they mean "not set"."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        supported = cls.model_fields
        return {
            name: value
            for name, value in data.items()
            if name in supported or name not in UNSUPPORTED or value not in UNSUPPORTED[name]
        }


class StreamOptions(Request):
    include_usage: Bool | None = None
    """Ends the stream with a chunk that has the usage and no choices."""


class JsonSchema(Request):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Bool | None = None
    """Accepted: an answer follows the schema always."""


class ResponseFormat(Request):
    """OpenAI's way to ask for a form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema comes with the type json_schema, and only with it")
        return self


FORMS = ("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""Fields that ask for a form of the answer, at most one of which a request may have."""


class GenerationRequest(Request):
    """What completions and chat completions share. None is "not set" throughout."""

    prompt_field: ClassVar[str]
    """The field that holds the prompt."""

    model: str
    max_tokens: Int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Int | None = None
    min_p: Number | None = None
    n: Annotated[int, Strict(), Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Strings | None = None
    seed: Annotated[int, Strict(), Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    """Token id, as a string, → bias."""
    min_tokens: Int | None = None
    ignore_eos: Bool | None = None
    stop_token_ids: list[Int] | None = None
    skip_special_tokens: Bool | None = None
    include_stop_str_in_output: Bool | None = None
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted: it identifies the caller's end user and by definition changes nothing in the answer."""
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    """Prompts share cached prefixes only with prompts of the same salt."""
    priority: Int | None = None
    """Lower goes first, where the engine schedules by priority."""
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    """vLLM's, as the three below: a JSON schema."""
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    """In EBNF; the first rule is ``root``."""

    @field_validator("logit_bias")
    @classmethod
    def _check_logit_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not re.fullmatch(r"[0-9]{1,9}", key):
                raise ValueError(f"keys must be token ids, got {key!r}")
        return bias

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("only allowed with stream: true")
        return options

    @property
    def form(self) -> tuple[str, StructuredOutput] | None:
        """The field that asks for a form of the answer, and the form.

        Raises:
            RequestError: there are several, or one cannot be.
        """
        asked = [name for name in FORMS if (value := getattr(self, name)) is not None and getattr(value, "type", "") != "text"]
        if not asked:
            return None
        name = asked[0]
        if len(asked) > 1:
            raise RequestError(f"{asked[1]} cannot be combined with {name}", asked[1])
        value = getattr(self, name)
        if isinstance(value, ResponseFormat):
            schema = value.json_schema and json.dumps(value.json_schema.schema_)
            kind, text = ("json_object", "") if schema is None else ("json", schema)
        else:
            kind, text = name.removeprefix("guided_"), value if isinstance(value, str) else json.dumps(value)
        try:
            return name, StructuredOutput(kind, text)
        except ValueError as error:
            raise RequestError(str(error).replace("structured_output", name), name) from error

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the answer's tokens, and the limit."""
        return "max_tokens", self.max_tokens

    def sampling_fields(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that this request sets, by the same names, token ids as numbers; among them
        `structured_output`, if there is a `form`, and always `output_kind`: DELTA for a stream, else FINAL_ONLY."""
        shared = SamplingParams.__dataclass_fields__.keys() & type(self).model_fields.keys()
        values = {name: value for name in shared if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            values["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        if (form := self.form) is not None:
            values["structured_output"] = form[1]
        values["output_kind"] = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        return values

    def to_sampling_params(self) -> SamplingParams:
        """The engine's parameters.

        Raises:
            RequestError: a value is out of range; `param` is the field.
        """
        try:
            return SamplingParams(**self.sampling_fields())
        except ValueError as error:
            raise self.refusal(error) from error

    def refusal(self, error: ValueError) -> RequestError:
        """What the engine's complaint means to the client. The engine's messages begin with the field at fault, under
        the engine's name for it; a complaint that names no field is about the prompt."""
        fields = {"max_tokens": self.token_limit[0]}
        if getattr(self, "best_of", None) is not None:
            fields["n"] = "best_of"
        if (form := self.form) is not None:
            fields["structured_output"] = form[0]
        message = str(error)
        name = re.match(r"\w*", message)[0]
        for ours, theirs in fields.items():
            message = re.sub(rf"\b{ours}\b", theirs, message)
        field = fields.get(name, name)
        return RequestError(message, field if field in type(self).model_fields else self.prompt_field)


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """The four forms of `prompt` as a list of prompts, each a text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in value):
            return value
    raise ValueError("must be a string, token ids, or a list of either, and not empty")


Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt_field = "prompt"

    prompt: Prompts
    logprobs: Annotated[int, Strict(), Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives returned at each token."""
    best_of: Annotated[int, Strict(), Field(ge=1, le=MAX_CHOICES)] | None = None
    """So many are sampled, and the `n` with the highest log-probability per token returned."""
    echo: Bool | None = None
    """Puts the prompt before the generated text, and its log-probabilities before the others."""

    @field_validator("echo")
    @classmethod
    def _check_echo(cls, echo: bool | None, info: ValidationInfo) -> bool | None:
        if echo and info.data.get("logprobs") is not None and info.data.get("stream"):
            raise ValueError("not supported together with logprobs in a stream")
        return echo

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of is not None and best_of < (info.data.get("n") or 1):
            raise ValueError("must be at least n")
        if best_of is not None and info.data.get("stream"):
            raise ValueError("which is best is known at the end, so it cannot be streamed")
        return best_of

    def sampling_fields(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that this request sets; to find the best, more sequences with log-probabilities."""
        values = super().sampling_fields()
        if self.echo and self.logprobs is not None:
            values["prompt_logprobs"] = self.logprobs
        return values if self.best_of is None else {"logprobs": 0, **values, "n": self.best_of}


class TextPart(Request):
    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    """A text is one part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else _text_or_list(value)


class ChatMessage(Request):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]

    def text(self) -> str:
        """The content; several parts are joined by line breaks."""
        return "\n".join(part.text for part in self.content)


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    prompt_field = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    """The newer name of `max_tokens`; without either, up to the model's context."""
    logprobs: Bool | None = None
    top_logprobs: Annotated[int, Strict(), Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives returned at each token."""

    @field_validator("max_completion_tokens")
    @classmethod
    def _check_max_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError("contradicts max_tokens; set one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("only allowed with logprobs: true")
        return value

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens

    def sampling_fields(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that this request sets; without a limit None, up to the model's context, and as
        log-probabilities a number, 0 for those of the token alone."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return super().sampling_fields() | {"max_tokens": self.token_limit[1], "logprobs": logprobs}


class TokenizeRequest(Request):
    """Body of ``POST /tokenize``, as vLLM has it: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: Bool = True
    """Of a text; a conversation's are in its template."""

    @model_validator(mode="after")
    def _check_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Request):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[Int]
