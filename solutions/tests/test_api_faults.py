"""The server when something goes wrong: clients that leave, full queues, a dying engine, wrong keys, a taken port.

The server runs in a thread of the test over an engine whose steps the test controls; what concerns the start of the
program runs in a process of its own.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from solutions.serving.api_server import bind
from solutions.serving.async_engine import AsyncEngine
from solutions.tests.fake_engine import FakeEngine, letter
from solutions.tests.fake_server import FOREVER, ROOT, body, program, serve, until

HI = [{"role": "user", "content": "hi"}]


def test_the_alphabet_comes_through() -> None:
    """The fake engine's answers are known, so this is the truth about indices, n and several prompts."""
    with serve(FakeEngine()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        answer = client.completions.create(model="fake", prompt=["x", "yz"], n=2, max_tokens=3)
        assert [(c.index, c.text) for c in answer.choices] == [(0, "abc"), (1, "bcd"), (2, "abc"), (3, "bcd")]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)
        chunks = client.completions.create(model="fake", prompt=["x", "yz"], n=2, max_tokens=3, stream=True)
        texts = [""] * 4
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            texts[choice.index] += choice.text
        assert texts == ["abc", "bcd"] * 2


def test_logprobs_of_partial_characters_and_of_impossible_tokens() -> None:
    with serve(FakeEngine()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        answer = client.chat.completions.create(model="fake", messages=HI, max_tokens=1, logprobs=True, top_logprobs=1)
        entry = answer.choices[0].logprobs.content[0]
        assert (entry.token, entry.logprob, entry.bytes) == ("a", -9999.0, [ord("a")])  # JSON has no -inf
        assert [(top.token, top.logprob, top.bytes) for top in entry.top_logprobs] == [("\ufffd", -0.25, [195])]
        plain = client.completions.create(model="fake", prompt="x", max_tokens=2, logprobs=1).choices[0].logprobs
        assert plain.top_logprobs == [{"\ufffd": -0.25, letter(0, i): -9999.0} for i in range(2)]
        assert plain.text_offset == [0, 1]


# ---------------------------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request(stream: bool) -> None:
    fake = FakeEngine()
    with serve(fake) as url, httpx.Client(base_url=url, timeout=10) as client:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as raw:
            content = json.dumps(body(prompt=["a", "b"], max_tokens=FOREVER, stream=stream)).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
            )
            raw.sendall(head.encode() + b"\r\n\r\n" + content)
            until(lambda: len(fake.running) == 2 and fake.num_steps > 3)
        until(lambda: not fake.running)
        assert len(fake.aborted) == 2
        assert client.post("/v1/completions", json=body()).json()["choices"][0]["text"] == "abc"


def test_a_client_that_leaves_before_its_turn_frees_its_request() -> None:
    fake = FakeEngine(gate=threading.Event())
    bridge = AsyncEngine(fake)
    with serve(bridge) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json={"model": "fake", "messages": HI, "stream": False}, timeout=0.3)
        assert len(fake.running) == 1
        until(lambda: not bridge._streams)  # the server has noticed
        fake.gate.set()
        until(lambda: fake.aborted)
        assert fake.num_steps <= 2  # the step that ran, and at most one more


# ---------------------------------------------------------------------------------------------- back-pressure, faults


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_429_and_recovers(stream: bool) -> None:
    fake = FakeEngine(max_waiting=1)
    with serve(fake) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        first = client.completions.create(model="fake", prompt="hi", max_tokens=FOREVER, stream=True)
        assert next(first).choices[0].text.startswith("a")
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="fake", prompt="hi", stream=stream)
        assert caught.value.body["code"] == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        first.close()
        until(lambda: not fake.running)
        assert client.completions.create(model="fake", prompt="hi", max_tokens=2).choices[0].text == "ab"


