"""Sends the requests of a batch through the server's own application, without a network: the one way through a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

import httpx
from starlette.types import ASGIApp

from .batch_files import BatchRequest


class BatchStoppedError(RuntimeError):
    """The engine has failed; what is answered stays in the file."""


async def answer_all(
    app: ASGIApp, requests: Iterable[BatchRequest], at_once: int, put: Callable[[BatchRequest, dict[str, Any]], None]
) -> None:
    """Send requests, and hand over the line of each answer as soon as it is there. Where a queue is full, a request is sent
    again, when the answer says. Being cancelled aborts what is on its way.

    Args:
        at_once: how many requests may be on their way together.
        put: takes a request and its line; what it raises ends the run.

    Raises:
        BatchStoppedError: the engine has failed.
    """
    waiting = iter(requests)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:

        async def work() -> None:
            for request in waiting:
                response = await client.post(request.url, json=request.body)
                while response.status_code == 429:
                    await asyncio.sleep(float(response.headers.get("retry-after", 1)))
                    response = await client.post(request.url, json=request.body)
                if response.status_code == 503:  # any other failure is this request's own
                    raise BatchStoppedError(response.json()["error"]["message"])
                body, request_id = response.json(), response.headers["x-request-id"]
                answer = {"status_code": response.status_code, "request_id": request_id, "body": body}
                put(request, {"id": f"batch_req_{uuid4().hex}", "response": answer, "error": None})

        workers = [asyncio.create_task(work()) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
