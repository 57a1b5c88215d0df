"""The routes of OpenAI's Files and Batches APIs: upload requests, have them answered behind all others, fetch the answers.

Source: https://platform.openai.com/docs/api-reference (files, batch)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from itertools import islice
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.datastructures import FormData, UploadFile

from .batches.batch_files import URLS
from .batches.batch_runner import BatchRunner
from .batches.batch_store import ENDED, BatchStore, Records, Room
from .errors import RequestError
from .openai_fields import Request as Body

FILES = "/v1/files"
BATCHES = "/v1/batches"
MAX_FIELDS = 32
"""Most fields of a form."""
MAX_METADATA = 16
"""Most pairs of a batch's metadata, of at most 64 and 512 characters."""


class BatchBody(Body):
    """Body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


def add_batch_routes(
    app: FastAPI, store: BatchStore | None, at_once: int, responses: dict[int | str, Any]
) -> Callable[[], AbstractAsyncContextManager[None]]:
    """Add the routes; without a store, they say how to get one.

    Args:
        at_once: how many requests of batches may be on their way together.

    Returns:
        A context during which batches run.
    """
    if store is None:
        for path in (FILES, BATCHES):
            app.add_api_route(path, refuse, methods=["GET", "POST"], responses=responses, include_in_schema=False)
        return nullcontext
    runners: list[BatchRunner] = []
    add_file_routes(app, store, responses)

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        runners.append(BatchRunner(app, store, at_once))
        task = asyncio.create_task(runners[0].run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        store.close()

    def find(http: Request, batch_id: str) -> dict[str, Any]:
        record = runners[0].get(tenant_of(http), batch_id)
        if record is None:
            raise RequestError(f"No batch found with id '{batch_id}'.", None, 404)
        return record

    @app.post(BATCHES, responses=responses)
    async def create_batch(body: BatchBody, http: Request) -> Response:
        if body.endpoint not in URLS:
            raise RequestError(f"endpoint must be one of {', '.join(URLS)}; got {body.endpoint!r}", "endpoint")
        pairs = (body.metadata or {}).items()
        if len(pairs) > MAX_METADATA or any(len(key) > 64 or len(value) > 512 for key, value in pairs):
            raise RequestError(f"metadata may have {MAX_METADATA} pairs, keys of 64 and values of 512 characters", "metadata")
        found = store.room(tenant_of(http)).files.get(body.input_file_id)
        if found is None or found["purpose"] != "batch":
            raise RequestError(f"No file for batches found with id '{body.input_file_id}'.", "input_file_id")
        try:
            return JSONResponse(runners[0].add(tenant_of(http), body.model_dump()))
        except ValueError as error:
            raise RequestError(str(error), None, 429) from None

    @app.get(BATCHES, responses=responses)
    async def list_batches(http: Request, limit: int = 20, after: str | None = None) -> Response:
        batches = store.room(tenant_of(http)).batches
        return JSONResponse(page(batches, limit, after, lambda batch_id: find(http, batch_id)))

    @app.get(BATCHES + "/{batch_id}", responses=responses)
    async def retrieve_batch(batch_id: str, http: Request) -> Response:
        return JSONResponse(find(http, batch_id))

    @app.post(BATCHES + "/{batch_id}/cancel", responses=responses)
    async def cancel_batch(batch_id: str, http: Request) -> Response:
        record = find(http, batch_id)
        if record["status"] in ENDED:
            raise RequestError(f"Cannot cancel a batch with status '{record['status']}'.", None, 409)
        runners[0].cancel(tenant_of(http), record)
        return JSONResponse(record)

    return running


def add_file_routes(app: FastAPI, store: BatchStore, responses: dict[int | str, Any]) -> None:
    """Add the routes of files. Their work is done in threads, as disks are slow."""

    def find(http: Request, file_id: str) -> tuple[Room, dict[str, Any]]:
        room = store.room(tenant_of(http))
        record = room.files.get(file_id)
        if record is None:
            raise RequestError(f"No such File object: {file_id}", "id", 404)
        return room, record

    @app.post(FILES, responses=responses)
    async def create_file(http: Request) -> Response:
        async with http.form(max_files=1, max_fields=MAX_FIELDS) as form:
            file = uploaded(form)

            def keep() -> dict[str, Any]:
                if (file.size or 0) > store.max_file_bytes:
                    raise RequestError(f"the file has more than {store.max_file_bytes} bytes", "file", 413)
                try:
                    return store.room(tenant_of(http)).add_file(file.filename or "", file.file.read())
                except ValueError as error:
                    raise RequestError(str(error), "file") from None

            return JSONResponse(await asyncio.to_thread(keep))

    @app.get(FILES, responses=responses)
    def list_files(http: Request, purpose: str | None = None, limit: int = 10_000, after: str | None = None) -> Response:
        files = store.room(tenant_of(http)).files
        return JSONResponse(page(files, limit, after, files.get, purpose))

    @app.get(FILES + "/{file_id}", responses=responses)
    def retrieve_file(file_id: str, http: Request) -> Response:
        return JSONResponse(find(http, file_id)[1])

    @app.get(FILES + "/{file_id}/content", responses=responses)
    def file_content(file_id: str, http: Request) -> Response:
        room, _ = find(http, file_id)
        return FileResponse(room.content(file_id), media_type="application/octet-stream")

    @app.delete(FILES + "/{file_id}", responses=responses)
    def delete_file(file_id: str, http: Request) -> Response:
        room, _ = find(http, file_id)
        for batch_id in room.batches.ids():
            batch = room.batches.get(batch_id)
            if batch is not None and batch["input_file_id"] == file_id and batch["status"] not in ENDED:
                raise RequestError(f"The file is read by the batch {batch_id}; cancel that first.", None, 409)
        room.delete_file(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def uploaded(form: FormData) -> UploadFile:
    """The file of a form.

    Raises:
        RequestError: it has none, or asks for what is not offered.
    """
    if form.get("purpose") != "batch":
        raise RequestError("purpose must be batch: files are kept for batches alone", "purpose")
    file = form.get("file")
    if not isinstance(file, UploadFile) or not file.filename:
        raise RequestError("file is missing: the form needs one, with a name", "file")
    if unknown := sorted(form.keys() - {"purpose", "file"}):
        raise RequestError(f"{unknown[0]} is not supported; files stay until they are deleted", unknown[0])
    if len(form.multi_items()) > 2:
        raise RequestError("the form has two fields of one name", "purpose")
    return file


def page(
    records: Records, limit: int, after: str | None, get: Callable[[str], dict[str, Any] | None], purpose: str | None = None
) -> dict[str, Any]:
    """A part of a list, the newest first.

    Args:
        after: the id behind which it begins. get: a record by its id. purpose: of files; None: any.

    Raises:
        RequestError: the limit is none.
    """
    if limit < 1:
        raise RequestError(f"limit must be at least 1, got {limit}", "limit")
    ids = (each for each in records.ids() if after is None or each < after)
    found = (record for each in ids if (record := get(each)) is not None and purpose in (None, record.get("purpose")))
    data = list(islice(found, limit))
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "has_more": next(found, None) is not None, "first_id": first, "last_id": last}


def tenant_of(http: Request) -> str | None:
    """Who asks, where keys tell clients apart; see `KeyGuard`."""
    tenant: str | None = getattr(http.state, "tenant", None)
    return tenant


async def refuse() -> Response:
    """Say how to get what is asked for.

    Raises:
        RequestError: always.
    """
    raise RequestError("files and batches need a server that was started with --files-dir DIR", None, 404)
