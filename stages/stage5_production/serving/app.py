"""The server's HTTP application: its routes, and how a request becomes an answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from .adapter_routes import add_adapter_routes, refuse_adapter_routes
from .answer_forms import mark_older
from .async_engine import AsyncEngine
from .batch_routes import FILES, add_batch_routes
from .batches.batch_store import BatchStore
from .beam_search import check as check_beam_search
from .beam_search import search
from .chat_reading import ChatReader
from .embeddings import EmbeddingDoor, EmbeddingRequest, add_embedding_routes
from .errors import ErrorBody, RequestError, context_error
from .guards import BodyLimit, Bugs, KeyGuard, RequestIds, TrailingSlashes, add_error_handlers
from .ignored_fields import TolerantRoute
from .json_body import JsonRoute
from .live.feed import add_live_page
from .messages_routes import add_messages_routes
from .openai_answers import (
    ChatCompletionResponse,
    CompletionResponse,
    ModelCard,
    ModelList,
    RenderedPrompt,
)
from .openai_protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from .operator_routes import add_operator_routes, package_version
from .output_stream import OutputStream
from .reasoning.formats import Reasoning
from .responses import CompletionReply, Reply
from .responses_routes import add_responses_routes
from .served_models import ServedModels
from .server_metrics import ServerMetrics
from .tokenizer_routes import add_tokenizer_routes
from .tool_calls.calling import ToolCalling
from .tracing import RequestTracer
from .wire import STREAMED, ChatDoor, Submitted, Wire

if TYPE_CHECKING:
    from ..core.input import EngineRequest, Prompt, TokensPrompt

Result = TypeVar("Result")
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that has disconnected; nobody reads it."""
MAX_BODY_BYTES = 4 << 20
"""Default limit of a body; 100,000 tokens take about a tenth of it."""
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def create_app(
    async_engine: AsyncEngine, served_model_names: Sequence[str], api_keys: Sequence[str] | None = None, *,
    max_body_bytes: int = MAX_BODY_BYTES, allowed_origins: Sequence[str] = (), tracer: RequestTracer | None = None,
    live: bool = False, strict: bool = False, tool_call_parser: str = "auto", enable_auto_tool_choice: bool = True,
    tokenizer_info: bool = False, reasoning_parser: str | None = None, lora_updates: bool = False,
    batches: BatchStore | None = None,
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
        reasoning_parser: how the model writes its thoughts, see `Reasoning`; None: it has none.
        lora_updates: offer the routes that load and unload adapters.
        batches: where files and batches are kept; None: there are none. The engine must schedule by priority.

    Raises:
        ValueError: an adapter has a name of the model.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async_engine.start()
        async with batches_running():
            yield
        await asyncio.to_thread(async_engine.shutdown)

    engine = async_engine.engine
    app = FastAPI(title="Build your own vLLM", version=package_version(), lifespan=lifespan)
    app.router.route_class = JsonRoute
    add_error_handlers(app)
    app.add_middleware(Bugs)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes, others={} if batches is None else {FILES: batches.max_body_bytes})
    if api_keys:
        app.add_middleware(KeyGuard, api_keys=api_keys)
    if allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(TrailingSlashes)
    app.add_middleware(RequestIds)
    metrics = ServerMetrics(served_model_names[0], engine)
    engine.observers.append(metrics)
    app.state.tracer = tracer
    if tracer is not None:
        engine.observers.append(tracer)
    async_engine.on_rejection = metrics.on_rejection
    models = app.state.models = ServedModels(engine, served_model_names)
    add_operator_routes(app, async_engine, metrics)
    if live:
        add_live_page(app, async_engine, served_model_names[0], responses=ERRORS)
    app.router.route_class = JsonRoute if strict else TolerantRoute  # from here on routes take what other servers know
    at_once = max(1, engine.config.max_num_seqs // 2)
    batches_running = add_batch_routes(app, batches, at_once, responses=ERRORS)
    calling = ToolCalling(engine.tokenizer, tool_call_parser, enable_auto_tool_choice)
    chats = ChatReader(engine.tokenizer, calling, Reasoning(engine.tokenizer, reasoning_parser))
    add_openai_routes(app, async_engine, models, chats)
    door = chat_door(async_engine, models, chats)
    add_responses_routes(app, door, responses=ERRORS)
    add_messages_routes(app, door, responses=ERRORS)
    embedding_door = EmbeddingDoor(partial(engine_requests, models), unless_left, CLIENT_CLOSED_REQUEST)
    add_embedding_routes(app, async_engine, models.find, embedding_door, responses=ERRORS)
    add_tokenizer_routes(app, async_engine.engine, models.find, chats, info=tokenizer_info, responses=ERRORS)
    if lora_updates:
        add_adapter_routes(app, async_engine, models, responses=ERRORS)
    else:
        refuse_adapter_routes(app)
    return app


def add_openai_routes(app: FastAPI, async_engine: AsyncEngine, models: ServedModels, chats: ChatReader) -> None:
    """Add the routes of OpenAI's API."""

    @app.get("/v1/models", responses=ERRORS)
    async def list_models() -> ModelList:
        return ModelList(data=models.cards())

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def get_model(name: str) -> ModelCard:
        return models.find(name)

    @app.post("/v1/completions", response_model=CompletionResponse, responses=ERRORS | STREAMED)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        models.find_writer(body.model)
        prompts = body.prompt
        if body.add_special_tokens is False:
            prompts = await asyncio.to_thread(chats.bare, prompts)
        return await respond(async_engine, http, body, prompts, CompletionReply, "cmpl-")

    @app.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=ERRORS | STREAMED)
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        models.find_writer(body.model)
        prompt, make_reply = await chats.read(body)
        return await respond(async_engine, http, body, [prompt], make_reply, "chatcmpl-")

    @app.post("/v1/chat/completions/render", responses=ERRORS)
    async def render(body: ChatCompletionRequest) -> RenderedPrompt:
        """The prompt of a chat, which is not answered."""
        models.find(body.model)
        prompt, _ = await chats.read(body)
        text = await asyncio.to_thread(chats.tokenizer.decode, prompt)
        return RenderedPrompt(model=body.model, token_ids=prompt, prompt_text=text)


