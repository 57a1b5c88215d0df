"""A server under load, beside the same engine without one: what HTTP and tokenization cost, whether anything leaks, and
whether the server's own measurements are those of its clients.

Server, client and offline engine are processes of their own; only one of server and offline engine works at a time.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from ..batching.sequence import RequestOutputKind, SamplingParams
from .datasets import TOKEN_IDS, BenchRequest
from .end_to_end import client_session

ROOT = Path(__file__).parents[2]
PACKAGE = __name__.partition(".")[0]
"""`solutions`, or `stages` when a learner's server is to be started."""
HEALTH_EVERY, MEMORY_EVERY = 0.05, 1.0
MIB = 2**20


@contextmanager
def running_server(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a process of its own on a free port, and its address with ``/v1``; it is killed if it still runs then.

    Raises:
        RuntimeError: it does not start; the message is what it printed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", f"{PACKAGE}.serving.api_server", "--host", "127.0.0.1", "--port", "0", *flags]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:  # fmt: skip
        try:
            lines: list[str] = []
            for line in server.stdout:
                lines.append(line)
                if found := re.search(r"http://\S+/v1", line):
                    break
            else:
                raise RuntimeError("the server did not start:\n" + "".join(lines))
            yield server, found[0]
        finally:
            server.kill()


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The engine's settings on the server's command line."""
    names = {name: "--" + name.replace("_", "-") for name in settings}
    return [names[name] if value is True else f"{names[name]}={value}" for name, value in settings.items()]


def chat_sized_requests(tokenizer: Any, count: int, seed: int) -> list[BenchRequest]:
    """Prompts of about 16..112 tokens as text, answers of 64..192."""
    rng = random.Random(seed)
    ids = [[rng.randint(*TOKEN_IDS) for _ in range(rng.randint(16, 96))] for _ in range(count)]
    texts = tokenizer.batch_decode(ids)
    prompts = tokenizer(texts)["input_ids"]  # not always the ids that the text was made of
    return [BenchRequest(prompt, rng.randint(64, 192), text) for prompt, text in zip(prompts, texts, strict=True)]


def offline_rate(
    settings: dict[str, Any], requests: list[BenchRequest], concurrency: int, warm_up: float, seconds: float
) -> float:
    """Output tokens a second of an engine in a new process with `concurrency` requests always under way, which are token ids
    and become token ids: neither HTTP nor text.

    Args:
        settings: of the engine.
        warm_up: seconds before the clock starts. seconds: of the clock.
    """
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_offline_rate, (settings, requests, concurrency, warm_up, seconds))


def _offline_rate(
    settings: dict[str, Any], requests: list[BenchRequest], concurrency: int, warm_up: float, seconds: float
) -> float:
    from ..core.config import EngineConfig
    from ..core.engine import LLMEngine

    engine = LLMEngine(EngineConfig(**settings))
    queue = enumerate(requests)

    def add() -> None:
        number, request = next(queue)
        params = SamplingParams(
            temperature=0.0, max_tokens=request.output_len, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        engine.add_request(str(number), {"prompt_token_ids": request.prompt_token_ids}, params)

    for _ in range(concurrency):
        add()
    start, tokens = time.perf_counter() + warm_up, 0
    while (now := time.perf_counter()) < start + seconds:
        outputs = engine.step()
        if now >= start:
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        for output in outputs:
            if output.finished:
                add()
    return tokens / (time.perf_counter() - start)


@dataclass(slots=True)
class Watched:
    """What a server was like while it worked.

    Attributes:
        health: seconds that each ``/health`` took. memory: (seconds, bytes that its processes held).
        tokens: (seconds, tokens generated so far), as its ``/metrics`` say.
    """

    health: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[tuple[float, float]] = field(default_factory=list)

    def memory_slope(self) -> float:
        """MiB a minute, by least squares over the later half, when caches and pools have filled."""
        later = np.array(self.memory[len(self.memory) // 2 :])
        return float(np.polyfit(later[:, 0] / 60, later[:, 1] / MIB, 1)[0])

    def rate(self, warm_up: float, seconds: float) -> float:
        """Tokens a second between two moments, by least squares: a step brings hundreds of tokens at once."""
        inside = np.array([sample for sample in self.tokens if warm_up <= sample[0] <= warm_up + seconds])
        return float(np.polyfit(inside[:, 0], inside[:, 1], 1)[0])


async def watch(url: str, process: int, into: Watched) -> None:
    """Ask a server how it is, until cancelled.

    Args:
        url: with ``/v1``. process: its id.
    """
    base, server = url.removesuffix("/v1"), psutil.Process(process)
    start = due = time.perf_counter()
    async with client_session() as client:
        while True:
            asked = time.perf_counter()
            async with client.get(f"{base}/health") as answer:
                answer.raise_for_status()
            into.health.append(time.perf_counter() - asked)
            if asked >= due:
                due = asked + MEMORY_EVERY
                family = [server, *server.children(recursive=True)]
                into.memory.append((asked - start, sum(each.memory_info().rss for each in family)))
                async with client.get(f"{base}/metrics") as answer:
                    metrics = totals(await answer.text())
                into.tokens.append((time.perf_counter() - start, metrics["vllm:generation_tokens_total"]))
            await asyncio.sleep(HEALTH_EVERY)


FEED_SECONDS = 20.0


async def watch_feed(url: str, into: list[tuple[float, float]]) -> None:
    """Read ``/live`` for every other `FEED_SECONDS`, until cancelled.

    Args:
        url: with ``/v1``. into: gets the time at which each reading began and ended, in seconds since the first call.
    """
    origin = time.perf_counter()
    async with client_session() as client:
        while True:
            await asyncio.sleep(FEED_SECONDS)
            start = time.perf_counter()
            async with client.get(url.removesuffix("/v1") + "/live") as answer:
                answer.raise_for_status()
                async for _ in answer.content.iter_any():
                    if time.perf_counter() - start > FEED_SECONDS:
                        break
            into.append((start - origin, time.perf_counter() - origin))


def feed_cost(seen: Watched, watched: list[tuple[float, float]], warm_up: float) -> list[float]:
    """Share of the throughput that each reading of the feed cost, against the times before and after it."""
    costs = []
    for start, end in watched:
        if warm_up <= start - FEED_SECONDS and end + FEED_SECONDS <= seen.tokens[-1][0]:
            without = (seen.rate(start - FEED_SECONDS, FEED_SECONDS) + seen.rate(end, FEED_SECONDS)) / 2
            costs.append(1 - seen.rate(start, end - start) / without)
    return costs


def totals(text: str) -> dict[str, float]:
    """Sums over labels of every sample in Prometheus' text, by name, without buckets."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" not in sample.labels:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


async def under_watch(url: str, process: int, load: Any, feed: list[tuple[float, float]] | None = None) -> tuple[Any, Watched]:
    """What a load, which is awaited, gives, and what the server was like meanwhile.

    Args:
        feed: for `watch_feed`; None: nobody reads the feed.
    """
    seen = Watched()
    watching = [asyncio.create_task(watch(url, process, seen))]
    if feed is not None:
        watching.append(asyncio.create_task(watch_feed(url, feed)))
    try:
        result = await load
    finally:
        for task in watching:
            task.cancel()
        for task in watching:
            with suppress(asyncio.CancelledError):
                await task
    return result, seen
