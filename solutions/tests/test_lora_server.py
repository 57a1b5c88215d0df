"""LoRA adapters over HTTP: chosen by `model`, loaded and unloaded while the server runs; by the real client."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import PreTrainedModel

from solutions.benchmarks.servers import as_flags, running_server
from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.serving import api_server
from solutions.serving.async_engine import AsyncEngine
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import serve, until
from solutions.tests.lora_adapters import likeliest, make_adapter
from solutions.tests.tiny_models import make_tiny_llama

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 8 << 20, "enable_lora": True, "max_loras": 2,
}  # fmt: skip
PROMPT = list(range(60, 90))
COUNT = 10


class Server:
    """A server of a tiny model with the adapter "one"; folders and merged models of three adapters."""

    def __init__(self, folder: Path, models: list[PreTrainedModel], url: str, engine: LLMEngine) -> None:
        self.folder, self.models, self.url, self.engine = folder, models, url, engine
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)

    def says(self, model: str, number: int) -> bool:
        """Whether a model of this name says what the model with this adapter says, and no other."""
        said = self.said(model)
        return [likeliest(each, PROMPT, said) == said for each in self.models] == [n == number for n in range(4)]

    def said(self, model: str) -> list[int]:
        answer = self.client.completions.create(
            model=model, prompt=PROMPT, max_tokens=COUNT, temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        return answer.choices[0].token_ids

    def post(self, route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{route}_lora_adapter", json=body, timeout=60)

    def load(self, name: str, number: int, **more: Any) -> httpx.Response:
        return self.post("load", lora_name=name, lora_path=str(self.folder / str(number)), **more)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    base = make_tiny_llama(tmp_path / "model")
    models = [base, *(make_adapter(tmp_path / str(n), base, seed=n) for n in (1, 2, 3))]
    modules = (f"one={tmp_path / '1'}",)
    engine = LLMEngine(EngineConfig(str(tmp_path / "model"), lora_modules=modules, **SETTINGS))
    with serve(AsyncEngine(engine), lora_updates=True) as url:
        yield Server(tmp_path, models, url, engine)


def test_the_model_of_a_request_chooses_the_adapter(server: Server) -> None:
    assert server.says("fake", 0)
    assert server.says("one", 1)
    listed = {card.id: card for card in server.client.models.list()}
    assert list(listed) == ["fake", "one"]
    assert (listed["one"].parent, listed["one"].root) == ("fake", str(server.folder / "1"))
    assert listed["fake"].parent is None
    assert server.client.models.retrieve("one").parent == "fake"
    with pytest.raises(openai.NotFoundError) as error:
        server.said("two")
    assert error.value.code == "model_not_found"
    chat = [{"role": "user", "content": "Hello"}]
    asked = {"messages": chat, "temperature": 0, "max_tokens": 8}
    answers = {name: server.client.chat.completions.create(model=name, **asked) for name in ("fake", "one")}
    assert answers["one"].choices[0].message.content != answers["fake"].choices[0].message.content
    assert answers["one"].model == "one"
    response = server.client.responses.create(model="one", input=chat, temperature=0, max_output_tokens=8)
    assert response.output_text == answers["one"].choices[0].message.content


def test_adapters_come_and_go(server: Server) -> None:
    assert server.load("two", 2).text == "Success: LoRA adapter 'two' added successfully."
    assert server.says("two", 2)
    assert server.says("one", 1)
    for answer, status, said in (
        (server.load("two", 3), 400, "The lora adapter 'two' has already been loaded."),
        (server.load("three", 3), 400, "unload one first"),
        (server.load("fake", 3), 400, "has a name of the model"),
        (server.post("load", lora_name="x", lora_path="/nowhere"), 400, "no adapter_config.json"),
        (server.post("load", lora_name="x", lora_path="y" * 5000), 400, "cannot read yyy"),
        (server.post("load", lora_name="x", lora_path="~nobody_here/x"), 400, "nobody_here"),
        (server.post("load", lora_name="x", lora_path="y\0"), 400, "no adapter_config.json"),
        (server.post("load", lora_name="x"), 400, "lora_path"),
        (server.post("load", lora_name="", lora_path="x"), 400, "lora_name"),
        (server.post("unload", lora_name="nobody"), 404, "The lora adapter 'nobody' cannot be found."),
    ):
        assert answer.status_code == status
        assert said in answer.json()["error"]["message"]
    assert server.post("unload", lora_name="one").text == "Success: LoRA adapter 'one' removed successfully."
    with pytest.raises(openai.NotFoundError):
        server.said("one")
    assert server.load("three", 3).status_code == 200
    assert server.load("two", 1, load_inplace=True).status_code == 200
    assert all(server.says(name, number) for name, number in (("fake", 0), ("two", 1), ("three", 3)))
    assert [card.id for card in server.client.models.list()] == ["fake", "two", "three"]


@pytest.mark.slow
def test_a_stream_goes_on_with_an_adapter_that_is_unloaded(server: Server) -> None:
    """Also while its name and every free slot go to others, and with its neighbours under other adapters."""
    stream = server.client.completions.create(
        model="one", prompt=PROMPT, max_tokens=400, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    got = list(next(stream).choices[0].token_ids)
    assert server.post("unload", lora_name="one").status_code == 200
    assert server.load("one", 2).status_code == 200
    assert server.says("one", 2)
    for chunk in stream:
        got += chunk.choices[0].token_ids if chunk.choices else []
    assert len(got) == 400
    assert got == likeliest(server.models[1], PROMPT, got)


def test_an_adapter_that_leaves_before_its_request_starts_gives_a_404(server: Server) -> None:
    """The name is there when the request is read, and gone when the engine takes it."""
    prepare, entered, go = server.engine.prepare, threading.Event(), threading.Event()

    def held(*args: Any) -> Any:
        entered.set()
        assert go.wait(30)
        return prepare(*args)

    server.engine.prepare = held  # type: ignore[method-assign]
    errors: list[openai.APIStatusError] = []

    def ask() -> None:
        with pytest.raises(openai.NotFoundError) as error:
            server.said("one")
        errors.append(error.value)

    thread = threading.Thread(target=ask)
    thread.start()
    assert entered.wait(30)
    remover = threading.Thread(target=server.engine.adapters.remove, args=("one",))
    remover.start()
    remover.join()
    go.set()
    thread.join(30)
    assert [error.code for error in errors] == ["model_not_found"]


def test_a_search_ends_with_its_adapter(server: Server) -> None:
    """Not one step of it is made by other weights that have taken the name, nor does a search beside it go on."""
    submit, count, folder = server.engine.submit, itertools.count(), server.folder / "2"
    adapters = server.engine.adapters

    def replacing(request: Any) -> None:
        if next(count) == 9:
            adapters.add("one", folder, adapters.read(folder), replace=True)
        submit(request)

    asked = {"model": "one", "prompt": [PROMPT, PROMPT[3:]], "use_beam_search": True, "n": 2, "max_tokens": 200}
    expected = httpx.post(f"{server.url}/v1/completions", json=asked | {"max_tokens": 3}, timeout=60)
    assert expected.status_code == 200
    server.engine.submit = replacing  # type: ignore[method-assign]
    answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
    assert (answer.status_code, "while a search went on" in answer.text) == (404, True)
    until(lambda: not server.engine.has_unfinished_requests())
    assert next(count) < 30
    assert server.says("one", 2)


def test_adapters_are_not_loaded_over_http_unless_that_is_allowed() -> None:
    with serve(FakeEngine()) as url:
        for route in ("load", "unload"):
            answer = httpx.post(f"{url}/v1/{route}_lora_adapter", json={"lora_name": "a", "lora_path": "b"})
            assert (answer.status_code, "--allow-runtime-lora-updating" in answer.text) == (404, True)
    with serve(FakeEngine(), lora_updates=True) as url:  # but without --enable-lora
        answer = httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"})
        assert (answer.status_code, "--enable-lora" in answer.text) == (400, True)


def test_an_adapter_may_not_be_named_like_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        api_server.parse_flags(["--enable-lora", "--served-model-name", "a", "b", "--lora-modules", "b=x"])
    assert "'b' is a name of the model" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_loads_adapters(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "model")
    merged = [make_adapter(tmp_path / str(n), base, seed=n) for n in (1, 2)]
    flags = as_flags(SETTINGS | {"model": tmp_path / "model", "served_model_name": "fake"})
    modules = [f"{name}={tmp_path / name}" for name in ("1", "2")]
    with running_server(*flags, "--lora-modules", *modules) as (_, url):
        client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60)
        for name, model in zip(("1", "2"), merged, strict=True):
            answer = client.completions.create(
                model=name, prompt=PROMPT, max_tokens=COUNT, temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )  # fmt: skip
            said = answer.choices[0].token_ids
            assert said == likeliest(model, PROMPT, said)
