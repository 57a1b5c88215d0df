"""The OpenAI API's requests as data, checked field by field. What fields share is in `openai_fields.py`; answers are in
`openai_answers.py`, errors in `errors.py`.

Source: https://platform.openai.com/docs/api-reference (completions, chat, models); the fields beyond it are vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, Strict, ValidationInfo, field_validator

from ..batching.sampling_params import MAX_LOGPROBS, RequestOutputKind, SamplingParams, StructuredOutput
from ..core.beams.beam_search import MAX_LENGTH_PENALTY
from .answer_forms import FormFields
from .chat_messages import ChatMessage, conversation_of
from .drawing_fields import DrawingFields
from .errors import RequestError
from .openai_fields import Bool, Int, Number, Request
from .reasoning.thinking import Thinking
from .template_fields import TemplateFields
from .tool_calls.calling import ToolUse
from .tool_calls.tool_format import as_output
from .tool_protocol import ToolFields, schema_error

MAX_CHOICES = 128
"""Most choices (`n`) that a request may ask for: OpenAI's limit."""


class StreamOptions(Request):
    include_usage: Bool | None = None
    """Ends the stream with a chunk that has the usage and no choices."""
    continuous_usage_stats: Bool | None = None
    """vLLM's: with `include_usage`, every chunk has the usage of its choice so far."""


