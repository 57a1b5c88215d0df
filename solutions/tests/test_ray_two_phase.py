"""Prefill and decode apart under Ray Serve: the deployments, and real replicas of which some are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.serving.replicas.replica_settings import parse_settings
from solutions.tests.tiny_models import make_tiny_llama

pytest.importorskip("ray", reason='needs the extra [ray]: pip install -e ".[ray]"')
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.exceptions import ActorDiedError

from solutions.serving.replicas.ray_app import app
from solutions.serving.replicas.ray_two_phase import HandleSender
from solutions.serving.replicas.two_phase import Call, GoneError

ROOT = Path(__file__).parents[2]
ENGINE = {"dtype": "float32", "block_size": 4, "max_model_len": 512, "num_gpu_blocks_override": 200}
KV = '{"kv_connector": "shm", "kv_role": "kv_consumer", "kv_addresses": ["./a"]}'
ANSWER = 12
DEAD = ActorDiedError()
PROMPTS = [[(number * 37 + place * 11) % 250 for place in range(100 + number)] for number in range(12)]


def test_each_replica_is_a_deployment_that_knows_its_role() -> None:
    ingress = app({"replicas": 2, "prefill_replicas": 1, "timeout": 9})._bound_deployment
    prefill, decode, prefill_seconds, seconds = ingress.init_args
    assert (list(prefill), list(decode)) == (["prefill-0"], ["decode-0", "decode-1"])
    assert (prefill_seconds, seconds) == (60.0, 9.0)
    engines = {name: bound._bound_deployment.init_args[0] for name, bound in (prefill | decode).items()}
    roles = {name: json.loads(engine.kv_transfer_config) for name, engine in engines.items()}
    assert [role["kv_role"] for role in roles.values()] == ["kv_producer", "kv_consumer", "kv_consumer"]
    assert len({tuple(role["kv_addresses"]) for role in roles.values()}) == 1
    assert {bound._bound_deployment.num_replicas for bound in (prefill | decode).values()} == {1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prefill_replicas": -1}, "prefill_replicas must be at least 0"),
        ({"prefill_replicas": 1, "max_replicas": 2}, "prefill_replicas go with a fixed number of replicas"),
        ({"prefill_timeout": 0}, "prefill_timeout must be more than 0"),
        ({"timeout": -1}, "timeout must be more than 0"),
        (
            {"kv_transfer_config": '{"kv_connector": "shm", "kv_role": "kv_consumer", "kv_addresses": ["./a"]}'},
            "prefill_replicas",
        ),
    ],
)
def test_a_wrong_setting_is_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings(args)


def test_an_engine_that_cannot_hand_over_is_refused_before_it_starts() -> None:
    with pytest.raises(ValueError, match="--kv-transfer-config: not with --enable-lora"):
        app({"prefill_replicas": 1, "enable_lora": True})


class Stream:
    """What a handle gives: pieces, or an exception in the place of one."""

    def __init__(self, pieces: list[Any]) -> None:
        self.pieces, self.cancelled = iter(pieces), False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        try:
            piece = next(self.pieces)
        except StopIteration:
            raise StopAsyncIteration from None
        if isinstance(piece, Exception):
            raise piece
        return piece

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.calls = stream, []

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, call: Any, keys: list[bytes]) -> Stream:
        self.calls.append(call)
        return self.stream


def test_a_call_reaches_a_replica_and_whoever_closes_the_answer_cancels_it() -> None:
    """Each phase has a body of its own, so the client's length is not passed on."""
    handle = Handle(Stream([(200, [(b"a", b"b")]), b"one", b"two"]))
    sender = HandleSender({"decode-0": handle})
    call = Call("POST", "/v1/completions?x=y", [(b"Content-Length", b"99"), (b"accept", b"*")], b"{}")

    async def run() -> None:
        reply = await sender("decode-0", call)
        assert (reply.status, reply.headers) == (200, [(b"a", b"b")])
        assert [piece async for piece in reply.pieces] == [b"one", b"two"]
        await reply.close()

    asyncio.run(run())
    (sent,) = handle.calls
    assert (sent.path, sent.query, sent.headers, sent.body) == ("/v1/completions", b"x=y", [(b"accept", b"*")], b"{}")
    assert handle.stream.cancelled


