"""What operators and tools ask of a real server: metrics, readiness, its version, its tokenizer."""

from __future__ import annotations

import re
import time
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

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
        ("tokenize", {"prompt": "x", "model": "gpt-9"}, "model"), ("detokenize", {"tokens": [1], "extra": 1}, "extra"),
    ):  # fmt: skip
        error = httpx.post(f"{base}/{path}", json=fields)
        assert (error.status_code, error.json()["error"]["param"]) == (404 if param == "model" else 400, param)


def test_ready_and_version(url: str) -> None:
    base = url.removesuffix("/v1")
    assert httpx.get(f"{base}/ready").status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+|unknown", httpx.get(f"{base}/version").json()["version"])


def counted(url: str) -> dict[str, float]:
    """Every sample of ``/metrics`` without buckets, by name and reason."""
    text = httpx.get(url.removesuffix("/v1") + "/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {sample.labels["model_name"] for sample in samples} == {MODEL}
    return {
        sample.name + sample.labels.get("finished_reason", ""): sample.value for sample in samples if "le" not in sample.labels
    }


def test_metrics_count_what_clients_got(client: openai.OpenAI, url: str) -> None:
    before = counted(url)
    start = time.perf_counter()
    first, waits, last = [], [], None
    for chunk in client.completions.create(**GREEDY, prompt="Count: 1, 2, 3,", max_tokens=40, stream=True):
        now = time.perf_counter()
        if last is None:
            first.append(now - start)
        elif chunk.choices[0].text:
            waits.append(now - last)
        last = now
    whole = client.completions.create(model=MODEL, prompt=["Hello", "Hi there"], n=2, max_tokens=5, seed=0)
    after = counted(url)
    new = {name: value - before.get(name, 0) for name, value in after.items()}
    generated = 40 + whole.usage.completion_tokens
    assert new["vllm:generation_tokens_total"] == new["vllm:request_generation_tokens_sum"] == generated
    assert new["vllm:request_success_totallength"] == new["vllm:time_to_first_token_seconds_count"] == 5
    assert new["vllm:inter_token_latency_seconds_count"] == generated - 5
    assert new["vllm:iteration_tokens_total_count"] >= 40
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    # what the client saw of the stream lies within what the engine says of all
    assert 0 < new["vllm:time_to_first_token_seconds_sum"] < time.perf_counter() - start
    assert sum(waits) < new["vllm:inter_token_latency_seconds_sum"] * 1.5
