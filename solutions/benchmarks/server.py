"""Throughput of any server that speaks OpenAI's completions API: the same requests as offline, all sent at once, streamed."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import httpx

from .datasets import BenchRequest
from .throughput import Measurement

TIMEOUT = httpx.Timeout(600, connect=10)


@dataclass(slots=True)
class Stream:
    """When the tokens of one request came, in seconds on the clock of `time.perf_counter`.

    Attributes:
        num_cached: tokens of the prompt that the server did not compute, if it says so.
    """

    start: float
    first: float | None = None
    last: float | None = None
    num_tokens: int = 0
    num_cached: int = 0


def first_model(url: str, api_key: str | None = None) -> str:
    """The name of the model that a server serves.

    Raises:
        ValueError: nobody answers there, or with something else than a list of models.
    """
    try:
        answer = httpx.get(f"{url.rstrip('/')}/models", headers=_headers(api_key), timeout=TIMEOUT)
        return answer.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{url} is no OpenAI server with a model (give its address with /v1): {error}") from None


def run_server(url: str, model: str, requests: Many[BenchRequest], api_key: str | None = None) -> Measurement:
    """Send all requests at once and read their streams to the end.

    Greedy, and with ``ignore_eos``, which vLLM, SGLang, llama.cpp and this engine's server know.

    Raises:
        ValueError: the server refuses a request.
        RuntimeError: a request came back with another number of tokens than it asked for.
    """
    start = time.perf_counter()
    streams = asyncio.run(_run_all(url.rstrip("/"), model, requests, api_key))
    seconds = time.perf_counter() - start
    for number, (request, stream) in enumerate(zip(requests, streams, strict=True)):
        if stream.num_tokens != request.output_len:
            raise RuntimeError(f"request {number} asked for {request.output_len} tokens and got {stream.num_tokens}")
    later = [(s.last - s.first) / (s.num_tokens - 1) for s in streams if s.num_tokens > 1]
    details = {"ttft_ms_median": 1e3 * statistics.median(s.first - s.start for s in streams)}
    if later:
        details["tpot_ms_median"] = 1e3 * statistics.median(later)
    prompt, useful = sum(len(r.prompt_token_ids) for r in requests), sum(r.output_len for r in requests)
    return Measurement(url, seconds, len(requests), prompt, useful, useful, details)


async def _run_all(url: str, model: str, requests: Many[BenchRequest], api_key: str | None) -> list[Stream]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=_headers(api_key), timeout=TIMEOUT, limits=limits) as client:
        return await asyncio.gather(*(stream_request(client, url, model, request) for request in requests))


async def stream_request(client: httpx.AsyncClient, url: str, model: str, request: BenchRequest) -> Stream:
    """Send one request, greedy and without an end, and read its stream.

    Raises:
        ValueError: the server refuses it, or ends with an error.
    """
    body = {
        "model": model, "prompt": request.prompt_token_ids, "max_tokens": request.output_len, "temperature": 0, "stream": True,
        "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    stream = Stream(time.perf_counter())
    async with client.stream("POST", f"{url}/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"{url} answers {response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[len("data: ") :])
            if "error" in event:
                raise ValueError(f"{url} ends with an error: {event['error']}")
            if event.get("choices"):
                stream.last = time.perf_counter()
                stream.first = stream.first or stream.last
            if usage := event.get("usage"):
                stream.num_tokens = usage["completion_tokens"]
                stream.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return stream


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
