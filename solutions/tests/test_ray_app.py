"""Replicas behind one endpoint: settings, the bridge to an application, and two engines of the real model under Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import psutil
import pytest

from solutions.core.ray_executor import NO_RAY
from solutions.serving.api_server import MAX_NUM_WAITING
from solutions.serving.app import create_app
from solutions.serving.async_engine import AsyncEngine
from solutions.serving.replicas.replica_settings import parse_settings
from solutions.tests.fake_engine import FakeEngine

pytest.importorskip("ray", reason='needs the extra [ray]: pip install -e ".[ray]"')
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from solutions.serving.replicas.ray_app import app, main
from solutions.serving.replicas.ray_replica import HttpCall, Replica, answer

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m"
GREEDY = {"model": MODEL, "temperature": 0.0}
FOREVER = 400


@pytest.mark.slow
def test_a_missing_ray_is_named(tmp_path: Path) -> None:
    """On one line, also where there is Ray without Serve."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "solutions.serving.replicas.ray_app", f"model={MODEL}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (1, f"error: {NO_RAY}\n")
    assert "extra [ray]" in NO_RAY


# -------------------------------------------------------------------------------------------------------- settings


def test_settings_are_flags_by_name() -> None:
    given = {"model": "gpt2", "replicas": "3", "max_num_seqs": "4", "enable_prefix_caching": "false", "enforce_eager": "True"}
    settings, config = parse_settings({**given, "kv_cache_memory_bytes": "1MiB", "router": "round_robin", "api_key": "secret"})
    assert (settings.replicas, settings.most_replicas, settings.router, settings.api_key) == (3, 3, "round_robin", ["secret"])
    assert (config.model, config.max_num_seqs, config.kv_cache_memory_bytes) == ("gpt2", 4, 1 << 20)
    assert (config.enable_prefix_caching, config.enforce_eager, config.max_num_waiting) == (False, True, MAX_NUM_WAITING)
    from_yaml = {**given, "replicas": 3, "max_num_seqs": 4, "enable_prefix_caching": False, "enforce_eager": True}
    assert parse_settings(from_yaml) == parse_settings(given)
    assert parse_settings({"served_model_name": ["a", "b"]})[0].served_model_name == ["a", "b"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modell": "x"}, "there is no setting 'modell'; there are .*model, "),
        ({"host": "0.0.0.0"}, "there is no setting 'host'"),
        ({"replicas": "two"}, "replicas: invalid int value: 'two'"),
        ({"replicas": "0"}, "replicas must be more than 0"),
        ({"dtype": "int3"}, "dtype: invalid choice: 'int3'"),
        ({"router": "random"}, "router: invalid choice"),
        ({"enforce_eager": "maybe"}, "enforce_eager must be true or false, got 'maybe'"),
        ({"replicas": 2, "max_replicas": 3}, "replicas is a fixed number; min_replicas and max_replicas let it change"),
        ({"min_replicas": 3, "max_replicas": 2}, r"min_replicas \(3\) must be at most max_replicas \(2\)"),
        ({"max_imbalance": -1}, "max_imbalance must be at least 0"),
        ({"tensor_parallel_size": 2, "device": "cpu"}, "on CPUs a replica has one rank"),
        ({"distributed_executor_backend": "ray"}, "so use mp"),
    ],
)
def test_a_wrong_setting_is_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings(args)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["replicas"], "'replicas' is no setting; write NAME=VALUE"),
        (["nonsense=1"], "there is no setting 'nonsense'"),
        (["--port", "70000"], "--port must be 0 to 65535"),
        (["model=/nowhere"], "/nowhere"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_replicas_are_fixed_or_follow_the_load() -> None:
    def replicas_of(args: dict[str, Any]) -> Any:
        return app(args)._bound_deployment.init_args[0]._bound_deployment

    fixed = replicas_of({"replicas": "2", "cores_per_replica": "1"})
    assert fixed.num_replicas == 2
    assert fixed.ray_actor_options["num_cpus"] == 1
    assert fixed.ray_actor_options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"
    scaling = replicas_of({"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 7})._deployment_config
    found = scaling.autoscaling_config
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (1, 4, 7)


def test_a_failed_engine_makes_its_replica_unhealthy() -> None:
    check = Replica.check_health
    asyncio.run(check(SimpleNamespace(engine=SimpleNamespace(is_running=True))))
    with pytest.raises(RuntimeError, match="the engine has failed"):
        asyncio.run(check(SimpleNamespace(engine=SimpleNamespace(is_running=False))))


# ------------------------------------------------------------------------------------- the bridge to an application


def run(fake: FakeEngine, scenario: Callable[[Any], Any]) -> None:
    async def main() -> None:
        application = create_app(AsyncEngine(fake), ["fake"], None)
        async with application.router.lifespan_context(application):
            await asyncio.wait_for(scenario(application), 10)

    asyncio.run(main())


def call(body: str, path: str = "/v1/completions") -> HttpCall:
    return HttpCall("POST", path, b"", [(b"content-type", b"application/json")], body.encode())


def test_an_answer_comes_in_pieces() -> None:
    async def scenario(application: Any) -> None:
        whole = [piece async for piece in answer(application, call('{"model": "fake", "prompt": "x", "max_tokens": 3}'))]
        assert whole[0][0] == 200
        assert b'"text":"abc"' in b"".join(whole[1:])
        body = '{"model": "fake", "prompt": "x", "max_tokens": 50, "stream": true}'
        events = [piece async for piece in answer(application, call(body))]
        assert (b"content-type", b"text/event-stream; charset=utf-8") in events[0][1]
        assert len(events) > 10  # as they come
        assert b"".join(events[1:]).endswith(b"data: [DONE]\n\n")
        refused = [piece async for piece in answer(application, call("{"))]
        assert refused[0][0] == 400
        missing = [piece async for piece in answer(application, call("", "/nowhere"))]
        assert missing[0][0] == 404

    run(FakeEngine(), scenario)


@pytest.mark.parametrize("stream", ["true", "false"])
def test_whoever_leaves_aborts(stream: str) -> None:
    fake = FakeEngine()

    async def scenario(application: Any) -> None:
        body = f'{{"model": "fake", "prompt": "x", "max_tokens": 4000, "stream": {stream}}}'

        async def read() -> None:
            async for _ in answer(application, call(body)):
                pass

        reader = asyncio.create_task(read())
        while fake.num_steps < 3:
            await asyncio.sleep(0.002)
        reader.cancel()
        await asyncio.wait([reader])
        while not fake.aborted:
            await asyncio.sleep(0.002)
        assert not fake.running

    run(fake, scenario)


# ------------------------------------------------------------------------------------------------ under Ray Serve


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of two engines that run one request at a time."""
    settings = ["replicas=2", "max_model_len=512", "max_num_seqs=1", "cores_per_replica=1", "kv_cache_memory_bytes=128MiB"]
    command = [sys.executable, "-m", "solutions.serving.replicas.ray_app", "--host", "127.0.0.1", "--port", "0", *settings]
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # a cluster of its own, whatever else runs here
    server = subprocess.Popen([*command, f"model={MODEL}"], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    lines: list[str] = []
    while not (found := re.search(r"Serving at (http://\S+/v1)", lines[-1] if lines else "")):
        lines.append(server.stdout.readline())
        assert lines[-1], "the server did not start:\n" + "".join(lines)
    yield found[1]
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    assert replicas() == []


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def replicas() -> list[psutil.Process]:
    """Their processes, which the server has started; Ray calls a process by its actor."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::ServeReplica:default:Replica" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_completions_chat_and_streams(client: openai.OpenAI) -> None:
    answer = client.completions.create(**GREEDY, prompt="The capital of France is", max_tokens=8)
    assert "Paris" in answer.choices[0].text
    messages = [{"role": "user", "content": "Name three colours."}]
    whole = client.chat.completions.create(**GREEDY, messages=messages, max_tokens=8).choices[0].message.content
    chunks = list(client.chat.completions.create(**GREEDY, messages=messages, max_tokens=8, stream=True))
    assert len(chunks) > 4
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole != ""
    assert [model.id for model in client.models.list()] == [MODEL]


@pytest.mark.slow
def test_errors_are_those_of_the_server(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", max_tokens=0)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="x")
    for body in (b"", b"{", b"[" * 100_000, b"\xff"):
        response = httpx.post(f"{url}/completions", content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (400, 400)
    assert httpx.get(url + "/nowhere").status_code == 404


@pytest.mark.slow
def test_a_prompt_goes_where_its_beginning_is_cached(client: openai.OpenAI) -> None:
    beginnings = [f"{name} went to the market to buy some fruit and to sell some cloth. " * 4 for name in ("Ann", "Bob", "Cy")]

    def cached(beginning: str, end: str) -> int:
        answer = client.completions.create(**GREEDY, prompt=beginning + end, max_tokens=1)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert all(cached(beginning, "Then") < 16 for beginning in beginnings)
    assert all(cached(beginning, end) >= 48 for end in ("So", "But", "At night") for beginning in beginnings)


@pytest.mark.slow
@pytest.mark.alone
def test_a_client_that_leaves_makes_room(client: openai.OpenAI, url: str) -> None:
    """An engine runs one request at a time, so whoever comes next would wait for all that is left of the last one."""
    forever = {"model": MODEL, "max_tokens": FOREVER, "ignore_eos": True}
    streams = [client.completions.create(model=MODEL, prompt=p, max_tokens=FOREVER, stream=True,
                                         extra_body={"ignore_eos": True}) for p in ("One", "Two")]  # fmt: skip
    for stream in streams:
        next(iter(stream))
        stream.close()
    for prompt in ("Three", "Four"):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/completions", json={**forever, "prompt": prompt}, timeout=0.7)
    start = time.monotonic()
    client.completions.create(**GREEDY, prompt="Five", max_tokens=1)
    client.completions.create(**GREEDY, prompt="Six", max_tokens=1)
    assert time.monotonic() - start < 2


def end_of(stream: Iterator[Any]) -> str:
    """The reason for which it finished, or its error."""
    try:
        return next(chunk.choices[0].finish_reason for chunk in stream if chunk.choices[0].finish_reason)
    except openai.APIError as error:
        return str(error)


@pytest.mark.slow
def test_the_service_survives_a_replica(client: openai.OpenAI) -> None:
    """Whose client had half of an answer learns of it; nobody else does, not even who waited there."""
    request = {"model": MODEL, "max_tokens": FOREVER, "stream": True, "extra_body": {"ignore_eos": True}}
    streams = [iter(client.completions.create(**request, prompt=prompt)) for prompt in ("One", "Two")]
    for stream in streams:
        next(stream)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(client.completions.create, **GREEDY, prompt=p, max_tokens=3) for p in ("Three", "Four")]
        time.sleep(0.5)
        victim, _ = replicas()
        victim.kill()
        ends = [end_of(stream) for stream in streams]
        assert [len(answer.result().choices) for answer in waiting] == [1, 1]
    assert sorted(ends) == ["length", "the replica that answered this request has died"]
    for number in range(6):
        prompt = f"{number} is a number and"
        assert client.completions.create(**GREEDY, prompt=prompt, max_tokens=2).usage.completion_tokens == 2
