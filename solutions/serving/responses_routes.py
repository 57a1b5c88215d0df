"""The routes of OpenAI's Responses API, over chat completions.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from .errors import RequestError
from .responses_events import ResponseBuilder
from .responses_items import items_of, message_of
from .responses_request import ResponsesRequest
from .responses_store import ResponseStore, StoredResponse
from .translated_wire import TranslatedWire
from .wire import STREAMED, ChatDoor, Submitted, Wire


def add_responses_routes(app: FastAPI, door: ChatDoor, responses: dict[int | str, Any]) -> None:
    """Add the routes. Responses are kept in this process, see `ResponseStore`.

    Args:
        responses: the errors that routes may answer with, for the API's description.
    """
    store, running = ResponseStore(), set[asyncio.Task[None]]()
    add_routes_of_stored(app, store, responses)

    @app.post("/v1/responses", responses=responses | STREAMED)
    async def create(body: ResponsesRequest, http: Request) -> Response:
        earlier = body.previous_response_id
        before = None if earlier is None else find(store, http, earlier, "previous_response_id")
        if before is not None and before.cancel is not None:
            raise RequestError(f"Response with id '{earlier}' is still in progress", "previous_response_id")
        messages = body.messages([] if before is None else before.messages)
        submitted = await door.submit(http, body.chat(messages), "resp_")
        if submitted is None:
            return await door.deliver(http, None, Wire())
        head = submitted.reply.head
        builder = ResponseBuilder(head["id"], head["created"], body.model, body.echo(door.sampling))
        entry, tenant = StoredResponse(builder.answer, messages, items_of(body.input)), tenant_of(http)

        def end() -> None:
            entry.messages = messages + message_of(builder.answer["output"])
            if body.store is not False:
                store.finish(tenant, entry)

        wire = TranslatedWire(builder, end)
        if not body.background:
            return await door.deliver(http, submitted, wire)
        task = asyncio.create_task(compute(submitted, wire))
        entry.cancel = task.cancel
        store.add(tenant, entry)
        running.add(task)
        task.add_done_callback(running.discard)
        return JSONResponse(builder.answer)


def add_routes_of_stored(app: FastAPI, store: ResponseStore, responses: dict[int | str, Any]) -> None:
    """Add the routes by which clients come back to a response."""

    @app.get("/v1/responses/{response_id}", responses=responses)
    async def retrieve(response_id: str, http: Request, stream: bool = False) -> Response:
        if stream:
            raise RequestError("stream: a response that was stored is not streamed again; leave it out", "stream")
        return JSONResponse(find(store, http, response_id).response)

    @app.get("/v1/responses/{response_id}/input_items", responses=responses)
    async def input_items(response_id: str, http: Request) -> Response:
        items = find(store, http, response_id).items
        first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
        return JSONResponse({"object": "list", "data": items, "has_more": False, "first_id": first, "last_id": last})

    @app.delete("/v1/responses/{response_id}", responses=responses)
    async def delete(response_id: str, http: Request) -> Response:
        find(store, http, response_id)
        store.delete(tenant_of(http), response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @app.post("/v1/responses/{response_id}/cancel", responses=responses)
    async def cancel(response_id: str, http: Request) -> Response:
        entry = find(store, http, response_id)
        if not entry.response["background"]:
            raise RequestError("Only responses with background: true can be cancelled", "response_id")
        if entry.cancel is not None:
            entry.cancel()
            entry.response["status"] = "cancelled"
            store.finish(tenant_of(http), entry)
        return JSONResponse(entry.response)


def find(store: ResponseStore, http: Request, response_id: str, field: str | None = None) -> StoredResponse:
    """A stored response of the client's.

    Raises:
        RequestError: there is none; `field` is the field that named it, None: the path did.
    """
    entry = store.get(tenant_of(http), response_id)
    if entry is not None:
        return entry
    if field is None:
        raise RequestError(f"Response with id '{response_id}' not found", None, 404, "response_not_found")
    text = f"Previous response with id '{response_id}' not found"
    raise RequestError(text, field, 400, "previous_response_not_found")


def tenant_of(http: Request) -> str | None:
    """Who asks, where keys tell clients apart; see `KeyGuard`."""
    tenant: str | None = getattr(http.state, "tenant", None)
    return tenant


async def compute(submitted: Submitted, wire: TranslatedWire) -> None:
    """Compute a response for which nobody waits. Being cancelled frees what it holds."""
    async with submitted.stream as stream:
        async for _ in wire.events(submitted.reply, stream):
            pass
