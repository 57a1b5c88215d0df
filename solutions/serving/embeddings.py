"""``/v1/embeddings``: texts or token ids in, a vector for each out.

A request may bring thousands of inputs. They go to the engine in small parts, so that other clients' requests get their turn
between them, and the waiting queue never holds them all.

Source: https://platform.openai.com/docs/api-reference/embeddings; the fields beyond it are vLLM's.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field, Strict, field_validator

from ..batching.pooling import Pooling, PoolingParams
from .errors import RequestError
from .openai_fields import Int
from .openai_fields import Request as RequestBody
from .openai_protocol import Prompts

if TYPE_CHECKING:
    from ..core.input import EngineRequest
    from .async_engine import AsyncEngine
    from .tracing import RequestTracer

logger = logging.getLogger(__name__)

MAX_INPUTS = 2048
"""Most inputs of a request: OpenAI's limit."""
PART, PARTS_AT_ONCE = 32, 2
"""Inputs that go to the engine together, and how many such parts of a request it has at most: one computes, one waits."""
HEADER = "X-Embedding-Warning"
UNTRAINED = (
    "nothing says that this model is trained for embeddings; vectors are pooled all the same (see --pooler-config), and "
    "similar texts may have dissimilar ones"
)
OTHERS = ("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/pooling", "/classify")
"""vLLM's routes for other kinds of models."""


class EmbeddingRequest(RequestBody):
    """Body of ``POST /v1/embeddings``."""

    prompt_field: ClassVar[str] = "input"

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Strict(), Field(ge=1)] | None = None
    """Keep so many of a vector's numbers, the first, and make it as long as it was."""
    user: str | None = None
    """Accepted: it names the caller's end user and does not change the answer."""
    add_special_tokens: Literal[True] | None = None
    """A model has learned to make vectors with them."""
    truncate_prompt_tokens: Int | None = None
    """So many tokens of a longer input are used, by default its first; -1: as many as the context holds."""
    truncation_side: Literal["left", "right"] | None = None
    """Where an input is cut off."""
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    """Inputs share cached prefixes only with prompts of the same salt."""
    priority: Int | None = None
    """Lower goes first, if the engine schedules by priority."""

    _pooling: Pooling | None = None

    @field_validator("input")
    @classmethod
    def _check_input(cls, inputs: list[str | list[int]]) -> list[str | list[int]]:
        if len(inputs) > MAX_INPUTS:
            raise ValueError(f"at most {MAX_INPUTS} inputs, got {len(inputs)}")
        return inputs

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """No field limits an answer."""
        return "", None

    def pooled_by(self, pooling: Pooling | None) -> None:
        """Say how the engine makes vectors."""
        self._pooling = pooling

    def to_sampling_params(self, _defaults: Mapping[str, Any]) -> PoolingParams:
        """The engine's parameters; defaults for drawing tokens are nothing to a vector.

        Raises:
            RequestError: a value is out of range; `param` is the field.
        """
        side = self.truncation_side or "right"
        try:
            return PoolingParams(
                pooling=self._pooling, dimensions=self.dimensions, truncate_prompt_tokens=self.truncate_prompt_tokens,
                truncation_side=side,
            )  # fmt: skip
        except ValueError as error:
            raise self.refusal(error) from error

    def refusal(self, error: ValueError) -> RequestError:
        """An error of the engine for the client: its message begins with the field at fault, or is about the input."""
        message = str(error)
        field = message.partition(" ")[0]
        return RequestError(message, field if field in type(self).model_fields else self.prompt_field)


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or their bytes as base64: float32, the lowest byte first."""


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@dataclass(frozen=True, slots=True)
class EmbeddingDoor:
    """What the route needs of the app.

    Attributes:
        prepare: makes engine requests; see `engine_requests`.
        unless_left: waits for some work, or gives it up and returns None when the client leaves.
        left: the status of an answer that nobody reads.
    """

    prepare: Callable[..., Awaitable[list[EngineRequest]]]
    unless_left: Callable[..., Awaitable[str | None]]
    left: int


def add_embedding_routes(
    app: FastAPI,
    engine: AsyncEngine,
    check_model: Callable[[str], Any],
    door: EmbeddingDoor,
    *,
    responses: dict[int | str, Any],
) -> None:
    """Add the route, and those that are refused by name. `check_model` raises what a model's name deserves, and `responses`
    describe what errors look like."""
    model = engine.engine.model_config

    @lru_cache(maxsize=1)
    def log_once() -> None:
        logger.warning("/v1/embeddings: %s (said once)", UNTRAINED)

    @app.post("/v1/embeddings", response_model=EmbeddingResponse, responses=responses)
    async def embeddings(body: EmbeddingRequest, http: Request) -> Response:
        check_model(body.model)
        body.pooled_by(model.pooling)
        answer = await door.unless_left(http, answer_to(engine, door, http, body))
        if answer is None:
            return Response(status_code=door.left)
        response = Response(answer, media_type="application/json")
        if model.pooling is None or model.pooling.assumed:
            response.headers[HEADER] = UNTRAINED
            log_once()
        return response

    def refuse(path: str) -> None:
        @app.post(path, include_in_schema=False)
        async def refused() -> Response:
            raise RequestError(f"{path} is not supported by this server; it has /v1/embeddings", status=404)

    for path in OTHERS:
        refuse(path)


async def answer_to(engine: AsyncEngine, door: EmbeddingDoor, http: Request, body: EmbeddingRequest) -> str:
    """The answer, as JSON. Nothing reaches the engine before all inputs are checked.

    Raises:
        What `engine_requests` and `AsyncEngine.submit` raise.
    """
    tenant, address = getattr(http.state, "tenant", None), http.client and http.client.host
    priority: int = getattr(http.state, "priority", 0)
    requests = await door.prepare(engine, f"embd-{uuid.uuid4().hex}", body, body.input, tenant, address, priority)
    vectors = await compute(engine, requests, http)
    return await asyncio.to_thread(whole, body, requests, vectors)


async def compute(engine: AsyncEngine, requests: list[EngineRequest], http: Request) -> dict[str, NDArray[np.float32]]:
    """The vectors by request id. Who is cancelled here leaves nothing in the engine."""
    tracer: RequestTracer | None = http.app.state.tracer
    parts = iter([requests[start : start + PART] for start in range(0, len(requests), PART)])
    vectors: dict[str, NDArray[np.float32]] = {}

    async def work() -> None:
        for part in parts:
            with nullcontext() if tracer is None else tracer.under(part, http.headers):
                stream = await engine.submit(part)
            async with stream:
                async for output in stream:
                    assert output.pooled is not None  # nobody but this task aborts it
                    vectors[output.request_id] = output.pooled

    workers = [asyncio.create_task(work()) for _ in range(PARTS_AT_ONCE)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
    return vectors


def whole(body: EmbeddingRequest, requests: list[EngineRequest], vectors: dict[str, NDArray[np.float32]]) -> str:
    """The answer, in the order of the inputs."""
    data = []
    for index, request in enumerate(requests):
        vector = vectors[request.request_id]
        encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append(Embedding(index=index, embedding=encoded if body.encoding_format == "base64" else vector.tolist()))
    count = sum(len(request.prompt_token_ids) for request in requests)
    usage = EmbeddingUsage(prompt_tokens=count, total_tokens=count)
    return EmbeddingResponse(data=data, model=body.model, usage=usage).model_dump_json()
