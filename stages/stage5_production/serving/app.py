"""The server's HTTP application: its routes, and how a request becomes an answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from .answer_forms import mark_older
from .async_engine import AsyncEngine
from .errors import ErrorBody, RequestError, context_error
from .guards import BodyLimit, Bugs, KeyGuard, RequestIds, TrailingSlashes, add_error_handlers
from .ignored_fields import TolerantRoute
from .json_body import JsonRoute
from .live.feed import add_live_page
from .messages_routes import add_messages_routes
from .metrics import EngineMetrics
from .openai_answers import (
    ChatCompletionResponse,
    CompletionResponse,
    ModelCard,
    ModelList,
)
from .openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from .operator_routes import add_operator_routes, package_version
from .output_stream import OutputStream
from .responses import ChatReply, CompletionReply, Reply
from .responses_routes import add_responses_routes
from .tokenizer_routes import add_tokenizer_routes, chat_prompt
from .tool_calls.calling import ToolCalling
from .tool_replies import ToolReply
from .tracing import RequestTracer
from .wire import STREAMED, ChatDoor, Submitted, Wire

if TYPE_CHECKING:
    from ..core.input import EngineRequest, Prompt, TokensPrompt

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that has disconnected; nobody reads it."""
MAX_BODY_BYTES = 4 << 20
"""Default limit of a body; 100,000 tokens take about a tenth of it."""
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def create_app(
    async_engine: AsyncEngine, served_model_names: Sequence[str], api_keys: Sequence[str] | None = None, *,
    max_body_bytes: int = MAX_BODY_BYTES, allowed_origins: Sequence[str] = (), tracer: RequestTracer | None = None,
    live: bool = False, strict: bool = False, tool_call_parser: str = "auto", enable_auto_tool_choice: bool = True,
    tokenizer_info: bool = False,
) -> FastAPI:  # fmt: skip
    """Make the server's ASGI application, which starts and ends the engine's thread.

    Args:
        async_engine: not started yet.
        served_model_names: what a request's ``model`` may be.
        api_keys: a request needs one of them as ``Authorization: Bearer …``, see `KeyGuard`; none: no key is needed.
        max_body_bytes: larger bodies are refused.
        allowed_origins: web pages that may call the API from a browser; none: only its own.
        tracer: gets a span of each sequence.
        tool_call_parser, enable_auto_tool_choice: see `ToolCalling`.
        live: offer the page and ``/live``, which show everybody with access to the API which requests run, without texts.
        strict: refuse unknown fields instead of ignoring them, see `TolerantRoute`.
        tokenizer_info: offer ``/tokenizer_info``, which shows the chat template.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async_engine.start()
        yield
        await asyncio.to_thread(async_engine.shutdown)

    engine = async_engine.engine
    app = FastAPI(title="Build your own vLLM", version=package_version(), lifespan=lifespan)
    app.router.route_class = JsonRoute
    add_error_handlers(app)
    app.add_middleware(Bugs)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    if api_keys:
        app.add_middleware(KeyGuard, api_keys=api_keys)
    if allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(TrailingSlashes)
    app.add_middleware(RequestIds)
    metrics = EngineMetrics(served_model_names[0], engine.stats, engine.limits.max_model_len)
    engine.observers.append(metrics)
    app.state.tracer = tracer
    if tracer is not None:
        engine.observers.append(tracer)
    async_engine.on_rejection = metrics.on_rejection
    models = {
        name: ModelCard(id=name, root=engine.config.model, max_model_len=engine.limits.max_model_len)
        for name in served_model_names
    }

    def check_model(name: str) -> ModelCard:
        if name not in models:
            there = ", ".join(models)
            raise RequestError(f"model {name!r} does not exist; this server has {there}", "model", 404, "model_not_found")
        return models[name]

    add_operator_routes(app, async_engine, metrics)
    if live:
        add_live_page(app, async_engine, served_model_names[0], responses=ERRORS)
    app.router.route_class = JsonRoute if strict else TolerantRoute  # from here on routes take what other servers know
    calling = ToolCalling(engine.tokenizer, tool_call_parser, enable_auto_tool_choice)
    add_openai_routes(app, async_engine, models, check_model, calling)

    async def submit_chat(http: Request, body: ChatCompletionRequest, prefix: str) -> Submitted | None:
        check_model(body.model)
        prompt, make_reply = await read_chat(engine.tokenizer, calling, body)
        return await submit(async_engine, http, body, [prompt], make_reply, prefix)

    async def chat_tokens(body: ChatCompletionRequest) -> list[int]:
        check_model(body.model)
        return (await read_chat(engine.tokenizer, calling, body))[0]

    door = ChatDoor(submit_chat, deliver, chat_tokens)
    add_responses_routes(app, door, responses=ERRORS)
    add_messages_routes(app, door, responses=ERRORS)
    add_tokenizer_routes(app, async_engine.engine, check_model, info=tokenizer_info, responses=ERRORS)
    return app


def add_openai_routes(
    app: FastAPI, async_engine: AsyncEngine, models: dict[str, ModelCard], check_model: Callable[[str], ModelCard],
    calling: ToolCalling,
) -> None:  # fmt: skip
    """Add the routes of OpenAI's API."""

    @app.get("/v1/models", responses=ERRORS)
    async def list_models() -> ModelList:
        return ModelList(data=list(models.values()))

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def get_model(name: str) -> ModelCard:
        return check_model(name)

    @app.post("/v1/completions", response_model=CompletionResponse, responses=ERRORS | STREAMED)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        check_model(body.model)
        return await respond(async_engine, http, body, body.prompt, CompletionReply, "cmpl-")

    @app.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=ERRORS | STREAMED)
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        check_model(body.model)
        prompt, make_reply = await read_chat(async_engine.engine.tokenizer, calling, body)
        return await respond(async_engine, http, body, [prompt], make_reply, "chatcmpl-")


