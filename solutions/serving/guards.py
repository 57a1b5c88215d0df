"""What stands between the network and the app: API keys, sizes of bodies, ids of requests, and errors as OpenAI has them.

The guards are plain ASGI middleware, so that a stream passes through them untouched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..batching.scheduler_config import QueueFullError
from ..core.lora.registry import UnknownAdapterError
from .async_engine import EngineDeadError
from .errors import RequestError, error_body
from .openai_fields import describe_validation_error, validation_code

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ping", "/ready", "/")
"""Paths that need no key: load balancers have none, and a browser must load the page that asks for one."""
OPEN_FOLDER = "/page/"
MESSAGES_PATH = "/v1/messages"
MESSAGES_ERRORS = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}
"""What Anthropic's Messages API calls errors for which OpenAI has other words, by their status."""
RETRY_AFTER_SECONDS = 1
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a client may call its request; anything else is replaced."""
API_KEY_VARIABLE = "BYOV_API_KEY"


class ErrorResponse(JSONResponse):
    """An error in OpenAI's form. Under Anthropic's paths it has what their clients look for besides."""

    def __init__(self, content: dict[str, Any], status: int, headers: Any) -> None:
        super().__init__(content, status, headers=headers)
        self._content, self._given = content, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(MESSAGES_PATH):
            await super().__call__(scope, receive, send)
            return
        error = self._content["error"]
        content = {"type": "error", "error": error | {"type": MESSAGES_ERRORS.get(self.status_code, error["type"])}}
        await JSONResponse(content, self.status_code, headers=self._given)(scope, receive, send)


def error_response(
    message: str, status: int, param: str | None = None, headers: Any = None, code: str | None = None
) -> JSONResponse:
    """An error body."""
    return ErrorResponse(error_body(message, status, param, code).model_dump(), status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every failure with an OpenAI error body that holds no stack trace and no path."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error_response(str(error), error.status, error.param, code=error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        message, param = describe_validation_error(first)
        return error_response(message, 400, param, code=validation_code(first))

    @app.exception_handler(QueueFullError)
    async def queue_full(_: Request, error: QueueFullError) -> Response:
        return error_response(str(error), 429, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})

    @app.exception_handler(UnknownAdapterError)
    async def unknown_adapter(_: Request, error: UnknownAdapterError) -> Response:
        return error_response(str(error), 404, "model", code="model_not_found")

    @app.exception_handler(EngineDeadError)
    async def engine_dead(_: Request, error: EngineDeadError) -> Response:
        return error_response(str(error), 503)

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, RequestError):  # of a body that cannot be read; FastAPI has a text of its own for that
            return await refused(http, error.__cause__)
        message = f"{http.method} {http.url.path}: {error.detail}"
        return error_response(message, error.status_code, headers=error.headers)


def read_api_keys(given: Iterable[str], file: Path | None) -> list[str]:
    """The keys from the command line, a file with one a line (``#`` begins a comment), and the environment.

    Raises:
        ValueError: one is empty or not printable ASCII, or the file holds none. OSError: it cannot be read.
    """
    keys = list(given)
    if file is not None:
        lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
        found = [line for line in lines if line]
        if not found:
            raise ValueError(f"{file} holds no API key; write one a line")
        keys += found
    keys += os.environ.get(API_KEY_VARIABLE, "").split()
    for key in keys:
        if not REQUEST_ID.fullmatch(key):
            raise ValueError("an API key has 1 to 128 printable ASCII characters and no space")
    return list(dict.fromkeys(keys))


class KeyGuard:
    """Everything but `OPEN_PATHS` needs one of the API keys as ``Authorization: Bearer …``, or, as Anthropic's clients send it,
    as ``x-api-key: …``. What this process asks of itself, for a tenant that it has let in before, needs none.

    Each key has a prefix cache of its own: ``scope["state"]["tenant"]`` is a name for the key, which becomes part of the
    cache's salt.
    """

    def __init__(self, app: ASGIApp, api_keys: Iterable[str]) -> None:
        self.app = app
        self.tenants = {key.encode(): hashlib.sha256(key.encode()).hexdigest()[:32] for key in api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.is_open(scope["path"]) and "tenant" not in scope.get("state", ()):
            tenant = self.tenant(scope)
            if tenant is None:
                headers = {"WWW-Authenticate": "Bearer"}
                await error_response("missing or wrong API key", 401, headers=headers)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)

    @staticmethod
    def is_open(path: str) -> bool:
        """Whether it needs no key."""
        return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)

    def tenant(self, scope: Scope) -> str | None:
        """The tenant whose key the request carries. All wrong keys take equally long, so that timing reveals nothing."""
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"Bearer " + headers.get(b"x-api-key", b"")).partition(b" ")
        matches = [name for key, name in self.tenants.items() if secrets.compare_digest(given.strip(), key)]
        return matches[0] if matches and scheme.lower() == b"bearer" else None


class BodyLimit:
    """Refuses a body of more than `max_bytes` with 413, as soon as its size is known; `others`: paths with another limit."""

    def __init__(self, app: ASGIApp, max_bytes: int, others: Mapping[str, int]) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared, most = Headers(scope=scope).get("content-length", ""), self.others.get(scope["path"], self.max_bytes)
        if declared.isdecimal() and int(declared) > most:
            # the client is still sending: the closed connection tells it to stop
            refusal = error_response(f"the body has more than {most} bytes", 413, headers={"Connection": "close"})
            await refusal(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, f"the body has more than {most} bytes")
            return message

        await self.app(scope, counted, send)


class Bugs:
    """Answers an unexpected exception with 500, and writes it to the log.

    The connection stays open. Otherwise uvicorn would close it after the answer, and the client's next request would fail.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            if started:  # an answer that breaks off must not look complete
                raise
            logger.exception("A request failed: %s %s", scope["method"], scope["path"])
            await error_response("internal server error", 500)(scope, receive, send)


class TrailingSlashes:
    """Treats ``/v1/models/`` as ``/v1/models``. A redirect would make some clients drop the body, and fail behind a proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and path.endswith("/") and not path.startswith(OPEN_FOLDER):
            scope["path"] = path.rstrip("/") or "/"
        await self.app(scope, receive, send)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON: time, level, message, and the fields that it carries."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False)


def log_as_json() -> None:
    """Log to standard error as lines of JSON, with a line for each request."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(logging.INFO)


class RequestIds:
    """Gives every answer an ``X-Request-Id``, the client's own if it sent one, and writes a line to the log for each."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
                fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
                logger.info("request", extra={"fields": fields | {"status": message["status"]}})
            await send(message)

        await self.app(scope, receive, marked)
