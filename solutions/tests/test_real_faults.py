"""What goes wrong around a real server under load: afterwards no block is held, nothing hangs and no process is left.

Faults of a single request, and those that need exact timing, have their tests in test_api_faults.py and
test_server_limits.py.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest

from solutions.benchmarks.servers import running_server
from solutions.benchmarks.serving import totals
from solutions.tests.fake_server import until
from solutions.tests.real_server import CONTEXT, GREEDY, MODEL, stopped

FLAGS = ("--dtype", "float32", "--max-num-seqs", "16", "--max-model-len")
DISCONNECTS = 1000
COUNTING = "Count: 1, 2, 3,"


def metric(url: str, name: str) -> float:
    return totals(httpx.get(url.removesuffix("/v1") + "/metrics").text).get(f"vllm:{name}", 0.0)


def is_idle(url: str) -> bool:
    """No request is known and every block is free."""
    return not any(metric(url, name) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=120)


async def leave(url: str, fields: dict[str, Any], seconds: float, reset: bool) -> None:
    """Send a request and break the connection after some time, with a reset or in order."""
    address = urlsplit(url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await asyncio.sleep(seconds)
    if reset:
        writer.transport.abort()
    else:
        writer.close()


async def leave_often(url: str, times: int, at_once: int = 32) -> None:
    rng = random.Random(0)
    turn = asyncio.Semaphore(at_once)

    async def one() -> None:
        prompt = rng.choice([COUNTING * rng.randint(1, 30), f"{rng.random()} " * rng.randint(1, 20)])
        fields = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": 200,
            "n": rng.choice([1, 1, 1, 3]),
            "stream": rng.random() < 0.7,
        }
        async with turn:
            await leave(url, {"model": MODEL, **fields}, rng.expovariate(1 / 0.15), rng.random() < 0.5)

    await asyncio.gather(*(one() for _ in range(times)))


def end(answer: Any) -> tuple[str, str]:
    return answer.choices[0].text, answer.choices[0].finish_reason


async def read(stream: Any) -> tuple[str, str | None]:
    """The text of a stream and why it ended."""
    text, reason = "", None
    async for chunk in stream:
        text, reason = text + chunk.choices[0].text, chunk.choices[0].finish_reason
    return text, reason


@pytest.mark.slow
def test_a_thousand_clients_that_leave_hold_nothing_and_disturb_nobody() -> None:
    with running_server(*FLAGS, str(CONTEXT), "--max-num-seqs", "64") as (server, url):

        async def load() -> None:
            async with client(url) as api:
                alone = end(await api.completions.create(**GREEDY, prompt=COUNTING, max_tokens=10))
                leaving = asyncio.create_task(leave_often(url, DISCONNECTS))

                async def stay() -> int:
                    answers = 0
                    while not leaving.done():
                        assert end(await api.completions.create(**GREEDY, prompt=COUNTING, max_tokens=10)) == alone
                        answers += 1
                    return answers

                answers = await asyncio.gather(*(stay() for _ in range(4)))
                await leaving
                assert min(answers) >= 1

        asyncio.run(load())
        until(lambda: is_idle(url), 3)
        assert metric(url, "request_success_total") >= DISCONNECTS / 2  # most of them were with the engine when they left
        assert stopped(server) == ""


@pytest.mark.slow
def test_a_full_cache_preempts_and_sigterm_lets_everybody_finish() -> None:
    # blocks for little more than one sequence of the longest kind
    with running_server(*FLAGS, "128", "--kv-cache-memory-bytes", "8MiB", "--no-enable-prefix-caching") as (server, url):
        prompts = [f"{word} and {word} are" for word in ("Cats", "Dogs", "Trees", "Stars", "Rivers", "Birds")]

        async def load() -> None:
            async with client(url) as api:

                def ask(prompt: str, **more: Any) -> Coroutine[Any, Any, Any]:
                    return api.completions.create(**GREEDY, prompt=prompt, max_tokens=40, **more)

                alone = [end(await ask(prompt)) for prompt in prompts]
                assert list(map(end, await asyncio.gather(*map(ask, prompts)))) == alone
                assert metric(url, "num_preemptions_total") > 0
                until(lambda: is_idle(url))
                streams = await asyncio.gather(*(ask(prompt, stream=True) for prompt in prompts * 3))
                server.send_signal(signal.SIGTERM)
                assert await asyncio.gather(*map(read, streams)) == alone * 3

        asyncio.run(load())
        assert server.wait(20) == 0
        assert server.stdout.read() == ""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "server"])
def test_a_kill_under_load_ends_all_processes(victim: str) -> None:
    with running_server(*FLAGS, str(CONTEXT), "--tensor-parallel-size", "2") as (server, url):
        (rank,) = psutil.Process(server.pid).children(recursive=True)

        async def load() -> list[Any]:
            async with client(url) as api:
                fields = {**GREEDY, "prompt": COUNTING, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
                streams = [await api.completions.create(**fields, stream=True) for _ in range(8)]
                (rank if victim == "rank" else server).kill()
                ends = await asyncio.gather(*map(read, streams), return_exceptions=True)
                if victim == "rank":
                    async with httpx.AsyncClient() as http:
                        assert (await http.get(url.removesuffix("/v1") + "/health")).status_code == 503
                return ends

        ends = asyncio.run(load())
        kind = openai.APIError if victim == "rank" else openai.APIConnectionError  # told by the server, or by the client
        assert [type(end) for end in ends] == [kind] * 8, ends
        assert server.wait(20) == (1 if victim == "rank" else -signal.SIGKILL)
        _, alive = psutil.wait_procs([rank], timeout=10)
        assert alive == []
        assert ("WorkerDiedError" in server.stdout.read()) == (victim == "rank")