async def read_chat(
    tokenizer: Any, calling: ToolCalling, body: ChatCompletionRequest
) -> tuple[list[int], Callable[..., Reply]]:
    """The prompt of a chat, and what makes the reply to it.

    Raises:
        RequestError: messages or tools are not valid.
    """
    use = body.tool_use(calling, body.form if body.tools or body.functions else None)
    told = calling.conversation(body.conversation(), [] if use is None else use.functions)
    prompt = await asyncio.to_thread(chat_prompt, tokenizer, *told)
    if use is None:
        return prompt, ChatReply
    body.call_with(use)
    return prompt, partial(ToolReply, use)


async def respond(
    engine: AsyncEngine,
    http: Request,
    body: GenerationRequest,
    prompts: list[str | list[int]],
    make_reply: Callable[..., Reply],
    prefix: str,
) -> Response:
    """Validate, submit, and answer whole or as a stream. A client that leaves aborts its requests.

    Raises:
        What `submit` raises.
    """
    submitted = await submit(engine, http, body, prompts, make_reply, prefix)
    return mark_older(await deliver(http, submitted, Wire()), body.model_fields_set)


async def submit(
    engine: AsyncEngine,
    http: Request,
    body: GenerationRequest,
    prompts: list[str | list[int]],
    make_reply: Callable[..., Reply],
    prefix: str,
) -> Submitted | None:
    """Validate and submit. Returns None if the client leaves before that is done.

    Raises:
        RequestError: a prompt or a parameter is not valid; nothing has reached the engine then.
        QueueFullError, EngineDeadError: see `AsyncEngine.submit`.
    """
    reply_id = f"{prefix}{uuid.uuid4().hex}"
    tenant, address = getattr(http.state, "tenant", None), http.client and http.client.host
    requests = await unless_left(http, engine_requests(engine, reply_id, body, prompts, tenant, address))
    if requests is None:
        return None
    reply = make_reply(reply_id, body, {r.request_id: r.prompt_token_ids for r in requests}, engine.engine.tokenizer)
    tracer: RequestTracer | None = http.app.state.tracer
    with nullcontext() if tracer is None else tracer.under(requests, http.headers):
        return Submitted(reply, await engine.submit(requests))


async def deliver(http: Request, submitted: Submitted | None, wire: Wire) -> Response:
    """Answer whole or as a stream. A client that leaves aborts its requests."""
    if submitted is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    reply, stream = submitted.reply, submitted.stream
    if reply.request.stream:
        return EventStreamResponse(wire.events(reply, stream), stream)
    async with stream:
        watch = asyncio.create_task(close_on_disconnect(http, stream))
        try:
            outputs = [output async for output in stream if output.finished]
        finally:
            watch.cancel()
    if len(outputs) < len(reply.prompts):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(wire.whole(reply, outputs), media_type="application/json")


async def engine_requests(
    engine: AsyncEngine, reply_id: str, body: GenerationRequest, prompts: list[str | list[int]], tenant: str | None = None,
    address: str | None = None,
) -> list[EngineRequest]:  # fmt: skip
    """Make one validated engine request for each prompt. Tenants (see `KeyGuard`) share no cached prefixes, and take turns in
    compiling grammars; without tenants, client addresses take turns.

    Raises:
        RequestError: a prompt or a parameter is not valid, or needs what this server was not started with.
        QueueFullError, EngineDeadError: see `AsyncEngine.prepare`.
    """
    from ..core.input import ContextLengthError  # imports torch, which has to wait until the port is ours

    params = body.to_sampling_params()
    salt = ":".join(part for part in (tenant, body.cache_salt) if part is not None) or None
    if body.priority and engine.engine.config.scheduling_policy != "priority":
        raise RequestError("priority needs a server that was started with --scheduling-policy priority", "priority")
    limit = engine.engine.limits.max_model_len
    try:
        requests = await engine.prepare(
            reply_id, [engine_prompt(prompt, salt) for prompt in prompts], params, body.priority or 0, tenant or address
        )
    except ContextLengthError as error:
        raise context_error(limit, error.num_tokens, body.prompt_field) from error
    except ValueError as error:
        raise body.refusal(error) from error
    longest = max(len(request.prompt_token_ids) for request in requests)
    field, asked = body.token_limit
    if asked is not None and longest + asked > limit:
        raise context_error(limit, longest, body.prompt_field, (field, asked))
    return requests


def engine_prompt(prompt: str | list[int], cache_salt: str | None) -> Prompt:
    """A prompt in the engine's form."""
    made: TokensPrompt = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    if cache_salt is not None:
        made["cache_salt"] = cache_salt
    return made


async def unless_left(http: Request, work: Coroutine[Any, Any, list[EngineRequest]]) -> list[EngineRequest] | None:
    """Wait for the result of some work. If the client leaves first, the work is cancelled and the result is None."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.create_task(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def close_on_disconnect(http: Request, stream: OutputStream) -> None:
    """Close a stream as soon as the client has left; ignore all other ASGI messages."""
    # Hint: Follow what is held: the connection knows who left, the stream knows which requests were his, the engine has
    # their blocks. Each tells the next.
    raise NotImplementedError("Stage 5 · Task 5.6: close_on_disconnect, see stages/stage5_production/GUIDE.md#task-5-6")


class EventStreamResponse(StreamingResponse):
    """Server-sent events. When the response ends, for whatever reason, the work for it ends too."""

    def __init__(self, events: AsyncIterator[str], stream: OutputStream) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self.stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.stream:
            await super().__call__(scope, receive, send)
