"""The routes of Anthropic's Messages API, over chat completions.

Source: https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from .messages_request import CountTokensRequest, MessagesRequest
from .messages_wire import MessagesWire
from .wire import ChatDoor


def add_messages_routes(app: FastAPI, door: ChatDoor, responses: dict[int | str, Any]) -> None:
    """Add the routes.

    Args:
        responses: the errors that routes may answer with, for the API's description.
    """

    @app.post("/v1/messages", responses=responses)
    async def create(body: MessagesRequest, http: Request) -> Response:
        return await door.deliver(http, await door.submit(http, body.chat(), "msg_"), MessagesWire())

    @app.post("/v1/messages/count_tokens", responses=responses)
    async def count_tokens(body: CountTokensRequest) -> Response:
        return JSONResponse({"input_tokens": len(await door.tokens(body.chat()))})