def chat_door(async_engine: AsyncEngine, models: ServedModels, chats: ChatReader) -> ChatDoor:
    """What the other two APIs need to be answered by chat completions."""

    async def submit_chat(http: Request, body: ChatCompletionRequest, prefix: str) -> Submitted | None:
        models.find_writer(body.model)
        prompt, make_reply = await chats.read(body)
        return await submit(async_engine, http, body, [prompt], make_reply, prefix)

    async def chat_tokens(body: ChatCompletionRequest) -> list[int]:
        models.find_writer(body.model)
        return (await chats.read(body))[0]

    return ChatDoor(submit_chat, deliver, chat_tokens, async_engine.engine.model_config.sampling)


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
        QueueFullError, EngineDeadError: see `AsyncEngine.submit`. UnknownAdapterError: it was unloaded meanwhile.
    """
    if body.use_beam_search:
        check_beam_search(body)
    reply_id = f"{prefix}{uuid.uuid4().hex}"
    tenant, address = getattr(http.state, "tenant", None), http.client and http.client.host
    priority: int = getattr(http.state, "priority", 0)
    models: ServedModels = http.app.state.models
    requests = await unless_left(http, engine_requests(models, engine, reply_id, body, prompts, tenant, address, priority))
    if requests is None:
        return None
    reply = make_reply(reply_id, body, {r.request_id: r.prompt_token_ids for r in requests}, engine.engine.tokenizer)
    if body.use_beam_search:
        return Submitted(reply, search(engine, body, requests))
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
    models: ServedModels, engine: AsyncEngine, reply_id: str, body: GenerationRequest | EmbeddingRequest,
    prompts: list[str | list[int]], tenant: str | None = None, address: str | None = None, priority: int = 0,
) -> list[EngineRequest]:  # fmt: skip
    """Make one validated engine request for each prompt. Tenants (see `KeyGuard`) share no cached prefixes, and take turns in
    compiling grammars; without tenants, client addresses take turns.

    Args:
        priority: is added to the request's.

    Raises:
        RequestError: a prompt or a parameter is not valid, or needs what this server was not started with.
        QueueFullError, EngineDeadError: see `AsyncEngine.prepare`.
    """
    from ..core.input import ContextLengthError  # imports torch, which has to wait until the port is ours

    params = body.to_sampling_params(engine.engine.model_config.sampling)
    salt = ":".join(part for part in (tenant, body.cache_salt) if part is not None) or None
    if body.priority and engine.engine.config.scheduling_policy != "priority":
        raise RequestError("priority needs a server that was started with --scheduling-policy priority", "priority")
    limit = engine.engine.limits.max_model_len
    try:
        requests = await engine.prepare(
            reply_id, [engine_prompt(prompt, salt) for prompt in prompts], params, (body.priority or 0) + priority,
            tenant or address,
        )  # fmt: skip
    except ContextLengthError as error:
        raise context_error(limit, error.num_tokens, body.prompt_field) from error
    except ValueError as error:
        raise body.refusal(error) from error
    longest = max(len(request.prompt_token_ids) for request in requests)
    field, asked = body.token_limit
    if asked is not None and longest + asked > limit:
        raise context_error(limit, longest, body.prompt_field, (field, asked))
    for request in requests:
        request.adapter = models.adapter(body.model)
    return requests


def engine_prompt(prompt: str | list[int], cache_salt: str | None) -> Prompt:
    """A prompt in the engine's form."""
    made: TokensPrompt = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    if cache_salt is not None:
        made["cache_salt"] = cache_salt
    return made


async def unless_left(http: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
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
