"""How an answer goes to its client, in one API's format or another's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from ..core.output import RequestOutput
from .openai_protocol import ChatCompletionRequest
from .output_stream import OutputStream
from .responses import Reply, server_sent_events

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For the API's description: with ``stream: true`` the answer is server-sent events."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """What the engine computes for one HTTP request, and the reply that is made of it."""

    reply: Reply
    stream: OutputStream


class Wire:
    """The format of completions and chats. Other APIs have wires of their own, which translate it."""

    def whole(self, reply: Reply, outputs: list[RequestOutput]) -> str:
        """The whole answer, as JSON."""
        return reply.whole(outputs).model_dump_json()

    def events(self, reply: Reply, stream: OutputStream) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        return server_sent_events(reply, stream)


@dataclass(frozen=True, slots=True)
class ChatDoor:
    """How another API asks for a chat completion.

    Attributes:
        submit: takes the HTTP request, the chat, and how the answer's id begins; None: the client has left.
        deliver: answers what was submitted, over a wire.
        tokens: the prompt that a chat becomes.
        sampling: what holds where a chat leaves it open, fields of `SamplingParams`.
    """

    submit: Callable[[Request, ChatCompletionRequest, str], Awaitable[Submitted | None]]
    deliver: Callable[[Request, Submitted | None, Wire], Awaitable[Response]]
    tokens: Callable[[ChatCompletionRequest], Awaitable[list[int]]]
    sampling: Mapping[str, Any]
