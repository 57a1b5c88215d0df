"""The routes of Anthropic's Messages API, over chat completions.

Source: https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from .messages_events import MessageBuilder
from .messages_request import CountTokensRequest, MessagesRequest
from .translated_wire import TranslatedWire
from .wire import STREAMED, ChatDoor, Wire


def add_messages_routes(app: FastAPI, door: ChatDoor, responses: dict[int | str, Any]) -> None:
    """Add the routes.

    Args:
        responses: the errors that routes may answer with, for the API's description.
    """

    @app.post("/v1/messages", responses=responses | STREAMED)
    async def create(body: MessagesRequest, http: Request) -> Response:
        submitted = await door.submit(http, body.chat(), "msg_")
        if submitted is None:
            return await door.deliver(http, None, Wire())
        head = submitted.reply.head
        return await door.deliver(http, submitted, TranslatedWire(MessageBuilder(head["id"], head["model"])))

    @app.post("/v1/messages/count_tokens", responses=responses)
    async def count_tokens(body: CountTokensRequest) -> Response:
        return JSONResponse({"input_tokens": len(await door.tokens(body.chat()))})
