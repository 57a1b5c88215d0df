"""Files and batches over HTTP, with OpenAI's client: no line is lost or doubled, whatever happens to the server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from solutions.serving.api_server import parse_flags
from solutions.serving.batches import batch_runner, batch_store
from solutions.serving.batches.batch_store import BatchStore
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import program, serve, until


def line(custom_id: str = "a", url: str = "/v1/completions", **fields: Any) -> str:
    body = {"model": "fake", "prompt": "x", "max_tokens": 3} | fields
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


@contextmanager
def served(
    folder: Path, engine: FakeEngine | None = None, keys: list[str] | None = None, max_file_bytes: int = 1 << 20
) -> Iterator[Callable[[str], openai.OpenAI]]:
    """A server that keeps its files in a folder; makes clients of it by their keys."""
    engine, store = engine or FakeEngine(), BatchStore(folder, max_file_bytes)
    engine.config.scheduling_policy = "priority"
    with serve(engine, keys, batches=store) as url:
        yield lambda key: client_at(url, key)


def client_at(url: str, key: str = "k") -> openai.OpenAI:
    return openai.OpenAI(base_url=url.removesuffix("/v1") + "/v1", api_key=key, max_retries=0, timeout=30)


def start(client: openai.OpenAI, *lines: str, endpoint: str = "/v1/completions", **fields: Any) -> openai.types.Batch:
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def ended(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    until(lambda: client.batches.retrieve(batch_id).status in batch_store.ENDED, 30)
    return client.batches.retrieve(batch_id)


def content(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [] if file_id is None else [json.loads(each) for each in client.files.content(file_id).text.splitlines()]


def test_a_file_is_kept_until_it_is_deleted(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 300 + b"\r\n--"
    with served(tmp_path) as client_of, client_of("k") as client:
        file = client.files.create(file=("dir/ä.jsonl", raw), purpose="batch")
        assert (file.bytes, file.filename, file.purpose, file.object) == (len(raw), "dir/ä.jsonl", "batch", "file")
        second = client.files.create(file=b"{}", purpose="batch")
        assert client.files.content(file.id).read() == raw
        assert client.files.retrieve(file.id) == file
        assert [each.id for each in client.files.list()] == [second.id, file.id]
        assert [each.id for each in client.files.list(limit=1)] == [second.id, file.id]  # the client asks for the next page
        assert client.files.list(purpose="batch_output").data == []
    with served(tmp_path) as client_of, client_of("k") as client:  # another server
        assert client.files.content(file.id).read() == raw
        assert client.files.delete(file.id).deleted
        for use in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                use(file.id)
        assert [each.id for each in client.files.list()] == [second.id]
    assert {path.name for path in (tmp_path / "shared" / "files").iterdir()} == {f"{second.id}.json", f"{second.id}.content"}


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "secret.json"
    outside.write_text('{"id": "secret", "purpose": "batch"}')
    folder = tmp_path / "store"
    with served(folder) as client_of, client_of("k") as client:
        file = client.files.create(file=("../../../evil", b"x"), purpose="batch")
        names = [
            "../../../secret",
            "..%2F..%2F..%2Fsecret",
            "/etc/passwd",
            "file-" + "0" * 32,
            f"{file.id}.json",
            "..",
            "file-*",
        ]
        for name in names:
            path = str(client.base_url) + "files/" + name
            for response in (httpx.get(path), httpx.get(path + "/content"), httpx.delete(path)):
                assert response.status_code in (404, 405), (name, response.text)
            with pytest.raises(openai.BadRequestError, match="No file for batches"):
                client.batches.create(input_file_id=name, endpoint="/v1/completions", completion_window="24h")
    assert outside.exists()
    assert not list(tmp_path.rglob("*evil*"))


def test_limits_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_store, "MAX_FILES", 2)
    with served(tmp_path, max_file_bytes=100_000) as client_of, client_of("k") as client:
        client.files.create(file=b"x" * 100_000, purpose="batch")
        for size in (100_001, 200_000):
            with pytest.raises(openai.APIStatusError) as error:
                client.files.create(file=b"x" * size, purpose="batch")
            assert error.value.status_code == 413
        for purpose, says in (("fine-tune", "purpose must be batch"), ("", "purpose must be batch")):
            with pytest.raises(openai.BadRequestError, match=says):
                client.files.create(file=b"x", purpose=purpose)
        with pytest.raises(openai.BadRequestError, match="not supported"):
            client.files.create(file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
        for body, kind in (
            (b"{}", "application/json"),
            (b"x", "multipart/form-data; boundary=b"),
            (b"", "multipart/form-data"),
        ):
            response = httpx.post(f"{client.base_url}files", content=body, headers={"content-type": kind})
            assert response.status_code == 400, response.text
        client.files.create(file=b"", purpose="batch")
        with pytest.raises(openai.BadRequestError, match="2 files are kept"):
            client.files.create(file=b"x", purpose="batch")


def test_a_form_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Against httpx's writer of forms. Wherever a form is cut off, nothing is kept of it."""
    raw = b"\r\n--x\r\n\r\n--\x00\xff"
    files = {"file": ('a";b=ü.jsonl', raw)}
    request = httpx.Request("POST", "http://x", data={"purpose": "batch"}, files=files)
    kind, body = request.headers["content-type"], request.read()
    with served(tmp_path) as client_of, client_of("k") as client, httpx.Client(base_url=str(client.base_url)) as http:

        def post(content: bytes, kind: str = kind) -> httpx.Response:
            return http.post("files", content=content, headers={"content-type": kind})

        file = post(body).json()
        assert client.files.content(file["id"]).read() == raw
        assert file["filename"] == "a%22;b=ü.jsonl"  # as the writer writes it
        for size in range(len(body) - len("--\r\n")):
            assert post(body[:size]).status_code == 400, size
        for wrong in ("text/plain; boundary=x", "multipart/form-data", "multipart/mixed; boundary=x", "application/json"):
            assert post(body, wrong).status_code == 400
        twice = {"data": {"purpose": ["batch", "batch"]}, "files": files}
        many = {"data": {str(number): "" for number in range(40)} | {"purpose": "batch"}, "files": files}
        files_twice = {"data": {"purpose": "batch"}, "files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}
        nameless = {"data": {"purpose": "batch", "file": "text"}, "files": {}}
        big = {"data": {"purpose": "x" * 600_000, "file": "x" * 400_000}, "files": {}}
        for form in (twice, many, files_twice, nameless, big):
            answer = http.post("files", **form)
            assert answer.status_code in (400, 413), answer.text
            assert answer.json()["error"]["message"]
        assert [each.id for each in client.files.list()] == [file["id"]]


def test_answers_and_errors_of_a_batch_are_files(tmp_path: Path) -> None:
    lines = [line("a"), line("bad", temperature=-1), line("no", model="other"), "", line("z", n=2, priority=3)]
    with served(tmp_path) as client_of, client_of("k") as client:
        made = start(client, *lines, metadata={"of": "mine"})
        assert (made.status, made.metadata, made.expires_at - made.created_at) == ("validating", {"of": "mine"}, 86400)
        batch = ended(client, made.id)
        assert (batch.status, batch.errors, batch.metadata) == ("completed", None, {"of": "mine"})
        assert batch.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        good = {each["custom_id"]: each["response"] for each in content(client, batch.output_file_id)}
        bad = {each["custom_id"]: each["response"] for each in content(client, batch.error_file_id)}
        assert {name: answer["body"]["choices"][0]["text"] for name, answer in good.items()} == {"a": "abc", "z": "abc"}
        assert {name: answer["status_code"] for name, answer in bad.items()} == {"bad": 400, "no": 404}
        output = client.files.retrieve(batch.output_file_id)
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        chat = start(client, line(url="/v1/chat/completions", prompt=None, messages=[{"role": "user", "content": "x"}]),
                     endpoint="/v1/chat/completions")  # fmt: skip
        done = ended(client, chat.id)
        assert content(client, done.output_file_id)[0]["response"]["body"]["choices"][0]["message"]["content"] == "abc"
        assert done.error_file_id is None
        assert [each.id for each in client.batches.list()] == [chat.id, made.id]
        assert [each.id for each in client.batches.list(limit=1)] == [chat.id, made.id]
        assert client.batches.list(limit=1).has_more


def test_a_batch_of_embeddings_and_one_of_responses_go_behind_all_others(tmp_path: Path) -> None:
    gate = threading.Event()
    engine = FakeEngine(gate=gate)
    with served(tmp_path, engine) as client_of, client_of("k") as client:
        for endpoint, fields in (
            ("/v1/embeddings", {"input": "xy"}),
            ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
        ):
            body = {"model": "fake"} | fields
            made = start(
                client, json.dumps({"custom_id": "a", "method": "POST", "url": endpoint, "body": body}), endpoint=endpoint
            )
            until(lambda: engine.running)
            assert [request.priority for request, _ in engine.running.values()] == [batch_runner.PRIORITY]
            gate.set()
            (answer,) = content(client, ended(client, made.id).output_file_id)
            gate.clear()
            if endpoint == "/v1/embeddings":
                assert answer["response"]["body"]["data"][0]["embedding"] == [2, 2, 2, 2]
            else:
                assert answer["response"]["body"]["output"][0]["content"][0]["text"] == "ab"
                with pytest.raises(openai.NotFoundError):  # as it did not ask to be stored
                    client.responses.retrieve(answer["response"]["body"]["id"])


@pytest.mark.parametrize(
    ("lines", "number", "says"),
    [
        ([line("a"), "{"], 2, "Expecting property name"), ([line("a"), "", line("a")], 3, "an earlier line has the custom_id"),
        ([line("a", url="/v1/chat/completions")], 1, "url must be one of /v1/completions;"), ([], None, "holds no requests"),
        ([line("a"), line("b"), line("c"), line("d")], None, "may have 3 requests, and this has 4"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_fails_the_batch(
    lines: list[str], number: int | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "MAX_REQUESTS", 3)
    engine = FakeEngine()
    with served(tmp_path, engine) as client_of, client_of("k") as client:
        batch = ended(client, start(client, *lines).id)
        (error,) = batch.errors.data
        assert (batch.status, error.line, batch.output_file_id) == ("failed", number, None)
        assert says in error.message
        assert str(tmp_path) not in error.message
        assert ended(client, start(client, line()).id).status == "completed"  # the next one is served
    assert len(engine.submitted) == 1


def test_what_is_asked_of_a_batch_is_checked(tmp_path: Path) -> None:
    with served(tmp_path) as client_of, client_of("k") as client:
        for fields, says in (
            ({"endpoint": "/v1/moderations"}, "endpoint must be one of"), ({"completion_window": "1h"}, "24h"),
            ({"metadata": {"k" * 65: "v"}}, "metadata may have 16 pairs"), ({"input_file_id": "file-x"}, "No file"),
        ):  # fmt: skip
            file = client.files.create(file=line().encode(), purpose="batch")
            asked = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"} | fields
            with pytest.raises(openai.BadRequestError, match=says):
                client.batches.create(**asked)
        for use in (client.batches.retrieve, client.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="No batch found"):
                use("batch_" + "0" * 32)
        assert client.batches.list().data == []


def test_a_batch_is_cancelled_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "MAX_WAITING", 1)
    gate = threading.Event()
    gate.set()
    engine = FakeEngine(gate=gate)
    with served(tmp_path, engine) as client_of, client_of("k") as client:
        running = start(client, *(line(f"r{n}", max_tokens=3 if n < 5 else 4000) for n in range(150)))
        until(lambda: client.batches.retrieve(running.id).request_counts.completed == 5)
        assert client.batches.retrieve(running.id).status == "in_progress"
        assert all(request.priority == batch_runner.PRIORITY for request, _ in list(engine.running.values()))
        waiting = start(client, line())
        assert client.batches.retrieve(waiting.id).status == "validating"
        with pytest.raises(openai.RateLimitError, match="1 batches wait"):
            start(client, line())
        with pytest.raises(openai.ConflictError, match="is read by the batch"):
            client.files.delete(running.input_file_id)
        live = client.completions.create(model="fake", prompt="x", max_tokens=3)  # beside the batch
        assert live.choices[0].text == "abc"
        assert client.batches.cancel(waiting.id).status == "cancelled"
        assert client.batches.cancel(running.id).status in ("cancelling", "cancelled")
        batch = ended(client, running.id)
        assert (batch.status, batch.request_counts.completed, batch.error_file_id) == ("cancelled", 5, None)
        assert {each["custom_id"] for each in content(client, batch.output_file_id)} == {f"r{n}" for n in range(5)}
        until(lambda: not engine.running)
        with pytest.raises(openai.ConflictError, match="status 'cancelled'"):
            client.batches.cancel(running.id)
        assert ended(client, waiting.id).output_file_id is None
        assert client.files.delete(running.input_file_id).deleted


def test_a_batch_that_expires_says_so_of_each_line_that_is_left(tmp_path: Path) -> None:
    gate = threading.Event()
    gate.set()
    with served(tmp_path, FakeEngine(gate=gate)) as client_of, client_of("k") as client:
        made = start(client, line("quick"), line("never", max_tokens=4000), line("late", max_tokens=4000))
        until(lambda: client.batches.retrieve(made.id).request_counts.completed == 1)
        gate.clear()
    path = tmp_path / "shared" / "batches" / f"{made.id}.json"
    record = json.loads(path.read_text())
    assert record["status"] == "in_progress"
    path.write_text(json.dumps(record | {"expires_at": int(time.time()) - 1}))  # while no server ran
    with served(tmp_path) as client_of, client_of("k") as client:
        batch = ended(client, made.id)
        assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("expired", 1, 2)
        assert [each["custom_id"] for each in content(client, batch.output_file_id)] == ["quick"]
        left = content(client, batch.error_file_id)
        assert {(each["custom_id"], each["response"], each["error"]["code"]) for each in left} == {
            ("never", None, "batch_expired"), ("late", None, "batch_expired")
        }  # fmt: skip


def test_one_tenant_sees_nothing_of_another(tmp_path: Path) -> None:
    with served(tmp_path, keys=["one", "two"]) as client_of, client_of("one") as one, client_of("two") as two:
        batch = ended(one, start(one, line()).id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 1)
        assert two.files.list().data == two.batches.list().data == []
        for use, name in (
            (two.files.retrieve, batch.input_file_id), (two.files.content, batch.output_file_id),
            (two.files.delete, batch.input_file_id), (two.batches.retrieve, batch.id), (two.batches.cancel, batch.id),
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                use(name)
        with client_of("three") as three, pytest.raises(openai.AuthenticationError):
            three.files.list()
        assert one.files.content(batch.input_file_id).text == line()


@pytest.mark.slow
def test_a_server_that_is_killed_loses_and_doubles_nothing(tmp_path: Path) -> None:
    names = [f"r{n}" for n in range(1500)]
    answers = [tmp_path / "shared" / "files", "file-*[oe].content"]

    def count() -> int:
        return sum(path.read_bytes().count(b"\n") for path in answers[0].glob(answers[1]))

    batch_id = ""
    for _ in range(2):
        with (
            program("--files-dir", str(tmp_path)) as (process, url),
            client_at(url) as client,
        ):
            if not batch_id:
                batch_id = start(client, *(line(name, temperature=-(n % 2)) for n, name in enumerate(names))).id
            before = count()
            until(lambda before=before: count() > before + 100)
            process.kill()
            process.wait()
    assert count() < len(names), "the test must kill it before it is done"
    path = next(answers[0].glob(answers[1]))
    path.write_bytes(path.read_bytes()[:-5])  # and the last line was not whole
    for part in ("batches/x.json.part", "files/x.content.part"):
        (tmp_path / "shared" / part).write_bytes(b"{")
    with program("--files-dir", str(tmp_path)) as (_, url), client_at(url) as client:
        batch = ended(client, batch_id)
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 1500, "completed": 750, "failed": 750}
        good, bad = content(client, batch.output_file_id), content(client, batch.error_file_id)
        assert sorted(each["custom_id"] for each in good) == sorted(names[::2])
        assert sorted(each["custom_id"] for each in bad) == sorted(names[1::2])
        with pytest.raises(ValueError, match="another server uses"):
            BatchStore(tmp_path, 1)
    assert not list(tmp_path.rglob("*.part"))


def test_an_engine_that_fails_leaves_the_batch_to_the_next_server(tmp_path: Path) -> None:
    with served(tmp_path, FakeEngine(fail_at=5)) as client_of, client_of("k") as client:
        made = start(client, *(line(f"r{n}", max_tokens=2 + 4 * (n % 2)) for n in range(10)))
        until(lambda: httpx.get(str(client.base_url).removesuffix("v1/") + "health").status_code == 503)
        stopped = client.batches.retrieve(made.id)
        assert (stopped.status, stopped.request_counts.failed) == ("in_progress", 0)
        assert stopped.request_counts.completed <= 5  # the others need six steps
    with served(tmp_path) as client_of, client_of("k") as client:
        batch = ended(client, made.id)
        assert (batch.status, batch.request_counts.to_dict()) == ("completed", {"total": 10, "completed": 10, "failed": 0})
        assert len({each["custom_id"] for each in content(client, batch.output_file_id)}) == 10


def test_without_a_folder_the_answer_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(FakeEngine()) as url:
        for path in ("files", "batches"):
            assert "--files-dir" in httpx.get(f"{url}/v1/{path}").json()["error"]["message"]
    assert parse_flags(["--files-dir", "x"]).scheduling_policy == "priority"
    assert parse_flags([]).scheduling_policy == "fcfs"
    with pytest.raises(SystemExit):
        parse_flags(["--files-dir", "x", "--scheduling-policy", "lpm"])
    assert "leave one out" in capsys.readouterr().err


@pytest.mark.parametrize("most", [2, 3])
def test_old_batches_are_forgotten_once_they_have_ended(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_store, "MAX_BATCHES", most)
    with served(tmp_path) as client_of, client_of("k") as client:
        made = [ended(client, start(client, line()).id).id for _ in range(4)]
        assert [each.id for each in client.batches.list()] == made[::-1][:most]
