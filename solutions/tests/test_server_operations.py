"""What operators and tools ask of a real server: metrics, readiness, its version, its tokenizer."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from solutions.serving.tokenizer_routes import info_of
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import body, serve, until
from solutions.tests.real_server import CHAT, CONTEXT, GREEDY, MODEL

HI = [{"role": "user", "content": "hi"}]


def test_tokenize_and_detokenize(url: str, tokenizer: Any) -> None:
    base = url.removesuffix("/v1")
    text = "Ein Süßwarenladen 😀"
    ids = tokenizer.encode(text)
    answer = httpx.post(f"{base}/tokenize", json={"model": MODEL, "prompt": text}).json()
    assert answer == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids}
    chat = httpx.post(f"{base}/tokenize", json={"messages": CHAT}).json()["tokens"]
    assert chat == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert httpx.post(f"{base}/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    for path, fields, param in (
        ("tokenize", {}, None), ("tokenize", {"prompt": "x", "messages": HI}, None), ("tokenize", {"prompt": 1}, "prompt"),
        ("detokenize", {"tokens": [49152]}, "tokens"), ("detokenize", {"tokens": [-1]}, "tokens"),
        ("tokenize", {"prompt": "x", "model": "gpt-9"}, "model"), ("detokenize", {"tokens": [True]}, "tokens[0]"),
    ):  # fmt: skip
        error = httpx.post(f"{base}/{path}", json=fields)
        assert (error.status_code, error.json()["error"]["param"]) == (404 if param == "model" else 400, param)


def test_tokens_by_their_names(url: str, tokenizer: Any) -> None:
    base = url.removesuffix("/v1")
    text = "Ein Süßwarenladen 😀"
    answer = httpx.post(f"{base}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    assert httpx.get(f"{base}/tokenizer_info").status_code == 404  # it needs a flag


def test_what_the_tokenizer_is_has_no_paths(tokenizer: Any) -> None:
    info = info_of(tokenizer)
    assert json.loads(json.dumps(info)) == info
    assert (info["chat_template"], info["eos_token"]) == (tokenizer.chat_template, "<|im_end|>")
    assert "/" not in json.dumps(info | {"chat_template": ""}).replace("</s>", "")
    with serve(FakeEngine(), tokenizer_info=True) as url:
        assert "/tokenizer_info" in httpx.get(f"{url}/openapi.json").json()["paths"]


def test_load_counts_requests_and_ping_is_health() -> None:
    gate = threading.Event()
    fake = FakeEngine(gate=gate)
    with serve(fake, ["secret"]) as url:
        key = {"Authorization": "Bearer secret"}
        assert [httpx.request(method, f"{url}/ping").status_code for method in ("GET", "POST")] == [200, 200]
        with httpx.stream("POST", f"{url}/v1/completions", json=body(stream=True, n=2, prompt=["a", "b"]), headers=key):
            assert httpx.get(f"{url}/load", headers=key).json() == {"server_load": 1}
        until(lambda: httpx.get(f"{url}/load", headers=key).json() == {"server_load": 0})


def test_ready_and_version(url: str) -> None:
    base = url.removesuffix("/v1")
    assert httpx.get(f"{base}/ready").status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+|unknown", httpx.get(f"{base}/version").json()["version"])


def counted(url: str) -> dict[str, float]:
    """Every sample of ``/metrics`` without buckets, by name and reason."""
    text = httpx.get(url.removesuffix("/v1") + "/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {sample.labels.get("model_name") for sample in samples if sample.name != "vllm:cache_config_info"} == {MODEL}
    return {
        sample.name + sample.labels.get("finished_reason", ""): sample.value for sample in samples if "le" not in sample.labels
    }


def since(url: str, before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in counted(url).items()}


def test_metrics_count_what_clients_got(client: openai.OpenAI, url: str) -> None:
    before = counted(url)
    one = client.completions.create(model=MODEL, prompt=["Hello", "Hi there"], n=2, max_tokens=5, seed=0)
    other = client.completions.create(**GREEDY, prompt="Count: 1, 2, 3,", max_tokens=40)
    new = since(url, before)
    generated = one.usage.completion_tokens + other.usage.completion_tokens
    assert new["vllm:generation_tokens_total"] == new["vllm:request_generation_tokens_sum"] == generated
    assert new["vllm:prompt_tokens_total"] == one.usage.prompt_tokens + other.usage.prompt_tokens
    assert new["vllm:request_success_totallength"] == new["vllm:time_to_first_token_seconds_count"] == 5
    assert new["vllm:inter_token_latency_seconds_count"] == generated - 5
    assert new["vllm:iteration_tokens_total_count"] >= 40
    assert new["vllm:num_requests_running"] == new["vllm:num_requests_waiting"] == 0


@pytest.mark.alone
@pytest.mark.slow
def test_times_are_those_that_a_client_measures(client: openai.OpenAI, url: str) -> None:
    """Alone and over one connection. The server's parts add up; HTTP and a busy machine only ever add to a client's times."""
    before, start = counted(url), time.perf_counter()
    chunks = client.completions.create(**GREEDY, prompt="Once upon a time", max_tokens=200, stream=True)
    times = [time.perf_counter() for chunk in chunks if chunk.choices[0].text]
    new = since(url, before)
    first, whole = times[0] - start, times[-1] - start
    ttft, rest, e2e = (
        new[f"vllm:{name}_seconds_sum"] for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
    )
    assert ttft + rest == pytest.approx(e2e, rel=0.01)
    assert 0.5 * first < ttft < first
    assert 0.8 * whole < e2e < 1.2 * whole + 0.2  # the request ends a moment after its last text
