"""``/v1/embeddings`` for real clients: all forms of inputs and answers, errors as OpenAI's, fairness, clients that leave."""

from __future__ import annotations

import base64
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from transformers import PreTrainedModel

from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.serving.async_engine import AsyncEngine
from solutions.serving.embeddings import HEADER, MAX_INPUTS, OTHERS, PART, PARTS_AT_ONCE
from solutions.tests.embedding_models import TEXTS, WORDS, describe, make_bert, oracle, tokens
from solutions.tests.engine_twins import folder
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import serve, until

LIMIT = 30
INPUT = {"model": "fake", "input": "the sea"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("bert")
    model = make_bert(path)
    describe(path)
    return path, model


@pytest.fixture(scope="module")
def url(bert: tuple[Path, PreTrainedModel]) -> Iterator[str]:
    """A server with an encoder; its answers carry no warning."""
    with serve(AsyncEngine(LLMEngine(EngineConfig(str(bert[0]), dtype="float32", max_model_len=LIMIT)))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client


def post(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json=INPUT | fields, timeout=30)


@pytest.mark.parametrize("form", ["texts", "lists", "text", "ids"])
@pytest.mark.parametrize("encoding", ["float", "base64", openai.NOT_GIVEN])
def test_every_form_of_input_and_answer(
    client: openai.OpenAI, bert: tuple[Path, PreTrainedModel], form: str, encoding: Any
) -> None:
    ids = tokens(bert[0], TEXTS)
    inputs, lists = {"texts": (TEXTS, ids), "lists": (ids, ids), "text": (TEXTS[0], ids[:1]), "ids": (ids[0], ids[:1])}[form]
    answer = client.embeddings.create(model="fake", input=inputs, encoding_format=encoding)
    assert [each.index for each in answer.data] == list(range(len(lists)))
    assert (answer.object, answer.model, answer.data[0].object) == ("list", "fake", "embedding")
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, lists))
    given = [each.embedding for each in answer.data]
    if encoding == "base64":  # the client decodes what it asked for itself alone
        given = [np.frombuffer(base64.b64decode(text), "<f4") for text in given]
    np.testing.assert_allclose(np.array(given), oracle(bert[1], lists), atol=3e-6)


def test_dimensions_and_truncation(client: openai.OpenAI, bert: tuple[Path, PreTrainedModel]) -> None:
    vector = oracle(bert[1], tokens(bert[0], TEXTS[:1]), normalize=False)[0, :10]
    answer = client.embeddings.create(model="fake", input=TEXTS[0], dimensions=10)
    np.testing.assert_allclose(answer.data[0].embedding, vector / np.linalg.norm(vector), atol=3e-6)
    long = ["blue " * 40 + "sea"]
    for fields, limit, side in [
        ({"truncate_prompt_tokens": -1}, LIMIT, "right"),
        ({"truncate_prompt_tokens": 9, "truncation_side": "left"}, 9, "left"),
    ]:
        answer = client.embeddings.create(model="fake", input=long, extra_body=fields)
        expected = oracle(bert[1], tokens(bert[0], long, limit, side))
        np.testing.assert_allclose([answer.data[0].embedding], expected, atol=3e-6)
        assert answer.usage.prompt_tokens == limit


@pytest.mark.parametrize(
    ("fields", "says", "param", "code"),
    [
        ({"input": [[5] * LIMIT, [5] * (LIMIT + 1)]}, f"context length is {LIMIT} tokens. However, your input resulted in 31",
         "input", "context_length_exceeded"),
        ({"input": ""}, "the prompt is empty", "input", "invalid_value"),
        ({"input": ["a", ""]}, "the prompt is empty", "input", "invalid_value"),
        ({"input": []}, "must be a string, token ids, or a list of either", "input", "invalid_value"),
        ({"input": None}, "input is required", "input", "missing_required_parameter"),
        ({"input": ["a", [1]]}, "must be a string, token ids", "input", "invalid_value"),
        ({"input": [len(WORDS)]}, "is not a token id", "input", "invalid_value"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, f"at most {MAX_INPUTS} inputs, got {MAX_INPUTS + 1}", "input", "invalid_value"),
        ({"dimensions": 65}, "dimensions must be at most 64, got 65", "dimensions", "invalid_value"),
        ({"dimensions": 0}, "greater than or equal to 1", "dimensions", "invalid_value"),
        ({"encoding_format": "int8"}, "'float' or 'base64'", "encoding_format", "invalid_value"),
        ({"truncate_prompt_tokens": -2}, "must be an integer at least 1", "truncate_prompt_tokens", "invalid_value"),
        ({"priority": 1}, "--scheduling-policy priority", "priority", "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_as_openai_names_it(url: str, fields: Any, says: str, param: str, code: str) -> None:
    response = post(url, **fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert says in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


def test_another_model_and_an_unknown_field(url: str) -> None:
    assert post(url, model="other").json()["error"]["code"] == "model_not_found"
    response = post(url, input_type="query", user="me")
    assert (response.status_code, response.headers["X-Ignored-Fields"]) == (200, "input_type")
    assert HEADER not in response.headers, "the folder says how it is pooled"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}),
    ],
)  # fmt: skip
def test_an_encoder_writes_nothing(url: str, path: str, body: dict[str, Any]) -> None:
    response = httpx.post(url + path, json={"model": "fake"} | body)
    assert response.status_code == 400
    assert "this model is an encoder, which writes no text; it makes embeddings: /v1/embeddings" in response.text