class GenerationRequest(FormFields, DrawingFields):
    """What completions and chat completions share. None is "not set" throughout."""

    prompt_field: ClassVar[str]
    """The field that holds the prompt."""

    model: str
    max_tokens: Int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: Annotated[int, Strict(), Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted: it names the caller's end user and does not change the answer."""
    use_beam_search: Bool | None = None
    """The `n` answers are those that a search with as many beams finds, the best first; see `beam_search.py`."""
    length_penalty: Number | None = None
    """Of beam search: above 0 longer answers are preferred, below 0 shorter ones."""
    prompt_logprobs: Int | None = None
    """Alternatives returned at each token of the prompt."""
    return_token_ids: Bool | None = None
    """Puts the token ids of prompt and answer beside their texts."""
    return_tokens_as_token_ids: Bool | None = None
    """In log-probabilities, a token is its id, ``token_id:7``, instead of its text."""
    truncate_prompt_tokens: Int | None = None
    """So many tokens of a longer prompt are used, by default its last; -1: as many as leave room for the answer."""
    truncation_side: Literal["left", "right"] | None = None
    """Where a prompt is cut off."""

    @field_validator("prompt_logprobs")
    @classmethod
    def _check_prompt_logprobs(cls, number: int | None, info: ValidationInfo) -> int | None:
        if number is not None and info.data.get("stream"):
            raise ValueError("cannot be streamed")
        return number

    @field_validator("length_penalty")
    @classmethod
    def _check_length_penalty(cls, penalty: float | None, info: ValidationInfo) -> float | None:
        if penalty not in (None, 1) and not info.data.get("use_beam_search"):
            raise ValueError("needs use_beam_search: true")
        if penalty is not None and not abs(penalty) <= MAX_LENGTH_PENALTY:
            raise ValueError(f"must be from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}")
        return penalty

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("only allowed with stream: true")
        return options

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has a usage."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the answer's tokens, and the limit."""
        return "max_tokens", self.max_tokens

    def sampling_fields(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that this request sets, by the same names, token ids as numbers; among them
        `structured_output`, if there is a `form`, and always `output_kind`: DELTA for a stream, else FINAL_ONLY."""
        # Hint: The names are the same on both sides; only what differs needs a line of its own: texts for token ids,
        # two names for one limit, two fields for one number.
        raise NotImplementedError(
            "Stage 5 · Task 5.1: GenerationRequest.sampling_fields, see stages/stage5_production/GUIDE.md#task-5-1"
        )

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The engine's parameters.

        Args:
            defaults: the model's own, for what the request leaves open.

        Raises:
            RequestError: a value is out of range; `param` is the field.
        """
        fields = self.sampling_fields()
        fields |= {name: value for name, value in defaults.items() if fields.get(name) is None}
        try:
            return SamplingParams(**fields)
        except ValueError as error:
            raise self.refusal(error) from error

    def refusal(self, error: ValueError) -> RequestError:
        """Translate an error of the engine for the client. The engine's messages begin with its own name of the field at fault;
        a message that names no field is about the prompt."""
        fields = {"max_tokens": self.token_limit[0]}
        if getattr(self, "best_of", None) is not None:
            fields["n"] = "best_of"
        if (form := self.form) is not None:
            fields["structured_output"] = form[0]
        message = str(error)
        name = re.split(r"\W", message, maxsplit=1)[0]
        for ours, theirs in fields.items():
            message = re.sub(rf"\b{ours}\b", theirs, message)
        field = fields.get(name, name)
        known = field.split(".")[0] in type(self).model_fields or field == self.token_limit[0]
        return RequestError(message, field if known else self.prompt_field)


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
    """How many are sampled; the `n` with the highest log-probability per token are returned."""
    echo: Bool | None = None
    """Puts the prompt before the generated text, and its log-probabilities before the others. With `max_tokens` 0 it is all."""
    add_special_tokens: Bool | None = None

    @field_validator("echo")
    @classmethod
    def _check_echo(cls, echo: bool | None, info: ValidationInfo) -> bool | None:
        """What is echoed is the whole prompt, with `logprobs` of its own."""
        for name in ("truncate_prompt_tokens", "prompt_logprobs"):
            if echo and info.data.get(name) is not None:
                raise ValueError(f"cannot be combined with {name}")
        return echo

    @property
    def is_echo_alone(self) -> bool:
        """Whether nothing but the prompt and its log-probabilities is asked for."""
        return bool(self.echo) and self.max_tokens == 0

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n") or 1
        if best_of is None or best_of == n:  # all of them, so there is nothing to choose
            return None
        if best_of < n:
            raise ValueError("must be at least n")
        if info.data.get("stream"):
            raise ValueError("cannot be streamed: the best answer is known only at the end")
        return best_of

    def sampling_fields(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that this request sets. `best_of` asks for more sequences, with log-probabilities."""
        values = super().sampling_fields()
        if self.echo and self.logprobs is not None:
            values["prompt_logprobs"] = self.logprobs
        if self.is_echo_alone:
            values["max_tokens"] = 1  # which is thrown away
        return values if self.best_of is None else {"logprobs": 0, **values, "n": self.best_of}


class ChatCompletionRequest(GenerationRequest, ToolFields, TemplateFields):
    """Body of ``POST /v1/chat/completions``."""

    prompt_field = "messages"
    insists: ClassVar[bool] = True
    """A budget of thoughts is refused where the server cannot tell what a thought is."""
    _use: ToolUse | None = None
    _thinking: Thinking | None = None

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    """The newer name of `max_tokens`. Without either, the model's default or its context is the limit."""
    logprobs: Bool | None = None
    top_logprobs: Annotated[int, Strict(), Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives returned at each token."""
    echo: Bool | None = None
    """Puts the last message before the answer, if it is the assistant's."""
    include_reasoning: Bool | None = None
    """Whether the answer tells what the model has thought; true by default."""
    thinking_token_budget: Annotated[int, Strict(), Field(ge=-1)] | None = None
    """Most tokens of thoughts, behind which the model has to speak; -1: any number."""

    def conversation(self) -> list[dict[str, Any]]:
        """The messages for a chat template; calls in them have their results.

        Raises:
            RequestError: one is missing.
        """
        return conversation_of(self.messages)

    @field_validator("max_completion_tokens")
    @classmethod
    def _check_max_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError("contradicts max_tokens; set one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("only allowed with logprobs: true")
        return value

    def answer_with(self, use: ToolUse | None, thinking: Thinking | None) -> None:
        """From here on the answer is held to the form of calls and of thoughts. Stop strings end a text, never a call."""
        self._use, self._thinking = use, thinking
        if (use is not None and use.format.has_special_tokens) or (thinking is not None and thinking.format.has_special_tokens):
            self.skip_special_tokens = False
        if use is not None and use.required:
            self.stop = None

    @property
    def form(self) -> tuple[str, StructuredOutput] | None:
        """What is asked for, behind the thoughts; calls come before all other forms."""
        use, thinking, asked = self._use, self._thinking, super().form
        name = "tools" if use is not None else "thinking_token_budget" if asked is None else asked[0]
        if thinking is not None:
            held = thinking.form(None if asked is None else asked[1], use)
            return None if held is None else (name, held)
        return asked if use is None else (name, as_output(use.form()))

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        params = super().to_sampling_params(defaults)
        if self._use is not None:
            before = () if self._thinking is None else (self._thinking.before(),)
            params.stop_until = self._use.beginning(*before)
        return params

    def refusal(self, error: ValueError) -> RequestError:
        found = None if self._use is None else schema_error(self._use, error)
        return found or super().refusal(error)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens

    def sampling_fields(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that this request sets. Without a limit, `max_tokens` is None: up to the model's
        context. `logprobs` is the number of alternatives; 0 asks for the sampled token's alone."""
        raise NotImplementedError(
            "Stage 5 · Task 5.1: ChatCompletionRequest.sampling_fields, see stages/stage5_production/GUIDE.md#task-5-1"
        )