def test_the_engine_dies() -> None:
    fake = FakeEngine(fail_at=5)
    with serve(fake) as url, httpx.Client(base_url=url, timeout=10) as client:
        assert client.get("/health").status_code == 200
        streamed = client.post("/v1/completions", json=body(max_tokens=FOREVER, stream=True))
        assert streamed.status_code == 200  # it had begun
        events = streamed.text.split("\n\n")
        assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-3]) == "abcd"
        assert json.loads(events[-3][6:])["error"]["code"] == 503
        assert events[-2:] == ["data: [DONE]", ""]
        assert "/secret" not in streamed.text
        assert client.get("/health").status_code == 503
        later = client.post("/v1/completions", json=body())
        assert later.status_code == 503
        assert later.json()["error"]["type"] == "server_error"


def test_the_engine_dies_under_a_request_that_is_not_streamed() -> None:
    with serve(FakeEngine(fail_at=5)) as url:
        response = httpx.post(f"{url}/v1/completions", json=body(max_tokens=FOREVER))
        assert response.status_code == 503
        assert "/secret" not in response.text


def test_a_bug_is_a_500_without_details(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine()
    monkeypatch.setattr(fake, "prepare", lambda *_: {}["a bug in /secret/path"])
    with serve(fake) as url:
        response = httpx.post(f"{url}/v1/completions", json=body())
        assert (response.status_code, response.json()["error"]["message"]) == (500, "internal server error")
        assert httpx.get(f"{url}/health").status_code == 200


def test_health_answers_while_a_step_runs() -> None:
    fake = FakeEngine(gate=threading.Event())
    with serve(fake) as url:
        running = threading.Thread(target=httpx.post, args=(f"{url}/v1/completions",), kwargs={"json": body()})
        running.start()
        assert fake.in_step.wait(5)
        assert httpx.get(f"{url}/health", timeout=2).status_code == 200
        fake.gate.set()
        running.join(5)


# ------------------------------------------------------------------------------------------------------------- keys


def test_api_keys_guard_everything_but_health() -> None:
    with serve(FakeEngine(), ["first-key", "second-key"]) as url, httpx.Client(base_url=url) as client:
        for key in ("first-key", "second-key"):
            good = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            assert good.completions.create(model="fake", prompt="hi", max_tokens=2).choices[0].text == "ab"
        for key in ("wrong", "first-ke", "first-key2", "schlüssel".encode().decode("latin-1")):
            response = client.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode("latin-1")})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        for path in ("/v1/models", "/openapi.json", "/docs", "/nowhere", "/v1/completions"):
            assert client.get(path).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Basic first-key"}).status_code == 401
        assert client.get("/health").status_code == 200


# ------------------------------------------------------------------------------------------------------- the program


def run_program(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "solutions.serving.api_server", "--host", "127.0.0.1", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_taken_port_is_one_line_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = run_program("--port", str(port), "--model", "no-such-model")  # the port comes first
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == f"error: port {port} is in use; choose another with --port or stop what listens there\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--port", "70000"), "--port"),
        (("--host", "no.such.host.invalid"), "--host"),
        (("--port", "0", "--model", "no-such-model"), "no-such-model"),
        (("--port", "0", "--model", "gpt2", "--load-format", "dummy", "--max-model-len", "5000"), "max_model_len"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(flags: tuple[str, ...], names: str) -> None:
    run = run_program(*flags)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert names in run.stderr


def test_the_port_is_asked_for_before_torch_is_imported() -> None:
    code = "import sys; from solutions.serving import api_server; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_only_one_of_two_servers_gets_a_port() -> None:
    first = bind("127.0.0.1", 0)
    with first, pytest.raises(OSError, match="is in use"):
        bind("127.0.0.1", first.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("max_tokens", "timeout", "finish"), [(300, "30", "length"), (FOREVER, "1", None)])
def test_sigterm_lets_requests_finish_for_a_time(max_tokens: int, timeout: str, finish: str | None) -> None:
    with program("--shutdown-timeout", timeout) as (process, url):
        with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=20) as client:
            stream = client.completions.create(model="fake", prompt="hi", max_tokens=max_tokens, stream=True)
            assert next(stream).choices[0].text.startswith("a")
            process.send_signal(signal.SIGTERM)
            reason = None
            try:
                for chunk in stream:
                    reason = chunk.choices[0].finish_reason
            except (httpx.HTTPError, openai.APIError):
                assert finish is None
            assert reason == finish
        process.wait(10)
