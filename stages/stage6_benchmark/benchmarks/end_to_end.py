"""Requests to any server that speaks OpenAI's completions API: as many at a time, or at their own times.

`closed_loop` and `open_loop` decide when a request is sent and know nothing of HTTP; `Client.send` is one request. The client
is one event loop on aiohttp, whose parser is in C: on a machine that serves at the same time, what the client computes is
taken from the server.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import aiohttp
import httpx

from .datasets import BenchRequest
from .latency import Stream, duration
from .throughput import Measurement, measurement, median_waits

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)
REFUSALS = (429, 503)
"""What a server answers that has too much to do."""

Send = Callable[[BenchRequest, float], Awaitable[Stream]]
"""Sends a request, whose clock starts at the time given, and reads its answer to the end."""


def now() -> float:
    """Seconds on the clock of the running event loop, on which all times here are."""
    return asyncio.get_running_loop().time()


def arrivals(count: int, rate: float, *, burst: int = 1, seed: int = 0) -> list[float]:
    """When requests arrive that know nothing of each other: a Poisson process.

    Groups of `burst` arrive together, at exponential distances, so that `rate` is the mean whatever `burst` is; the last group
    is what is left.

    Args:
        count: of the requests. rate: requests a second; infinite: all at once. seed: of the distances, which a generator of
            their own draws.

    Returns:
        [count] seconds after the start, ascending; the first group comes at 0.

    Raises:
        ValueError: "arrivals need a rate above 0 and bursts of at least 1", and `rate` is not, or `burst`.
    """
    # Hint: `now()` is the time, on a clock that the tests can turn. In one of the loops nobody waits for an answer
    # before the next request; in the other everybody does.
    raise NotImplementedError("Stage 6 · Task 6.2: arrivals, see stages/stage6_benchmark/GUIDE.md#task-6-2")


async def open_loop(send: Send, requests: Iterable[BenchRequest], times: Iterable[float]) -> list[Stream]:
    """Send each request at its time, whatever the server is at.

    Args:
        times: seconds after now, ascending, one a request.

    Returns:
        A stream a request, in the order of `requests`. Its clock starts when the request was due, not when it was sent, so a
        client that is behind its plan makes no wait look shorter (Tene, "How NOT to Measure Latency", 2013: coordinated
        omission).
    """
    raise NotImplementedError("Stage 6 · Task 6.2: open_loop, see stages/stage6_benchmark/GUIDE.md#task-6-2")


async def closed_loop(
    send: Send, requests: Iterable[BenchRequest], concurrency: int, seconds: float = math.inf
) -> list[Stream]:
    """`concurrency` users, each of whom sends a request once the last one is answered.

    Args:
        seconds: after which nobody sends another one.

    Returns:
        A stream a request that was sent, in the order of `requests`.
    """
    raise NotImplementedError("Stage 6 · Task 6.2: closed_loop, see stages/stage6_benchmark/GUIDE.md#task-6-2")


def first_model(url: str, api_key: str | None = None) -> str:
    """The name of the model that a server serves. Raises ValueError if nobody answers there with a list of models."""
    try:
        answer = httpx.get(f"{url.rstrip('/')}/models", headers=_headers(api_key), timeout=60)
        return answer.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{url} is no OpenAI server with a model (give its address with /v1): {error}") from None


def client_session(api_key: str | None = None) -> aiohttp.ClientSession:
    """A session with as many connections as there are requests at once."""
    return aiohttp.ClientSession(headers=_headers(api_key), timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0))


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


@dataclass
class Client:
    """A server at `url` (with ``/v1``), its name for the model, and the key if it wants one; a session for each loop."""

    url: str
    model: str
    api_key: str | None = None
    session: aiohttp.ClientSession | None = None

    async def send(self, request: BenchRequest, due: float) -> Stream:
        """Send one request, greedy and without an end, and read its stream. A refusal for want of room is an answer with an
        error; another refusal, or an error at the end, raises ValueError. The body is understood by vLLM, SGLang, llama.cpp and
        this engine's server, which all know ``ignore_eos``."""
        body = {
            "model": self.model, "prompt": request.text or request.prompt_token_ids, "max_tokens": request.output_len,
            "temperature": 0, "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        stream = Stream(due)
        async with self.session.post(f"{self.url.rstrip('/')}/completions", json=body) as response:
            if response.status != 200:
                message = f"{self.url} answers {response.status}: {(await response.text())[:300]}"
                if response.status not in REFUSALS:
                    raise ValueError(message)
                stream.error = message
                return stream
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise ValueError(f"{self.url} ends with an error: {event['error']}")
                if event.get("choices"):
                    stream.times.append(now())
                if usage := event.get("usage"):
                    stream.num_tokens, stream.num_prompt = usage["completion_tokens"], usage["prompt_tokens"]
                    stream.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return stream

    async def closed_loop(self, requests: Iterable[BenchRequest], concurrency: int, seconds: float = math.inf) -> list[Stream]:
        """`closed_loop` against this server alone."""
        async with client_session(self.api_key) as self.session:
            return await closed_loop(self.send, requests, concurrency, seconds)

    async def open_loop(self, requests: Iterable[BenchRequest], times: Iterable[float]) -> list[Stream]:
        """`open_loop` against this server alone."""
        async with client_session(self.api_key) as self.session:
            return await open_loop(self.send, requests, times)


def run_server(url: str, model: str, requests: Many[BenchRequest], api_key: str | None = None) -> Measurement:
    """Send all requests at once and read their streams to the end. Raises what `check` does."""
    streams = asyncio.run(Client(url, model, api_key).closed_loop(requests, len(requests)))
    check(requests, streams)
    waits = median_waits((stream.ttft, stream.tpot) for stream in streams)
    return measurement(url, duration(streams), requests, sum(request.output_len for request in requests), waits)


def check(requests: Many[BenchRequest], streams: Many[Stream], may_refuse: bool = False) -> None:
    """Raises ValueError if a request was refused, RuntimeError if an answer has another number of tokens than was asked for."""
    for number, (request, stream) in enumerate(zip(requests, streams, strict=True)):
        if stream.error is not None and not may_refuse:
            raise ValueError(stream.error)
        if stream.error is None and stream.num_tokens != request.output_len:
            raise RuntimeError(f"request {number} asked for {request.output_len} tokens and got {stream.num_tokens}")