@pytest.mark.parametrize("path", OTHERS)
def test_other_tasks_are_refused_by_name(url: str, path: str) -> None:
    response = httpx.post(url + path, json={"model": "fake", "query": "a", "documents": ["b"]})
    assert response.status_code == 404
    assert response.json()["error"]["message"] == f"{path} is not supported by this server; it has /v1/embeddings"


def test_metrics_count_prompts_and_no_answers(bert: tuple[Path, PreTrainedModel]) -> None:
    with serve(AsyncEngine(LLMEngine(EngineConfig(str(bert[0]), dtype="float32")))) as url:
        count = post(url, input=TEXTS).json()["usage"]["prompt_tokens"]
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    values = {line.partition("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("vllm:")}
    assert values["vllm:prompt_tokens_total"] == count
    assert values["vllm:generation_tokens_total"] == values["vllm:request_generation_tokens_sum"] == 0
    assert values["vllm:request_prompt_tokens_sum"] == values["vllm:iteration_tokens_total_sum"] == count
    assert values["vllm:request_success_total"] in (0, len(TEXTS))  # the last line is that of any reason


@pytest.mark.slow
def test_a_model_that_is_not_trained_for_it_says_so_while_it_writes(caplog: pytest.LogCaptureFixture) -> None:
    """Hundreds of inputs, which take 400 steps, beside an answer of 20: it is as it is alone, and does not wait for them."""
    settings: dict[str, Any] = {"max_model_len": 96, "num_gpu_blocks_override": 60, "max_num_batched_tokens": 32}
    config = EngineConfig(str(folder("llama")), dtype="float32", max_num_waiting=70, **settings)
    fields = {"model": "fake", "prompt": [5, 6, 7], "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    inputs = [[index % 250] * (16 + index % 9) for index in range(640)]
    answers: list[httpx.Response] = []
    ends = []

    with caplog.at_level(logging.WARNING), serve(AsyncEngine(LLMEngine(config))) as url:

        def write() -> list[int]:
            response = httpx.post(f"{url}/v1/completions", json=fields | {"return_token_ids": True}, timeout=60)
            ends.append("text")
            return response.json()["choices"][0]["token_ids"]

        def read() -> None:
            answers.append(post(url, input=inputs, encoding_format="base64"))
            ends.append("vectors")

        alone = write()
        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: httpx.get(f"{url}/load").json()["server_load"])
        beside = write()
        reader.join(60)
        again = post(url, input="a")
    assert (answers[0].status_code, beside) == (200, alone)
    assert ends == ["text", "text", "vectors"]
    assert len(answers[0].json()["data"]) == len(inputs)
    for response in (*answers, again):
        assert "trained for embeddings" in response.headers[HEADER]
    assert len([record for record in caplog.records if "trained for embeddings" in record.message]) == 1


# What reaches the engine


def test_inputs_reach_the_engine_in_parts_and_go_with_their_client() -> None:
    gate = threading.Event()
    engine = FakeEngine(gate=gate)
    with serve(engine) as url:
        body = httpx.Request("POST", f"{url}/v1/embeddings", json=INPUT | {"input": ["a"] * 300})
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body.content)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        with socket.create_connection((body.url.host, body.url.port)) as connection:
            connection.sendall(head.encode() + body.content)
            until(lambda: engine.in_step.is_set())
            assert httpx.get(f"{url}/load").json()["server_load"] == PARTS_AT_ONCE
        until(lambda: httpx.get(f"{url}/load").json()["server_load"] == 0)  # it is known to have left
        gate.set()
        until(lambda: not engine.running)
        assert 0 < len(engine.submitted) <= PART * PARTS_AT_ONCE
        assert post(url).status_code == 200


def test_a_full_queue_is_a_429_and_nothing_stays_behind() -> None:
    engine = FakeEngine(max_waiting=PART - 1)
    with serve(engine) as url:
        response = post(url, input=["a"] * PART)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert response.headers["Retry-After"]
        until(lambda: not engine.running)
        assert post(url, input=["a"] * 3).status_code == 200


def test_an_engine_that_fails_is_a_503() -> None:
    with serve(FakeEngine(fail_at=1)) as url:
        assert post(url).status_code == 503


def test_answers_are_in_the_order_of_the_inputs_whatever_ends_first() -> None:
    with serve(FakeEngine()) as url:
        lengths = [1 + (7 * index) % 90 for index in range(200)]
        answer = post(url, input=["a" * length for length in lengths], dimensions=2).json()
    assert [each["embedding"] for each in answer["data"]] == [[float(length)] * 2 for length in lengths]
    assert answer["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
