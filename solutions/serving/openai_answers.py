"""The server's answers as data: whole answers, chunks of streams, models, tokens.

Source: https://platform.openai.com/docs/api-reference (completions, chat, models); the fields beyond it are vLLM's.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, Field


class VersionResponse(BaseModel):
    version: str


class LoadResponse(BaseModel):
    server_load: int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: str = "local"
    root: str
    """The model that is served under this name."""
    parent: str | None = None
    """Of an adapter: the model that it is for."""
    max_model_len: int
    """Longest sequence, prompt and output together, in tokens."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class RenderedPrompt(BaseModel):
    """vLLM's: what a chat becomes for the model."""

    model: str
    token_ids: list[int]
    prompt_text: str


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int
    """Tokens of thoughts, without their marks."""


def _if_set() -> Any:
    """A field that an answer has only if there is something to say."""
    return Field(default=None, exclude_if=lambda value: value is None)


class Usage(BaseModel):
    prompt_tokens: int = 0
    """Each prompt counts once, whatever `n`."""
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails = Field(default_factory=PromptTokensDetails)
    completion_tokens_details: CompletionTokensDetails | None = _if_set()


class Answer(BaseModel):
    """Base of answers and of stream chunks."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str


FinishReason = Literal["stop", "length", "abort", "tool_calls", "function_call"]


class CompletionLogprobs(BaseModel):
    """Lists of equal length, an entry a token; null for a prompt's first, which nothing predicts."""

    tokens: list[str] = []
    """What each adds to the choice's text: joined they are the text."""
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    """As many of the most likely tokens as were asked for, and the sampled one if it is not among them."""
    text_offset: list[int] = []
    """Where each token begins in the choice's text, in characters."""


TokenIds = list[int] | None


class PromptLogprob(BaseModel):
    """vLLM's: a token at one place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None] | None
"""At each token of the prompt, by id, itself and the likeliest; null for the first, which nothing predicts."""


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """vLLM's: the stop string or stop token that ended the text; null for end of sequence."""
    token_ids: TokenIds = _if_set()
    """vLLM's, of the generated text."""
    prompt_token_ids: TokenIds = _if_set()
    prompt_logprobs: PromptLogprobs = _if_set()


class CompletionResponse(Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = _if_set()


class TopLogprob(BaseModel):
    token: str
    """What it adds to the text, or would have added: the tokens, joined, are the text. One that completes a character carries
    all of it."""
    logprob: float
    bytes: list[int]
    """The token's bytes: a token may hold a part of a character. Joined they are those of the text."""


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]
    """As many of the most likely tokens as were asked for."""


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str
    """JSON; where the answer was cut, its beginning."""


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    """Null if it only thinks or calls tools."""
    refusal: None = None
    reasoning: str | None = _if_set()
    """What the model has thought before it said that; vLLM's newer name of the next one."""
    reasoning_content: str | None = _if_set()
    tool_calls: list[ToolCall] | None = _if_set()
    function_call: CalledFunction | None = _if_set()


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: TokenIds = _if_set()


class ChatCompletionResponse(Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: TokenIds = _if_set()
    prompt_logprobs: PromptLogprobs = _if_set()


class FunctionDelta(BaseModel):
    name: str | None = _if_set()
    arguments: str


class ToolCallDelta(BaseModel):
    """What is new in a call; id, type and name come once, at its beginning."""

    index: int
    id: str | None = _if_set()
    type: Literal["function"] | None = _if_set()
    function: FunctionDelta


class Delta(BaseModel):
    role: Literal["assistant"] | None = _if_set()
    content: str | None = _if_set()
    reasoning: str | None = _if_set()
    reasoning_content: str | None = _if_set()
    tool_calls: list[ToolCallDelta] | None = _if_set()
    function_call: FunctionDelta | None = _if_set()


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: TokenIds = _if_set()


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = _if_set()
    prompt_token_ids: TokenIds = _if_set()
