"""Offline batches: no line is lost or doubled, whatever happens to the run; an answer is what the API answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from solutions.serving.app import create_app
from solutions.serving.async_engine import AsyncEngine
from solutions.serving.batches.answering import BatchStoppedError
from solutions.serving.batches.batch_files import URLS, AnswerFile, BatchRequest, LineError, read_requests
from solutions.serving.run_batch import main, run
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.real_server import MODEL
from solutions.tests.slow_cases import slow_after


def line(custom_id: Any = "a", **changes: Any) -> str:
    body = {"model": "fake", "prompt": "x", "max_tokens": 3}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body} | changes)


def written(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(each) for each in text.splitlines()]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("{", "Expecting property name"), ("[]", "must be a JSON object"), (line("a"), "an earlier line has the custom_id 'a'"),
        (line(""), "custom_id must be a string"), (line(7), "custom_id must be a string"),
        (line("b", method="GET"), "must be POST"),
        (line("b", url="/v1/models"), f"url must be one of {', '.join(URLS)}; got"),
        (line("b", body=[]), "body must be a JSON object"), (line("b", body={"stream": True}), "stream must be off"),
        (line("b", url="/v1/responses", body={"background": True}), "background must be off"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_by_its_number(second: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text(f"{line('a')}\n\n{second}\n{line('z')}\n")
    with pytest.raises(LineError, match=says) as error:
        read_requests(path)
    assert error.value.line == 3


def test_requests_are_read_in_order_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text("\n".join(line(name) for name in ("b", "ü", "a\u2028")))  # no line break at the end; one inside of a name
    assert [request.custom_id for request in read_requests(path)] == ["b", "ü", "a\u2028"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no requests"):
        read_requests(path)
    ran = byov("run-batch", "-i", str(path), "-o", str(tmp_path / "out"))
    assert (ran.returncode, ran.stderr.startswith(f"error: {path}: the file holds no requests")) == (1, True)
    path.write_bytes(b'{"custom_id": "\xff"}')
    with pytest.raises(LineError, match="'utf-8' codec"):
        read_requests(path)
    ran = byov("run-batch", "-i", str(path), "-o", str(tmp_path / "out"))
    assert (ran.returncode, ran.stderr.startswith(f"error: {path}, line 1: 'utf-8' codec")) == (1, True)


REQUESTS = [BatchRequest(name, "/v1/completions", {}) for name in ("a", "ü", "c")]


def test_whatever_an_earlier_run_left_no_answer_is_lost_or_doubled(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with AnswerFile(path, REQUESTS) as answers:
        for request in REQUESTS:
            answers.write(request.custom_id, {"response": {"text": "é\n"}})
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with AnswerFile(path, REQUESTS) as answers:
            assert len(answers.answered) == whole[:size].count(b"\n")
            for request in REQUESTS:
                if request.custom_id not in answers.answered:
                    answers.write(request.custom_id, {"response": {"text": "é\n"}})
        assert path.read_bytes() == whole


def test_files_that_are_not_ours_are_left_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for content, says in (
        ("a diary\n", "holds no answers"),
        ("[1]\n", "holds no answers"),
        ('{"custom_id": "z"}\n', "another batch"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=says):
            AnswerFile(path, REQUESTS)
        assert path.read_text() == content
    path.unlink()
    with AnswerFile(path, REQUESTS), pytest.raises(ValueError, match="another run writes to"):
        AnswerFile(path, REQUESTS)
    AnswerFile(path, REQUESTS).__exit__(None, None, None)  # the first one has let go of it


def run_on_fake(requests: list[BatchRequest], path: Path, at_once: int = 4, **settings: Any) -> None:
    async def work() -> None:
        app = create_app(AsyncEngine(FakeEngine(**settings)), ["fake"])
        async with app.router.lifespan_context(app):
            with AnswerFile(path, requests) as answers:
                await run(app, requests, answers, at_once)

    asyncio.run(work())


def test_answers_and_errors_are_the_apis(tmp_path: Path) -> None:
    path = tmp_path / "in"
    chat = {
        "url": "/v1/chat/completions",
        "body": {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    }
    bad = {"body": {"model": "fake", "prompt": "x", "temperature": -1}}
    vectors = {"url": "/v1/embeddings", "body": {"model": "fake", "input": ["x", "yz"], "dimensions": 2}}
    response = {"url": "/v1/responses", "body": {"model": "fake", "input": "x", "max_output_tokens": 2}}
    lines = [line("a"), line("b", **chat), line("c", **bad), line("d", body={"model": "no", "prompt": ""})]
    path.write_text("\n".join([*lines, line("e", **vectors), line("f", **response)]))
    run_on_fake(read_requests(path), tmp_path / "out")
    answers = {answer["custom_id"]: answer["response"] for answer in written(tmp_path / "out")}
    statuses = {name: answer["status_code"] for name, answer in answers.items()}
    assert statuses == {"a": 200, "b": 200, "c": 400, "d": 404, "e": 200, "f": 200}
    assert answers["a"]["body"]["choices"][0]["text"] == "abc"
    assert answers["b"]["body"]["choices"][0]["message"]["content"] == "ab"
    assert answers["c"]["body"]["error"]["param"] == "temperature"
    assert [each["embedding"] for each in answers["e"]["body"]["data"]] == [[1, 1], [2, 2]]  # what the fake engine answers
    assert answers["f"]["body"]["output"][0]["content"][0]["text"] == "ab"
    assert answers["f"]["body"]["store"] is False  # nobody can ask for it
    assert len({answer["request_id"] for answer in answers.values()}) == 6


def test_a_batch_reads_answers_as_its_flags_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With this parser of thoughts all that is said without a mark is one."""
    monkeypatch.setattr("solutions.core.engine.LLMEngine", lambda config: FakeEngine())
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    path, out = tmp_path / "in", tmp_path / "out"
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    lines = [line(name, url="/v1/chat/completions", body=body | more) for name, more in (("a", {}), ("b", tools))]
    path.write_text("\n".join(lines))
    flags = ["--reasoning-parser", "deepseek_r1", "--no-enable-auto-tool-choice", "--served-model-name", "fake"]
    assert main(["-i", str(path), "-o", str(out), *flags]) == 0
    answers = {answer["custom_id"]: answer["response"]["body"] for answer in written(out)}
    message = answers["a"]["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (None, "ab")
    assert answers["b"]["error"]["param"] == "tool_choice"
    for flag in ("--reasoning-parser", "--tool-call-parser"):
        with pytest.raises(SystemExit):
            main(["-i", str(path), "-o", str(out), flag, "telepathy"])
        assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("at_once", [1, 7])
def test_an_engine_that_fails_stops_the_run_and_the_next_one_goes_on(at_once: int, tmp_path: Path) -> None:
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_text("\n".join(line(f"r{number}") for number in range(20)))
    requests, last = read_requests(path), -1
    for fail_at in (4, 5):
        with pytest.raises(BatchStoppedError):
            run_on_fake(requests, out, at_once, fail_at=fail_at)
        done = len(written(out)) if out.read_text() else 0
        assert last < done < 20
        last = done
    run_on_fake(requests, out, at_once)
    answers = written(out)
    assert sorted(answer["custom_id"] for answer in answers) == sorted(request.custom_id for request in requests)
    assert {answer["response"]["body"]["choices"][0]["text"] for answer in answers} == {"abc"}


def test_a_request_that_fails_by_itself_stops_nobody_else(tmp_path: Path) -> None:
    """A bug in one answer (500) is that line's answer; a server that takes no requests any more (503) ends the run."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def answer(body: dict[str, Any]) -> JSONResponse:
        return JSONResponse({"error": {"message": "no"}}, body["status"], {"x-request-id": "r"})

    path, out = tmp_path / "in", tmp_path / "out"
    path.write_text("\n".join(line(str(status), body={"status": status}) for status in (200, 500, 400, 503)))
    requests = read_requests(path)
    with AnswerFile(out, requests) as answers, pytest.raises(BatchStoppedError):
        asyncio.run(run(app, requests, answers, 1))
    assert [(each["custom_id"], each["response"]["status_code"]) for each in written(out)] == [
        ("200", 200), ("500", 500), ("400", 400)
    ]  # fmt: skip


def test_where_a_queue_is_full_a_request_is_sent_again(tmp_path: Path) -> None:
    app, tries = FastAPI(), []

    @app.post("/v1/completions")
    async def answer(body: dict[str, Any]) -> JSONResponse:
        tries.append(body["prompt"])
        full = len(tries) % 2
        return JSONResponse({"error": {}} if full else {}, 429 if full else 200, {"x-request-id": "r", "retry-after": "0"})

    path, out = tmp_path / "in", tmp_path / "out"
    path.write_text("\n".join(line(name, body={"prompt": name}) for name in "abc"))
    requests = read_requests(path)
    with AnswerFile(out, requests) as answers:
        asyncio.run(run(app, requests, answers, 1))
    assert tries == ["a", "a", "b", "b", "c", "c"]
    assert [each["response"]["status_code"] for each in written(out)] == [200, 200, 200]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    path, out = tmp_path / "in", tmp_path / "out"
    body = {"model": MODEL, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    path.write_text("\n".join(line(f"r{n}", body=body | {"prompt": f"Number {n} is"}) for n in range(60)))
    command = [sys.executable, "-m", "solutions.serving.command", "run-batch", "-i", path, "-o", out, "--model", MODEL]
    command += ["--max-num-seqs", "4", "--max-model-len", "256", "--kv-cache-memory-bytes", "64M"]
    for how, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = out.read_bytes().count(b"\n") if out.exists() else 0
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not out.exists() or out.read_bytes().count(b"\n") < before + 8:
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(how)
        _, said = running.communicate(timeout=30)
        assert running.returncode == code, said
    assert "stopped: " in said
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout.startswith(
        "60 requests" if before == 0 else f"{60 - count(said)} requests answered, {count(said)} were"
    )
    answers = written(out)
    assert sorted(answer["custom_id"] for answer in answers) == sorted(f"r{n}" for n in range(60))
    assert all(answer["response"]["body"]["usage"]["completion_tokens"] == 30 for answer in answers)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == f"All 60 requests are answered in {out}\n"


def count(said: str) -> int:
    return int(said.split("stopped: ")[1].split(" of ")[0])


def byov(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "solutions.serving.command", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    slow_after(2, [
        (("sevre",), 1, "error: byov knows no command 'sevre'"), (("run-batch", "--help"), 0, "custom_id"),
        ((), 0, "usage: byov COMMAND"), (("--help",), 0, "run-batch"), (("bench", "-h"), 0, "usage: byov bench COMMAND"),
        (("bench", "x"), 1, "error: byov bench knows no command 'x'"),
        (("serve", "--help"), 0, "--port"),
        (("serve", "no-such-model", "--port", "0"), 1, "no-such-model"),
        (("run-batch", "-i", "nowhere", "-o", "out"), 1, "error: [Errno 2] No such file or directory: 'nowhere'"),
        (("run-batch", "-i", "x", "-o", "y", "--max-num-waiting", "3"), 2, "is for a server"),
    ]),
)  # fmt: skip
def test_the_command_finds_its_programs(words: tuple[str, ...], code: int, says: str) -> None:
    ran = byov(*words)
    assert (ran.returncode, says in ran.stdout + ran.stderr) == (code, True), ran
