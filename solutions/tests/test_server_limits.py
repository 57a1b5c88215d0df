"""What the server bounds: bodies, queues, keys, pages in browsers, a hanging step, and the time after SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from solutions.batching.sampling_params import StructuredOutput
from solutions.batching.scheduler_config import QueueFullError
from solutions.core.structured.grammar_queue import CompilingStoppedError
from solutions.serving.async_engine import AsyncEngine
from solutions.serving.guards import API_KEY_VARIABLE, read_api_keys
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import FOREVER, ROOT, body, program, serve, until
from solutions.tests.slow_cases import slow_after

# ------------------------------------------------------------------------------------------------------------ bodies


def test_a_large_body_is_413_and_is_not_read_to_its_end() -> None:
    with serve(FakeEngine(), max_body_bytes=1000) as url:
        for size, status in ((1000, 200), (1001, 413)):
            content = json.dumps(body(max_tokens=1, prompt="x"))
            padded = content + " " * (size - len(content))
            response = httpx.post(f"{url}/v1/completions", content=padded, headers={"Content-Type": "application/json"})
            assert response.status_code == status
        assert response.json()["error"]["message"] == "the body has more than 1000 bytes"
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n{")
            assert raw.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_say_its_size_is_counted() -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"model": "fake", "prompt": "'
        for _ in range(100):
            yield b"x" * 100

    with serve(FakeEngine(), max_body_bytes=1000) as url:
        response = httpx.post(f"{url}/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert "the body has more than 1000 bytes" in response.json()["error"]["message"]
        assert httpx.post(f"{url}/v1/completions", json=body()).status_code == 200


# ------------------------------------------------------------------------------------------------------- connections

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10)


@pytest.mark.alone
@pytest.mark.parametrize(
    "start",
    slow_after(2, [HEAD + b"Content-Length: 100\r\n\r\n{", b"", b"GET /", HEAD, HEAD + b"Content-Length: 100\r\n\r\n"]),
)
def test_a_request_that_trickles_in_is_given_up_and_holds_nobody_up(start: bytes) -> None:
    with serve(FakeEngine(), connection_timeout=0.3) as url, connect(url) as slow:
        slow.sendall(start)
        assert httpx.post(f"{url}/v1/completions", json=body()).status_code == 200
        began = time.monotonic()
        for byte in b"a" * 100:
            try:
                slow.sendall(bytes([byte]) if start else b"")
            except OSError:
                break
            if select.select([slow], [], [], 0.02)[0]:
                break
        assert time.monotonic() - began < 1
        answer = slow.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "the request did not arrive within 0.3 s"
        with contextlib.suppress(ConnectionResetError):  # the end of a connection that had bytes left unread
            assert slow.recv(1000) == b""


@pytest.mark.alone
def test_a_second_request_has_the_same_limit_and_a_pause_between_them_has_none() -> None:
    with serve(FakeEngine(), connection_timeout=0.3) as url, connect(url) as raw:
        for _ in range(2):
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.5)
        raw.sendall(b"GET /hea")
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.alone
def test_an_answer_may_take_longer_than_a_request_may() -> None:
    gate = threading.Event()
    with serve(FakeEngine(gate=gate), connection_timeout=0.2) as url:
        threading.Timer(0.6, gate.set).start()
        assert httpx.post(f"{url}/v1/completions", json=body()).status_code == 200


@pytest.mark.alone
def test_a_client_that_reads_nothing_is_cut_off_and_its_request_aborted() -> None:
    fake = FakeEngine()
    with serve(fake, connection_timeout=0.5) as url, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        content = json.dumps(body(max_tokens=FOREVER, n=100, stream=True)).encode()
        raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        until(lambda: fake.aborted)
        assert not fake.running
        assert httpx.get(f"{url}/health").status_code == 200


# -------------------------------------------------------------------------------------------------------------- keys


def test_keys_come_from_the_command_line_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nin-file\n\n  another  # Ann's\nin-file\n")
    monkeypatch.setenv(API_KEY_VARIABLE, "of-env and-more")
    assert read_api_keys(["given"], file) == ["given", "in-file", "another", "of-env", "and-more"]
    monkeypatch.delenv(API_KEY_VARIABLE)
    assert read_api_keys([], None) == []
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_api_keys([], file)
    for wrong in ("", "two words", "schlüssel", "x" * 129):
        with pytest.raises(ValueError, match="printable ASCII"):
            read_api_keys([wrong], None)


def recorder(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeEngine, list[str | None]]:
    """An engine, and the salts of the prompts that come to it."""
    fake, salts = FakeEngine(), []
    prepare = fake.prepare

    def record(name: str, prompt: dict[str, Any], *rest: Any) -> Any:
        salts.append(prompt.get("cache_salt"))
        return prepare(name, prompt, *rest)

    monkeypatch.setattr(fake, "prepare", record)
    return fake, salts


def test_what_a_key_has_cached_no_other_key_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, salts = recorder(monkeypatch)
    with serve(AsyncEngine(fake), ["one", "two"]) as url:
        for key in ("one", "two", "one"):
            for salt in (None, "mine"):
                headers = {"Authorization": f"Bearer {key}"}
                assert httpx.post(f"{url}/v1/completions", json=body(cache_salt=salt), headers=headers).status_code == 200
    assert salts[:2] == salts[4:]
    assert len(set(salts[:4])) == 4
    assert all(salt and "one" not in salt and "two" not in salt for salt in salts)  # a log of salts gives no key away


def test_without_keys_a_salt_is_the_clients_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, salts = recorder(monkeypatch)
    with serve(AsyncEngine(fake)) as url:
        for salt in (None, "mine"):
            assert httpx.post(f"{url}/v1/completions", json=body(cache_salt=salt)).status_code == 200
    assert salts == [None, "mine"]


def test_load_balancers_need_no_key_and_prometheus_does() -> None:
    with serve(FakeEngine(), ["one"]) as url:
        statuses = {path: httpx.get(url + path).status_code for path in ("/health", "/ready", "/metrics", "/version")}
    assert statuses == {"/health": 200, "/ready": 200, "/metrics": 401, "/version": 401}


# ------------------------------------------------------------------------------------------------- pages and ids


def test_pages_of_other_origins_are_let_in_by_name_only() -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    ask |= {"Access-Control-Request-Headers": "authorization"}
    with serve(FakeEngine(), ["key"], allowed_origins=["https://a.example"]) as url:
        answer = httpx.options(f"{url}/v1/completions", headers=ask)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
        assert httpx.options(f"{url}/v1/completions", headers=ask | {"Origin": "https://b.example"}).status_code == 400
    with serve(FakeEngine()) as url:
        answer = httpx.post(f"{url}/v1/completions", json=body(), headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("x" * 129, False), ("two words", False), (None, False)])
def test_every_answer_has_a_request_id(given: str | None, kept: bool) -> None:
    with serve(FakeEngine(), ["key"]) as url:
        for path, status in (("/health", 200), ("/v1/models", 401)):
            answer = httpx.get(url + path, headers={} if given is None else {"X-Request-Id": given})
            assert answer.status_code == status
            assert (answer.headers["x-request-id"] == given) == kept
            assert len(answer.headers["x-request-id"]) <= 128


# ------------------------------------------------------------------------------------------------------------- queue


def test_a_queue_that_is_full_of_tokens_is_429_and_is_counted() -> None:
    fake = FakeEngine()
    with serve(AsyncEngine(fake, max_waiting_tokens=100)) as url:
        fake.num_waiting_tokens = 90
        assert httpx.post(f"{url}/v1/completions", json=body(prompt="x" * 10)).status_code == 200
        refused = httpx.post(f"{url}/v1/completions", json=body(prompt="x" * 11))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "90 tokens of prompts are waiting, at most 100 may" in refused.json()["error"]["message"]
        several = httpx.post(f"{url}/v1/completions", json=body(prompt=["x", "x" * 11]))
        assert several.status_code == 429
        until(lambda: not fake.running)  # the first of the two was taken back
        fake.num_waiting_tokens = 0
        assert httpx.post(f"{url}/v1/completions", json=body(prompt="x" * 500)).status_code == 200
        assert 'vllm:admission_rejections_total{model_name="fake",reason="tokens"} 2.0' in httpx.get(f"{url}/metrics").text


def test_a_queue_that_is_full_of_requests_is_counted() -> None:
    fake = FakeEngine(max_waiting=0)
    with serve(AsyncEngine(fake)) as url:
        assert httpx.post(f"{url}/v1/completions", json=body()).status_code == 429
        assert 'reason="requests"} 1.0' in httpx.get(f"{url}/metrics").text


def forms(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Future[Any], str | None]]:
    """Let the fake engine take forms of answers, which it never compiles: what is asked for, and by whom."""
    asked: list[tuple[Future[Any], str | None]] = []

    def compile_form(wanted: StructuredOutput, client: str | None = None) -> Future[Any]:
        asked.append((Future(), client))
        return asked[-1][0]

    monkeypatch.setattr(fake.input, "no_structure", None)
    monkeypatch.setattr(fake.input, "compile", compile_form)
    return asked


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("structured_output takes more than 10 s to compile"), 400, "guided_regex takes more than 10 s to compile"),
        (QueueFullError("64 forms of answers wait", "forms"), 429, "64 forms of answers wait"),
        (CompilingStoppedError("the engine is shutting down"), 503, "the engine is shutting down"),
    ],
)
def test_a_form_that_waits_holds_nobody_up_and_its_end_is_told(
    error: Exception, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeEngine()
    asked = forms(fake, monkeypatch)
    answers: list[httpx.Response] = []
    with serve(AsyncEngine(fake), ["secret"]) as url:
        key = {"Authorization": "Bearer secret"}

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/completions", json=body(guided_regex="a+"), headers=key, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(20)]  # more than there are threads for long prompts
        for thread in threads:
            thread.start()
        until(lambda: len(asked) == 20)
        chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert httpx.post(f"{url}/v1/chat/completions", json=chat, headers=key, timeout=10).status_code == 200
        assert answers == []
        for future, client in asked:
            assert client == hashlib.sha256(b"secret").hexdigest()[:32]  # not the address, which others may share
            future.set_exception(error)
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {status}
        assert {answer.json()["error"]["message"] for answer in answers} == {message}
        assert ('reason="forms"} 20.0' in httpx.get(f"{url}/metrics", headers=key).text) == (status == 429)
        assert len(fake.submitted) == 1  # the chat


def test_a_client_that_leaves_does_not_wait_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine()
    asked = forms(fake, monkeypatch)
    with serve(AsyncEngine(fake)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body(guided_regex="a+"), timeout=httpx.Timeout(10, read=0.5))
        until(lambda: [future.cancelled() for future, _ in asked] == [True])
        assert asked[0][1] == "127.0.0.1"
        assert fake.submitted == []


def test_a_form_is_not_compiled_for_a_prompt_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine()
    asked = forms(fake, monkeypatch)
    with serve(AsyncEngine(fake)) as url:
        refused = httpx.post(f"{url}/v1/completions", json=body(guided_regex="a+", prompt="x" * 5000))
        assert refused.status_code == 400
        assert asked == []


# --------------------------------------------------------------------------------------------------------- life cycle


def test_a_step_that_hangs_ends_the_engine() -> None:
    fake = FakeEngine(gate=threading.Event())
    engine = AsyncEngine(fake, stall_seconds=0.2)
    deaths: list[bool] = []
    engine.on_death = lambda: deaths.append(True)
    with serve(engine) as url:
        answer = httpx.post(f"{url}/v1/completions", json=body(), timeout=10)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the engine hangs; the server's log has more")
        assert deaths == [True]
        assert [httpx.get(url + path).status_code for path in ("/health", "/ready")] == [503, 503]
    fake.gate.set()  # the thread that was given up ends after all, and nobody is told twice
    until(lambda: not engine._thread.is_alive())
    assert deaths == [True]


def test_a_long_wait_is_no_stall() -> None:
    async def main() -> None:
        engine = AsyncEngine(FakeEngine(), stall_seconds=0.05)
        engine.start()
        await asyncio.sleep(1.3)  # longer than the watch's turn
        assert engine.is_running
        await asyncio.to_thread(engine.shutdown)

    asyncio.run(main())


@pytest.mark.slow
def test_a_draining_server_finishes_and_is_not_ready_and_a_second_signal_aborts() -> None:
    with program("--shutdown-timeout", "30") as (process, url):
        with (
            httpx.Client(base_url=url.removesuffix("/v1")) as kept,
            openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=20) as client,
        ):
            assert kept.get("/ready").status_code == 200
            stream = client.completions.create(model="fake", prompt="hi", max_tokens=FOREVER, stream=True)
            assert next(stream).choices[0].text.startswith("a")
            process.send_signal(signal.SIGTERM)
            for _ in range(100):
                next(stream)  # it goes on
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/models")  # nobody new comes in
            process.send_signal(signal.SIGTERM)
            with pytest.raises((httpx.HTTPError, openai.APIError)):
                list(stream)
        process.wait(20)


@pytest.mark.slow
def test_the_log_in_json_has_a_line_for_each_request() -> None:
    with program("--log-format", "json") as (process, url):
        httpx.get(f"{url}/models", headers={"X-Request-Id": "mine"})
        httpx.get(f"{url}/nowhere", headers={"X-Request-Id": "lost"})
        process.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in process.stderr]
    told = [(line["request_id"], line["path"], line["status"]) for line in lines if line["message"] == "request"]
    assert told == [("mine", "/v1/models", 200), ("lost", "/v1/nowhere", 404)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-body-bytes", "0"], "--max-body-bytes must be more than 0"),
        (["--max-waiting-tokens", "-1"], "--max-waiting-tokens must be more than 0"),
        (["--connection-timeout", "0"], "--connection-timeout must be more than 0"),
        (["--stall-timeout", "0"], "--stall-timeout must be more than 0"),
        (["--api-key", ""], "an API key has 1 to 128 printable ASCII characters"),
        (["--api-key-file", "/no/such/file"], "/no/such/file"),
    ],
)
def test_a_wrong_flag_is_one_clear_error(flags: list[str], message: str) -> None:
    command = [sys.executable, "-m", "solutions.serving.api_server", "--port", "0", "--model", "no-such-model", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr
