"""The tokenizer over HTTP, as vLLM offers it: requests, answers, routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, Field, model_validator

from .chat_messages import ChatMessage, conversation_of
from .chat_reading import ChatReader
from .errors import RequestError
from .openai_fields import Bool, Int, Request
from .template_fields import TemplateFields
from .tool_protocol import ToolFields

if TYPE_CHECKING:
    from ..core.engine import LLMEngine


class TokenizeRequest(ToolFields, TemplateFields):
    """Body of ``POST /tokenize``, as vLLM has it: a text, or a conversation with all that makes the prompt of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: Bool | None = None
    """For a text; true by default. A conversation's special tokens are in its template."""
    return_token_strs: Bool | None = None
    """Also what the vocabulary calls each token."""

    @model_validator(mode="after")
    def _check_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Request):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[Int]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(default=None, exclude_if=lambda strs: strs is None)


class DetokenizeResponse(BaseModel):
    prompt: str


def add_tokenizer_routes(
    app: FastAPI, engine: LLMEngine, check_model: Callable[[str], Any], chats: ChatReader, *, info: bool,
    responses: dict[int | str, Any],
) -> None:  # fmt: skip
    """Add the routes, ``/tokenizer_info`` among them if `info`. `check_model` raises what a model's name deserves, `chats`
    knows what a chat's prompt is, and `responses` describe what errors look like."""

    @app.post("/tokenize", responses=responses)
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """The token ids of a text, or of a conversation in the model's template."""
        if body.model is not None:
            check_model(body.model)
        tokens = await asyncio.to_thread(tokens_of, chats, body)
        named = need_tokenizer(engine.tokenizer, "prompt").convert_ids_to_tokens
        strs = named(tokens) if body.return_token_strs else None
        return TokenizeResponse(
            count=len(tokens), max_model_len=engine.limits.max_model_len, tokens=tokens, token_strs=strs
        )  # fmt: skip

    @app.post("/detokenize", responses=responses)
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of token ids."""
        if body.model is not None:
            check_model(body.model)
        if any(not 0 <= token < engine.model_config.vocab_size for token in body.tokens):
            raise RequestError(f"tokens must be from 0 to {engine.model_config.vocab_size - 1}", "tokens")
        decode = need_tokenizer(engine.tokenizer, "tokens").decode
        return DetokenizeResponse(prompt=await asyncio.to_thread(decode, body.tokens))

    if info:

        @app.get("/tokenizer_info", responses=responses)
        async def tokenizer_info() -> dict[str, Any]:
            """What the tokenizer was made with, and the chat template."""
            return info_of(need_tokenizer(engine.tokenizer, "tokens"))


def info_of(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's settings as JSON, without the paths of its files."""
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if not name.endswith(("_file", "_path"))}
    more = {"tokenizer_class": type(tokenizer).__name__, "chat_template": tokenizer.chat_template}
    found: dict[str, Any] = json.loads(json.dumps(settings | more, default=str))
    return found


def need_tokenizer(tokenizer: Any, field: str) -> Any:
    """The tokenizer.

    Raises:
        RequestError: the model has none.
    """
    if tokenizer is None:
        raise RequestError("this model has no tokenizer; send token ids", field)
    return tokenizer


def tokens_of(chats: ChatReader, body: TokenizeRequest) -> list[int]:
    """What ``/tokenize`` is asked for.

    Raises:
        RequestError: the model has no tokenizer or no template, or messages or tools are not valid.
    """
    if body.messages is not None:
        use = body.tool_use(chats.calling, None)
        return chats.tokens(conversation_of(body.messages), [] if use is None else use.functions, body)
    ids: list[int] = need_tokenizer(chats.tokenizer, "prompt").encode(
        body.prompt, add_special_tokens=body.add_special_tokens is not False
    )
    return ids
