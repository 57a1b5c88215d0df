"""Spans of requests, from a real engine to a collector that speaks OpenTelemetry's protocol."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from solutions.batching.sampling_params import SamplingParams
from solutions.benchmarks.servers import running_server
from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.serving.tracing import RequestTracer, otlp_exporter
from solutions.tests.real_server import CONTEXT, GREEDY, stopped
from solutions.tests.tiny_models import make_tiny_llama

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def engine(tmp_path: Path) -> LLMEngine:
    make_tiny_llama(tmp_path)
    return LLMEngine(EngineConfig(str(tmp_path), dtype="float32", device="cpu", max_model_len=64, num_gpu_blocks_override=32))


def submit(engine: LLMEngine, tracer: RequestTracer, name: str, headers: dict[str, str], **params: Any) -> None:
    request = engine.prepare(name, {"prompt_token_ids": [5, 6, 7]}, SamplingParams(ignore_eos=True, **params))
    with tracer.under([request], headers):
        engine.submit(request)


def test_spans_are_those_of_the_sequences(engine: LLMEngine) -> None:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(exporter, "tiny")
    engine.observers.append(tracer)
    before = time.time()
    submit(engine, tracer, "two", HEADERS, max_tokens=4, n=2, temperature=0.5)
    submit(engine, tracer, "plain", {}, max_tokens=1)
    submit(engine, tracer, "aborted", HEADERS, max_tokens=50)
    for _ in range(3):
        engine.step()
    engine.abort_request("aborted")
    while engine.has_unfinished_requests():
        engine.step()
    tracer.shutdown()
    spans: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        spans.setdefault(span.attributes["gen_ai.request.id"], []).append(span)
    assert {name: len(each) for name, each in spans.items()} == {"two": 2, "plain": 1, "aborted": 1}
    for span in (*spans["two"], *spans["aborted"]):
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert spans["plain"][0].parent is None
    for name, each in spans.items():
        for span in each:
            found = span.attributes
            scheduled, first = (event.timestamp for event in span.events)
            assert before * 1e9 - 1e6 <= span.start_time <= scheduled <= first <= span.end_time <= time.time() * 1e9 + 1e6
            assert found["gen_ai.latency.e2e"] == pytest.approx((span.end_time - span.start_time) / 1e9, abs=1e-5)
            assert found["gen_ai.latency.time_to_first_token"] == pytest.approx((first - span.start_time) / 1e9, abs=1e-5)
            parts = ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
            assert sum(found[f"gen_ai.latency.{part}"] for part in parts) == pytest.approx(found["gen_ai.latency.e2e"])
            assert found["gen_ai.usage.prompt_tokens"] == 3
            assert found["gen_ai.response.model"] == "tiny"
            assert found["gen_ai.response.finish_reasons"] == ("abort" if name == "aborted" else "length",)
    assert [span.attributes["gen_ai.usage.completion_tokens"] for span in spans["two"]] == [4, 4]
    assert {span.attributes["gen_ai.request.temperature"] for span in spans["two"]} == {0.5}
    assert not tracer._parents
    assert not tracer._first_tokens


def test_what_waits_is_aborted_without_a_first_token(engine: LLMEngine) -> None:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(exporter, "tiny")
    engine.observers.append(tracer)
    submit(engine, tracer, "waiting", HEADERS, max_tokens=50, n=2)
    engine.abort_request("waiting")
    tracer.shutdown()
    for span in exporter.get_finished_spans():
        assert span.events == ()
        assert span.attributes["gen_ai.latency.time_in_queue"] == span.attributes["gen_ai.latency.e2e"]
        assert "gen_ai.latency.time_to_first_token" not in span.attributes
    assert len(exporter.get_finished_spans()) == 2
    assert not tracer._parents


def test_refused_requests_leave_nothing(engine: LLMEngine) -> None:
    tracer = RequestTracer(InMemorySpanExporter(), "tiny")
    request = engine.prepare("a", {"prompt_token_ids": [5]}, SamplingParams())
    with pytest.raises(ValueError, match="full"), tracer.under([request], HEADERS):
        raise ValueError("full")
    assert not tracer._parents
    tracer.shutdown()


@pytest.mark.parametrize("value", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
def test_a_header_that_names_nothing_is_no_parent(engine: LLMEngine, value: str) -> None:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(exporter, "tiny")
    engine.observers.append(tracer)
    submit(engine, tracer, "a", {"traceparent": value}, max_tokens=1)
    engine.step()
    tracer.shutdown()
    assert [span.parent for span in exporter.get_finished_spans()] == [None]


@pytest.mark.slow
def test_a_collector_that_is_not_there_holds_nobody_up(engine: LLMEngine) -> None:
    tracer = RequestTracer(otlp_exporter("http://127.0.0.1:9/v1/traces"), "tiny")
    engine.observers.append(tracer)
    submit(engine, tracer, "a", {}, max_tokens=1)
    start = time.monotonic()
    engine.step()
    assert time.monotonic() - start < 2
    tracer.shutdown()
    assert time.monotonic() - start < 12


def test_without_the_package_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match=r"pip install 'build-your-own-vllm\[otel\]'"):
        otlp_exporter("http://localhost:4318/v1/traces")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A collector's address, and what it has been sent."""
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_real_server_sends_its_spans(collector: tuple[str, list[ExportTraceServiceRequest]]) -> None:
    endpoint, got = collector
    secret = "the word is swordfish"
    with running_server("--max-model-len", str(CONTEXT), "--otlp-traces-endpoint", endpoint) as (server, url):
        with openai.OpenAI(base_url=url, api_key="-", timeout=60) as client:
            answer = client.completions.create(**GREEDY, prompt=secret, max_tokens=5, extra_headers=HEADERS)
        assert stopped(server) == ""
    spans = [span for each in got for resource in each.resource_spans for scope in resource.scope_spans for span in scope.spans]
    (span,) = spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("llm_request", TRACE, PARENT)
    found = {attribute.key: attribute.value for attribute in span.attributes}
    assert found["gen_ai.request.id"].string_value == answer.id
    assert found["gen_ai.usage.completion_tokens"].int_value == answer.usage.completion_tokens == 5
    assert "swordfish" not in str(got)
