"""What routing by prefix gains: the same requests to the same engines, once by cached prefix and once in turn.

Users come in groups, and all prompts of a group begin alike: a long system prompt, a document, a conversation so far. An
engine's KV cache holds the beginnings of its share of the groups and not those of all. In turn, every engine sees every group
and finds little of it; by prefix, each keeps to some groups.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .datasets import TOKEN_IDS, BenchRequest
from .end_to_end import Client, check
from .latency import Stream, percentiles

ROUTERS = ("prefix", "round_robin")


@dataclass(frozen=True, slots=True)
class Groups:
    """What is asked for.

    Attributes:
        groups: how many beginnings. requests: of each. prefix_len: tokens of a beginning. input_len: tokens after it.
        output_len: tokens to generate. concurrency: requests under way at once.
    """

    groups: int = 8
    requests: int = 8
    prefix_len: int = 512
    input_len: int = 64
    output_len: int = 32
    concurrency: int = 8

    def make(self, seed: int) -> list[BenchRequest]:
        """The requests, in random order."""
        rng = random.Random(seed)

        def ids(count: int) -> list[int]:
            return [rng.randint(*TOKEN_IDS) for _ in range(count)]

        beginnings = [ids(self.prefix_len) for _ in range(self.groups)]
        requests = [BenchRequest(start + ids(self.input_len), self.output_len) for start in beginnings * self.requests]
        rng.shuffle(requests)
        return requests

    def blocks_for(self, replicas: int, block_size: int) -> int:
        """KV blocks with which an engine holds its share of the beginnings and what runs on it, but not all beginnings; and
        with which it can run its share of the requests, even if each had a beginning of its own."""

        def blocks(tokens: int) -> int:
            return -(-tokens // block_size)

        share = -(-self.groups // replicas) * blocks(self.prefix_len)
        own = blocks(self.input_len + self.output_len) + 1
        return max(share + self.concurrency * own, -(-self.concurrency // replicas) * (blocks(self.prefix_len) + own))


@dataclass(slots=True)
class Measured:
    """One router on one set of requests.

    Attributes:
        hit_rate: share of the prompts' tokens that were cached, 0 to 1. ttft_p50, ttft_p99: milliseconds to the first token.
        output_tokens_per_second: of all engines together.
    """

    hit_rate: float
    ttft_p50: float
    ttft_p99: float
    output_tokens_per_second: float


def summarise(requests: Sequence[BenchRequest], streams: Sequence[Stream], seconds: float) -> Measured:
    """What the streams of the requests come to.

    Raises:
        ValueError: a request was refused.
        RuntimeError: one came back with another number of tokens than it asked for.
    """
    check(requests, streams)
    waits = percentiles(stream.ttft for stream in streams)
    return Measured(
        sum(stream.num_cached for stream in streams) / sum(len(request.prompt_token_ids) for request in requests),
        waits["p50"],
        waits["p99"],
        sum(stream.num_tokens for stream in streams) / seconds,
    )


def measure(url: str, model: str, requests: Sequence[BenchRequest], concurrency: int) -> Measured:
    """Send requests in their order, a new one whenever one has ended."""
    start = time.perf_counter()
    streams = asyncio.run(Client(url, model).closed_loop(requests, concurrency))
    return summarise(requests, streams, time.perf_counter() - start)


@contextmanager
def serving(settings: dict[str, Any], replicas: int, port: int, cores: int) -> Iterator[dict[str, str]]:
    """Both routers, each with engines of its own, of which one set works while the other rests; gives their addresses.

    Args:
        settings: of the engines. cores: of this machine, dealt out over the engines of one router.

    Raises:
        ValueError: Ray is not installed.
    """
    from ..core.ray_executor import import_ray

    ray = import_ray()
    from ray import serve

    from ..serving.replicas.ray_app import app

    each = max(1, cores // replicas)
    ray.init(
        "local", num_cpus=len(ROUTERS) * replicas * each, include_dashboard=False, object_store_memory=80 << 20,
        log_to_driver=False, logging_level="error",
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for router in ROUTERS:
            given = {**settings, "replicas": replicas, "router": router, "cores_per_replica": each}
            serve.run(app(given), name=router, route_prefix=f"/{router}")
        yield {router: f"http://127.0.0.1:{port}/{router}/v1" for router in ROUTERS}
    finally:
        ray.shutdown()