@pytest.mark.parametrize("pieces", [[DEAD], [(200, []), b"one", DEAD]], ids=["at once", "within an answer"])
def test_a_replica_that_dies_is_gone(pieces: list[Any]) -> None:
    async def run() -> None:
        reply = await HandleSender({"decode-0": Handle(Stream(pieces))})("decode-0", Call("GET", "/", [], b""))
        async for _ in reply.pieces:
            pass

    with pytest.raises(GoneError):
        asyncio.run(run())


class Service:
    """A service of one replica for prompts and one for answers, as a process."""

    def __init__(self, model: Path) -> None:
        settings = ENGINE | {"model": model, "served_model_name": "tiny", "cores_per_replica": 1}
        settings |= {"prefill_replicas": 1, "timeout": 60}
        command = [sys.executable, "-m", "solutions.serving.replicas.ray_app", "--host", "127.0.0.1", "--port", "0"]
        environment = {**os.environ, "RAY_ADDRESS": "local"}  # a cluster of its own, whatever else runs here
        arguments = [f"{name}={value}" for name, value in settings.items()]
        self.process = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
        lines: list[str] = []
        while not (found := re.search(r"Serving at (http://\S+/v1)", lines[-1] if lines else "")):
            lines.append(self.process.stdout.readline())
            assert lines[-1], "the server did not start:\n" + "".join(lines)
        self.url = found[1]

    def ask(self, prompt: list[int]) -> tuple[list[int], int]:
        """Token ids of the answer, and how many of the prompt came from a cache."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/completions", json=body | {"return_token_ids": True}, timeout=90)
        answer.raise_for_status()
        content = answer.json()
        return content["choices"][0]["token_ids"], content["usage"]["prompt_tokens_details"]["cached_tokens"]

    def replica(self, name: str) -> psutil.Process:
        """The process of a deployment's replica; Ray calls it by its actor."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if f"ray::ServeReplica:default:{name}" in " ".join(process.cmdline()):
                    return process
        raise AssertionError(f"there is no replica {name}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_llama(path)
    return path


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What one mixed engine writes."""
    llm = LLM(str(model), **ENGINE)
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[Service]:
    service = Service(model)
    yield service
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(30) == 0


@pytest.mark.slow
def test_two_replicas_write_what_one_engine_writes(service: Service, expected: list[list[int]]) -> None:
    """And all full blocks of a prompt, whose last token is computed again, come from the other replica."""
    for prompt, tokens in zip(PROMPTS[:4], expected[:4], strict=True):
        assert service.ask(prompt) == (tokens, (len(prompt) - 1) // 4 * 4)
    short = httpx.post(f"{service.url}/completions", json={"model": "tiny", "prompt": [1, 2], "max_tokens": 1}, timeout=60)
    assert short.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    refused = httpx.post(f"{service.url}/completions", json={"model": "gpt-9", "prompt": PROMPTS[0]}, timeout=60)
    assert refused.status_code == 404


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_replica_that_is_killed_costs_no_later_answer(service: Service, expected: list[list[int]], victim: str) -> None:
    """Killed in the middle of traffic: who had an answer under way gets it, or an error; nobody waits for ever."""
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(service.ask, prompt) for prompt in PROMPTS]
        answers[1].result()
        service.replica(victim).kill()
        for answer, tokens in zip(answers, expected, strict=True):
            try:
                assert answer.result()[0] == tokens
            except httpx.HTTPError:
                assert victim == "decode-0"
    assert service.ask(PROMPTS[0])[0] == expected[0]
