"""Servers for prompts and servers for answers behind one endpoint: which is asked what, and real processes that are killed."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.benchmarks.servers import as_flags, free_port, running_server
from solutions.core.engine import LLM
from solutions.serving.replicas.two_phase import Call, GoneError, Reply, TwoPhase, prefill_body
from solutions.tests.real_server import stopped
from solutions.tests.relay import Between
from solutions.tests.tiny_models import make_tiny_llama

PROMPT = [7] * 40
EVENTS = [(b"content-type", b"text/event-stream")]


class Servers:
    """Servers that do what a test tells them.

    Args:
        work: name → what it does with a call: pieces, a status and pieces, or an exception.
    """

    def __init__(self, work: dict[str, Callable[[Call], Any]]) -> None:
        self.work, self.calls, self.closed = work, [], []

    async def __call__(self, server: str, call: Call) -> Reply:
        self.calls.append((server, json.loads(call.body)))
        found = self.work[server](call)
        if isinstance(found, asyncio.Event):
            await found.wait()
        if isinstance(found, Exception):
            raise found
        status, pieces = found if isinstance(found, tuple) else (200, found)

        async def body() -> AsyncIterator[bytes]:
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, asyncio.Event):
                    await piece.wait()
                else:
                    yield piece

        async def close() -> None:
            self.closed.append(server)

        return Reply(status, EVENTS, body(), close)


def ask(servers: Servers, prompt: Any = PROMPT, seconds: float = 20.0, **fields: Any) -> tuple[int, bytes, TwoPhase]:
    names = sorted(servers.work)
    pools = [[name for name in names if name.startswith(letter)] for letter in "pd"]
    two_phase = TwoPhase(*pools, servers, fields.pop("prefill_seconds", 20.0), seconds)

    async def run() -> tuple[int, bytes]:
        call = Call("POST", "/v1/completions", [], json.dumps({"model": "m", "prompt": prompt, **fields}).encode())
        reply = await two_phase.answer(call)
        return reply.status, b"".join([piece async for piece in reply.pieces])

    status, body = asyncio.run(run())
    assert set(two_phase.prefill.loads.values()) | set(two_phase.decode.loads.values()) <= {0}
    return status, body, two_phase


def test_the_prompt_goes_first_and_the_request_as_it_is_second() -> None:
    servers = Servers({"p": lambda _: [b"x"], "d": lambda _: [b"a", b"b"]})
    status, body, two_phase = ask(servers, stream=True, max_tokens=9, n=2, seed=3, cache_salt="s")
    assert (status, body) == (200, b"ab")
    asked = {"model": "m", "prompt": PROMPT, "seed": 3, "cache_salt": "s"}
    assert servers.calls == [
        ("p", asked | {"max_tokens": 1}), ("d", asked | {"stream": True, "max_tokens": 9, "n": 2})
    ]  # fmt: skip
    assert servers.closed == ["p", "d"]
    assert two_phase.counts == {("prefill", "done"): 1, ("decode", "done"): 1}


@pytest.mark.parametrize("fields", [{"prompt": [1] * 15}, {"prompt": "short"}, {"echo": True}, {"prompt_logprobs": 1}])
def test_what_has_nothing_to_hand_over_is_answered_at_once(fields: dict[str, Any]) -> None:
    servers = Servers({"p": lambda _: [b"x"], "d": lambda _: [b"a"]})
    assert ask(servers, **fields)[1] == b"a"
    assert [name for name, _ in servers.calls] == ["d"]


def test_other_paths_have_one_phase_and_chats_keep_what_their_template_reads() -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}], "tools": [1], "max_completion_tokens": 5, "stream": True}
    assert prefill_body("/v1/chat/completions?a=b", chat) == {
        "messages": chat["messages"], "tools": [1], "max_tokens": 1
    }  # fmt: skip
    assert prefill_body("/v1/embeddings", {"input": "a"}) is None
    assert prefill_body("/v1/completions", [1]) is None


@pytest.mark.parametrize("problem", [GoneError("dead"), (500, [b"bug"]), (200, [b"x", GoneError("dies")])])
def test_a_prompt_goes_to_another_server_and_in_the_end_to_the_writer(problem: Any) -> None:
    servers = Servers({"p1": lambda _: problem, "p2": lambda _: problem, "d": lambda _: [b"a"]})
    status, body, two_phase = ask(servers)
    assert (status, body) == (200, b"a")
    assert sorted(name for name, _ in servers.calls) == ["d", "p1", "p2"]
    assert two_phase.counts["prefill", "failed"] == 2


@pytest.mark.parametrize("status", [400, 401, 429])
def test_a_refusal_of_the_first_phase_is_the_answer(status: int) -> None:
    servers = Servers({"p": lambda _: (status, [b"no"]), "d": lambda _: [b"a"]})
    assert ask(servers)[:2] == (status, b"no")
    assert [name for name, _ in servers.calls] == ["p"]


def test_a_prompt_that_takes_too_long_is_left_to_the_writer() -> None:
    servers = Servers({"p": lambda _: asyncio.Event(), "d": lambda _: [b"a"]})
    status, body, two_phase = ask(servers, prefill_seconds=0.05)
    assert (status, body) == (200, b"a")
    assert two_phase.counts["prefill", "late"] == 1


def test_who_writes_nothing_is_given_up_within_the_deadline() -> None:
    status, body, _ = ask(Servers({"d": lambda _: asyncio.Event()}), seconds=0.05)
    assert status == 504
    assert "within 0.05 s" in json.loads(body)["error"]["message"]
    status, body, two_phase = ask(Servers({"d": lambda _: [b"a", asyncio.Event()]}), seconds=0.05)
    assert status == 200
    assert body.startswith(b"adata: ")
    assert body.endswith(b"data: [DONE]\n\n")
    assert two_phase.counts["decode", "late"] == 1


def test_a_writer_that_cannot_be_reached_is_replaced_and_one_that_dies_ends_the_stream_with_an_error() -> None:
    assert ask(Servers({"d1": lambda _: GoneError("dead"), "d2": lambda _: [b"a"]}))[:2] == (200, b"a")
    assert ask(Servers({"d1": lambda _: GoneError("dead")}))[0] == 503
    status, body, _ = ask(Servers({"d": lambda _: [b"a", GoneError("dies")]}))
    assert status == 200
    assert b"has died" in body


def test_requests_that_begin_alike_go_to_one_server() -> None:
    servers = Servers({name: lambda _: [b"a"] for name in ("p1", "p2", "d1", "d2")})
    two_phase = TwoPhase(["p1", "p2"], ["d1", "d2"], servers, 20, 20)

    async def run() -> None:
        for number in (1, 2) * 3:
            body = {"prompt": [number] * 64}
            reply = await two_phase.answer(Call("POST", "/v1/completions", [], json.dumps(body).encode()))
            assert [piece async for piece in reply.pieces] == [b"a"]

    asyncio.run(run())
    for names in (("p1", "p2"), ("d1", "d2")):
        seen = [(name, body["prompt"][0]) for name, body in servers.calls if name in names]
        assert len(set(seen)) == 2


# ------------------------------------------------------------------------------------------------------------ processes

ENGINE = {"dtype": "float32", "block_size": 4, "max_model_len": 512, "no_start_compiler": True, "served_model_name": "tiny"}
ANSWER = 12
OFFER_BYTES, ROW_BYTES = 24, 32 + 3 * 2 * 4 * 2 * 12 * 4
"""What a producer says first, and then for each block: a checksum, and its layers, keys and values, tokens, heads, elements."""


class Deployment:
    """A proxy, a server for prompts and one for answers, each a process."""

    def __init__(self, stack: ExitStack, model: Path, connector: str, home: Path, decode_blocks: int) -> None:
        address = str(home / "kv.sock") if connector == "shm" else f"127.0.0.1:{free_port()}"
        self.servers, self.urls = [], []
        for role, blocks in (("kv_producer", 200), ("kv_consumer", decode_blocks)):
            keys = {"kv_connector": connector, "kv_role": role, "kv_addresses": [address]}
            settings = ENGINE | {"model": str(model), "num_gpu_blocks_override": blocks, "kv_transfer_config": json.dumps(keys)}
            server, url = stack.enter_context(running_server(*as_flags(settings)))
            self.servers.append(server)
            self.urls.append(url.removesuffix("/v1"))
        flags = "--prefill", self.urls[0], "--decode", self.urls[1], "--timeout", "60"
        self.proxy, self.url = stack.enter_context(running_server(*flags, module="serving.replicas.two_phase_proxy"))

    def ask(self, prompt: list[int], **fields: Any) -> tuple[list[int], int]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True} | fields
        answer = httpx.post(f"{self.url}/completions", json=body | {"return_token_ids": True}, timeout=60)
        answer.raise_for_status()
        content = answer.json()
        return content["choices"][0]["token_ids"], content["usage"]["prompt_tokens_details"]["cached_tokens"]

    def metric(self, server: int, name: str) -> float:
        lines = httpx.get(f"{self.urls[server]}/metrics").text.splitlines()
        (found,) = [line for line in lines if line.startswith(name + "{")]
        return float(found.split()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_llama(path)
    return path


@contextmanager
def deployed(model: Path, connector: str, home: Path, decode_blocks: int = 200) -> Iterator[Deployment]:
    with ExitStack() as stack:
        yield Deployment(stack, model, connector, home, decode_blocks)


def expected(model: Path, asked: list[list[int]], **fields: Any) -> list[list[int]]:
    """What one mixed engine writes."""
    llm = LLM(str(model), dtype="float32", block_size=4, max_model_len=512, num_gpu_blocks_override=200)
    params = SamplingParams(**({"temperature": 0, "max_tokens": ANSWER, "ignore_eos": True} | fields))
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(4)
    return [[rng.randrange(250) for _ in range(length)] for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("connector", ["tcp", "shm"])
def test_two_servers_write_what_one_engine_writes(connector: str, model: Path, tmp_path: Path) -> None:
    """Prompts of k·B - 1, k·B and k·B + 1 tokens, greedy and seeded, one by one and at once."""
    asked = prompts((99, 100, 101, 300))
    with deployed(model, connector, tmp_path) as servers:
        answers = [servers.ask(prompt) for prompt in asked]
        assert answers == list(zip(expected(model, asked), (96, 96, 100, 296), strict=True))
        assert servers.metric(0, "byov:kv_transfer_failures_total") == servers.metric(1, "byov:kv_transfer_failures_total") == 0
        assert servers.metric(1, "byov:kv_transfer_received_blocks_total") == 24 + 24 + 25 + 74
        drawn = {"temperature": 1.0, "seed": 9}
        more = prompts((120, 130, 140, 150, 160, 170))[1:]
        found: dict[int, list[int]] = {}
        threads = [
            threading.Thread(target=lambda n, p: found.update({n: servers.ask(p, **drawn)[0]}), args=pair)
            for pair in enumerate(more)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [found[number] for number in range(len(more))] == expected(model, more, **drawn)
        for server in (0, 1):
            assert servers.metric(server, "vllm:kv_cache_usage_perc") == 0
        for server in (servers.proxy, *servers.servers):
            server.send_signal(signal.SIGTERM)
        assert [server.wait(20) for server in servers.servers] == [0, 0]


@pytest.mark.slow
def test_a_server_for_prompts_that_is_killed_or_stopped_costs_no_answer(model: Path, tmp_path: Path) -> None:
    """Stopped in the middle of traffic, and then killed: requests under way are answered, and those that come later."""
    asked = prompts((200,) * 12)
    answers = expected(model, asked)
    with deployed(model, "tcp", tmp_path, decode_blocks=130) as servers:
        found: dict[int, list[int]] = {}

        def run(numbers: list[int]) -> None:
            for number in numbers:
                found[number] = servers.ask(asked[number])[0]

        threads = [threading.Thread(target=partial(run, [*range(start, 12, 3)])) for start in range(3)]
        for thread in threads:
            thread.start()
        servers.servers[0].send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join(120)
        assert [found[number] for number in range(12)] == answers
        assert servers.metric(1, "vllm:kv_cache_usage_perc") == 0
        assert stopped(servers.servers[1]) is not None


@pytest.mark.slow
def test_a_producer_that_is_killed_within_a_row_costs_no_token(model: Path) -> None:
    """A relay kills its process when half of the second row has passed, and nothing comes behind that."""
    asked, port, cut = prompts((120, 140)), free_port(), OFFER_BYTES + ROW_BYTES + ROW_BYTES // 2
    settings = ENGINE | {"model": str(model), "num_gpu_blocks_override": 200}
    keys = {"kv_connector": "tcp", "kv_role": "kv_producer", "kv_addresses": [f"127.0.0.1:{port}"]}

    def kill_within_a_row(piece: bytes, done: int) -> bytes | None:
        if done + len(piece) <= cut:
            return piece
        if server.poll() is not None:
            return None
        server.kill()
        server.wait(20)
        return piece[: cut - done]

    between = Between(f"127.0.0.1:{port}", kill_within_a_row)
    with running_server(*as_flags(settings | {"kv_transfer_config": json.dumps(keys)})) as (server, url):
        for prompt in asked:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
            httpx.post(f"{url}/completions", json=body, timeout=60).raise_for_status()
        keys |= {"kv_role": "kv_consumer", "kv_addresses": [between.address]}
        transfer = {"kv_transfer_config": json.dumps(keys)}
        llm = LLM(str(model), dtype="float32", block_size=4, max_model_len=512, num_gpu_blocks_override=200, **transfer)
        params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
        assert server.returncode == -signal.SIGKILL
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected(model, asked)
    found = llm.llm_engine.stats()
    assert (found.kv_offload.num_received, found.kv_offload.num_failures, found.kv_cache_usage) == (1, 1, 0)
    between.close()
    llm.llm_engine.close()
