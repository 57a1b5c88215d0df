"""Requests to any server that speaks OpenAI's completions API: all at once, as many at a time, or arriving at random.

The client is one event loop on aiohttp, whose parser is in C: on a machine that serves at the same time, what the client
computes is taken from the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterable
from collections.abc import Sequence as Many

import aiohttp
import httpx

from .datasets import BenchRequest
from .latency import Stream
from .throughput import Measurement

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)
REFUSALS = (429, 503)
"""What a server answers that has too much to do."""


def first_model(url: str, api_key: str | None = None) -> str:
    """The name of the model that a server serves.

    Raises:
        ValueError: nobody answers there, or with something else than a list of models.
    """
    try:
        answer = httpx.get(f"{url.rstrip('/')}/models", headers=_headers(api_key), timeout=60)
        return answer.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{url} is no OpenAI server with a model (give its address with /v1): {error}") from None


def client_session(api_key: str | None = None) -> aiohttp.ClientSession:
    """A client with as many connections as there are requests at once."""
    return aiohttp.ClientSession(headers=_headers(api_key), timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0))


def run_server(url: str, model: str, requests: Many[BenchRequest], api_key: str | None = None) -> Measurement:
    """Send all requests at once and read their streams to the end.

    Greedy, and with ``ignore_eos``, which vLLM, SGLang, llama.cpp and this engine's server know.

    Raises:
        ValueError: the server refuses a request.
        RuntimeError: a request came back with another number of tokens than it asked for.
    """
    start = time.perf_counter()
    streams = asyncio.run(closed_loop(url, model, requests, len(requests), api_key=api_key))
    seconds = time.perf_counter() - start
    check(requests, streams)
    details = {"ttft_ms_median": 1e3 * statistics.median(stream.ttft for stream in streams)}
    if later := [stream.tpot for stream in streams if stream.tpot is not None]:
        details["tpot_ms_median"] = 1e3 * statistics.median(later)
    prompt, useful = sum(len(r.prompt_token_ids) for r in requests), sum(r.output_len for r in requests)
    return Measurement(url, seconds, len(requests), prompt, useful, useful, details)


def check(requests: Many[BenchRequest], streams: Many[Stream]) -> None:
    """Raises ValueError if a request was refused, RuntimeError if it came back with another number of tokens than asked for."""
    for number, (request, stream) in enumerate(zip(requests, streams, strict=True)):
        if stream.error is not None:
            raise ValueError(stream.error)
        if stream.num_tokens != request.output_len:
            raise RuntimeError(f"request {number} asked for {request.output_len} tokens and got {stream.num_tokens}")


async def closed_loop(
    url: str,
    model: str,
    requests: Iterable[BenchRequest],
    concurrency: int,
    seconds: float | None = None,
    api_key: str | None = None,
) -> list[Stream]:
    """`concurrency` users, each of whom sends a request once the last one is answered.

    Args:
        seconds: after which nobody sends another one; None: until there are none left.

    Returns:
        A stream a request, in the order of `requests`.
    """
    start, queue = time.perf_counter(), enumerate(requests)
    streams: dict[int, Stream] = {}
    async with client_session(api_key) as client:

        async def user() -> None:
            for number, request in queue:
                streams[number] = await stream_request(client, url, model, request)
                if seconds is not None and time.perf_counter() - start > seconds:
                    return

        await asyncio.gather(*(user() for _ in range(concurrency)))
    return [streams[number] for number in sorted(streams)]


async def open_loop(
    url: str, model: str, requests: Iterable[BenchRequest], rate: float, *, seed: int = 0, api_key: str | None = None
) -> list[Stream]:
    """Requests that arrive at random, whatever the server is at (a Poisson process).

    Args:
        rate: requests a second; infinite: all at once.
        seed: of the arrivals.

    Returns:
        A stream a request, in the order of `requests`. Its clock starts when the request was due, not when it was sent, so a
        client that is behind its plan makes no wait look shorter.
    """
    rng, due = random.Random(seed), time.perf_counter()
    async with client_session(api_key) as client:
        tasks = []
        for request in requests:
            due += rng.expovariate(rate) if rate < float("inf") else 0.0
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(stream_request(client, url, model, request, due)))
        return await asyncio.gather(*tasks)


async def stream_request(
    client: aiohttp.ClientSession, url: str, model: str, request: BenchRequest, due: float | None = None
) -> Stream:
    """Send one request, greedy and without an end, and read its stream. A refusal for want of room is an answer with an error.

    Args:
        due: when its clock starts; None: now.

    Raises:
        ValueError: the server refuses it for another reason, or ends with an error.
    """
    body = {
        "model": model, "prompt": request.text or request.prompt_token_ids, "max_tokens": request.output_len,
        "temperature": 0, "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    stream = Stream(time.perf_counter() if due is None else due)
    async with client.post(f"{url.rstrip('/')}/completions", json=body) as response:
        if response.status != 200:
            message = f"{url} answers {response.status}: {(await response.text())[:300]}"
            if response.status not in REFUSALS:
                raise ValueError(message)
            stream.error = message
            return stream
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise ValueError(f"{url} ends with an error: {event['error']}")
            if event.get("choices"):
                stream.times.append(time.perf_counter())
            if usage := event.get("usage"):
                stream.num_tokens, stream.num_prompt = usage["completion_tokens"], usage["prompt_tokens"]
                stream.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return stream


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
