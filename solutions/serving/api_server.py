"""The OpenAI-compatible HTTP server: ``python -m solutions.serving.api_server --model smollm2-135m --port 8000``."""

from __future__ import annotations

import argparse
import asyncio
import errno
import secrets
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ..core.config import add_engine_flags, config_from_flags
from ..core.input import EngineRequest, Prompt
from ..core.machine import settle_heap
from ..core.scheduler import QueueFullError
from .async_engine import AsyncEngine, EngineDeadError, OutputStream
from .openai_protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatMessage,
    CompletionRequest,
    CompletionResponse,
    ErrorBody,
    GenerationRequest,
    ModelCard,
    ModelList,
    RequestError,
    describe_validation_error,
    error_body,
)
from .responses import ChatReply, CompletionReply, Reply, server_sent_events

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; nobody reads it."""
MAX_NUM_WAITING = 1024
"""Default bound of the queue: a server refuses early rather than let everybody wait for long."""
RETRY_AFTER_SECONDS = 1
UNHEALTHY_SECONDS = 3.0
"""How long a server whose engine has failed still answers, with 503, so that whoever watches ``/health`` learns of it."""


# -------------------------------------------------------------------------------------------------------- the app


def create_app(async_engine: AsyncEngine, served_model_names: Sequence[str], api_keys: Sequence[str] | None = None) -> FastAPI:
    """The server's ASGI application; it starts the engine's thread and ends it.

    Args:
        async_engine: not started yet.
        served_model_names: what a request's ``model`` may be.
        api_keys: one of them must come as ``Authorization: Bearer …`` with every request but ``/health``; none: open.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async_engine.start()
        yield
        await asyncio.to_thread(async_engine.shutdown)

    app = FastAPI(title="Build your own vLLM", lifespan=lifespan)
    add_error_handlers(app)
    if api_keys:
        app.add_middleware(KeyGuard, api_keys=api_keys)
    max_model_len = async_engine.engine.limits.max_model_len
    models = {name: ModelCard(id=name, max_model_len=max_model_len) for name in served_model_names}

    def check_model(name: str) -> ModelCard:
        if name not in models:
            raise RequestError(f"model {name!r} does not exist; this server has {', '.join(models)}", "model", 404)
        return models[name]

    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if async_engine.is_running else 503)

    @app.get("/v1/models", responses=errors)
    async def list_models() -> ModelList:
        return ModelList(data=list(models.values()))

    @app.get("/v1/models/{name:path}", responses=errors)
    async def get_model(name: str) -> ModelCard:
        return check_model(name)

    @app.post("/v1/completions", response_model=CompletionResponse, responses=errors)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        check_model(body.model)
        return await respond(async_engine, http, body, body.prompt, CompletionReply, "cmpl")

    @app.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=errors)
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        check_model(body.model)
        prompt = await asyncio.to_thread(render_chat, async_engine.engine.tokenizer, body.messages)
        return await respond(async_engine, http, body, [prompt], ChatReply, "chatcmpl")

    return app


async def respond(
    engine: AsyncEngine,
    http: Request,
    body: GenerationRequest,
    prompts: list[str | list[int]],
    reply_class: type[Reply],
    prefix: str,
) -> Response:
    """Validate, submit, and answer whole or as a stream. A client that leaves aborts its requests.

    Raises:
        RequestError: a prompt or a parameter is not valid; nothing has reached the engine then.
        QueueFullError, EngineDeadError: see `AsyncEngine.submit`.
    """
    reply_id = f"{prefix}-{uuid.uuid4().hex}"
    requests = await engine_requests(engine, reply_id, body, prompts)
    reply = reply_class(reply_id, body, {r.request_id: r.prompt_token_ids for r in requests}, engine.engine.tokenizer)
    stream = await engine.submit(requests)
    if body.stream:
        return EventStreamResponse(reply, stream)
    async with stream:
        watch = asyncio.create_task(close_on_disconnect(http, stream))
        try:
            outputs = [output async for output in stream if output.finished]
        finally:
            watch.cancel()
    if len(outputs) < len(requests):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(reply.whole(outputs).model_dump_json(), media_type="application/json")


async def engine_requests(
    engine: AsyncEngine, reply_id: str, body: GenerationRequest, prompts: list[str | list[int]]
) -> list[EngineRequest]:
    """One validated engine request a prompt.

    Raises:
        RequestError: a prompt or a parameter is not valid, or needs what this server was not started with.
    """
    params = body.to_sampling_params()
    if body.priority and engine.engine.config.scheduling_policy != "priority":
        raise RequestError("priority needs a server that was started with --scheduling-policy priority", "priority")
    try:
        requests = await engine.prepare(
            reply_id, [engine_prompt(prompt, body.cache_salt) for prompt in prompts], params, body.priority or 0
        )
    except ValueError as error:
        raise body.refusal(error) from error
    limit = engine.engine.limits.max_model_len
    longest = max(len(request.prompt_token_ids) for request in requests)
    field, asked = body.token_limit
    if asked is not None and longest + asked > limit:
        raise RequestError(
            f"{field} is too large: {longest} tokens of prompt and {asked} to generate exceed the context of {limit}",
            field,
        )
    return requests


def engine_prompt(prompt: str | list[int], cache_salt: str | None) -> Prompt:
    """A prompt in the engine's form."""
    salt = {} if cache_salt is None else {"cache_salt": cache_salt}
    return {"prompt": prompt, **salt} if isinstance(prompt, str) else {"prompt_token_ids": prompt, **salt}


def render_chat(tokenizer: Any, messages: list[ChatMessage]) -> list[int]:
    """The conversation as token ids, by the model's chat template, up to where the assistant speaks.

    Raises:
        RequestError: the model has no chat template, or it does not take this conversation.
    """
    from jinja2 import TemplateError  # loaded by the tokenizer anyway

    if tokenizer is None or not tokenizer.chat_template:
        raise RequestError("this model has no chat template; use /v1/completions", "messages")
    conversation = [{"role": message.role, "content": message.text()} for message in messages]
    try:
        return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise RequestError(f"the model's chat template does not take these messages: {error}", "messages") from error


async def close_on_disconnect(http: Request, stream: OutputStream) -> None:
    """End a stream as soon as the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    stream.close()


class EventStreamResponse(StreamingResponse):
    """Server-sent events; however the response ends, so does the work for it."""

    def __init__(self, reply: Reply, stream: OutputStream) -> None:
        super().__init__(
            server_sent_events(reply, stream),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self.stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.stream:
            await super().__call__(scope, receive, send)


# ---------------------------------------------------------------------------------------------- errors and keys


def error_response(message: str, status: int, param: str | None = None, headers: Any = None) -> JSONResponse:
    """An OpenAI error body."""
    return JSONResponse(error_body(message, status, param).model_dump(), status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every failure with an OpenAI error body that holds no stack trace and no path."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error_response(str(error), error.status, error.param)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, param = describe_validation_error(error.errors()[0])
        return error_response(message, 400, param)

    @app.exception_handler(QueueFullError)
    async def queue_full(_: Request, error: QueueFullError) -> Response:
        return error_response(str(error), 429, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})

    @app.exception_handler(EngineDeadError)
    async def engine_dead(_: Request, error: EngineDeadError) -> Response:
        return error_response(str(error), 503)

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path}: {error.detail}"
        return error_response(message, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(_: Request, __: Exception) -> Response:
        return error_response("internal server error", 500)


class KeyGuard:
    """ASGI middleware: everything but ``/health`` needs one of the API keys."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health" and not self.allows(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            await error_response("missing or wrong API key", 401, headers=headers)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def allows(self, scope: Scope) -> bool:
        """Whether the request carries a key; takes equally long for each wrong one."""
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        matches = [secrets.compare_digest(given.strip(), key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(matches)


# ----------------------------------------------------------------------------------------------- the command line


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """The server's flags and the engine's."""
    parser = argparse.ArgumentParser(prog="api_server", description="Serve a model behind the OpenAI API.")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")
    group.add_argument("--port", type=int, default=8000, help="port; 0 picks a free one (default: 8000)")
    group.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names in the API (default: --model's)")
    group.add_argument("--api-key", nargs="+", metavar="KEY", help="ask clients for one of these keys")
    group.add_argument(
        "--shutdown-timeout", type=int, default=30, metavar="SECONDS",
        help="time that running requests get after SIGTERM, before they are aborted (default: 30)",
    )  # fmt: skip
    add_engine_flags(parser)
    parser.set_defaults(max_num_waiting=MAX_NUM_WAITING)
    args = parser.parse_args(argv)
    if args.api_key and not all(args.api_key):
        parser.error("--api-key must not be empty")
    return args


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that the port is known to be ours before the model is loaded.

    Raises:
        OSError: the address cannot be had; the message says what to do.
    """
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise OSError(f"--port must be 0 to 65535, got {port}")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
        return sock
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is in use; choose another with --port or stop what listens there") from error
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}; see --host and --port") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until SIGTERM or SIGINT, or until the engine fails; returns the exit code."""
    started = time.perf_counter()
    args = parse_flags(argv)
    try:
        sock = bind(args.host, args.port)
        from ..core.engine import LLMEngine  # after the port is ours: torch takes seconds to import

        imported = time.perf_counter()
        engine = LLMEngine(config_from_flags(args))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settle_heap()
    for line in engine.startup_summary():
        print(line)
    names = args.served_model_name or [args.model]
    host, port = sock.getsockname()[:2]
    host = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    seconds = time.perf_counter() - started
    print(f"Serving {', '.join(names)} at http://{host}:{port}/v1, ", end="")
    print(f"{seconds:.1f} s after the start ({imported - started:.1f} s of it imports)", flush=True)
    async_engine = AsyncEngine(engine)
    app = create_app(async_engine, names, args.api_key)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=args.shutdown_timeout)
    server = uvicorn.Server(config)
    deaths: list[None] = []

    def end() -> None:
        deaths.append(None)
        asyncio.get_running_loop().call_later(UNHEALTHY_SECONDS, setattr, server, "should_exit", True)

    async_engine.on_death = end
    server.run(sockets=[sock])
    engine.close()
    return 1 if deaths else 0


if __name__ == "__main__":
    sys.exit(main())
