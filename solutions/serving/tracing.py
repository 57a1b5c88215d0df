"""Spans for OpenTelemetry: where a request's time went, as part of the client's own trace.

One span a sequence, sent over OTLP/HTTP from a thread of its own when the sequence ends; its parent is what the client's
``traceparent`` header names (W3C Trace Context). Names are those of vLLM and of OpenTelemetry's conventions for generative AI.
No span holds prompts or answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..batching.sequence import Sequence

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from ..batching.scheduler_output import SchedulerOutput
    from ..core.input import EngineRequest

SPAN = "llm_request"
EXPORT_SECONDS = 5.0
"""How long shutdown waits for a collector that does not answer."""


def otlp_exporter(endpoint: str) -> SpanExporter:
    """An exporter to a collector, such as ``http://localhost:4318/v1/traces``.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ValueError(
            "--otlp-traces-endpoint needs OpenTelemetry; install it with: pip install 'build-your-own-vllm[otel]'"
        ) from None
    return OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS)


class RequestTracer:
    """An `EngineObserver` that makes a span of each sequence.

    Args:
        exporter: where spans go.
        model_name: as the API calls it.
    """

    def __init__(self, exporter: SpanExporter, model_name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self.model_name = model_name
        self._provider = TracerProvider(resource=Resource.create({"service.name": "build-your-own-vllm"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(__name__)
        self._offset = time.time() - time.monotonic()  # of the engine's clock to the calendar's
        self._parents: dict[str, list[Any]] = {}  # request id → its parent's context, and how many sequences are to end
        self._first_tokens: dict[Sequence, float] = {}  # touched by the engine's thread only

    @contextmanager
    def under(self, requests: Iterable[EngineRequest], headers: Mapping[str, str]) -> Iterator[None]:
        """Put the requests that are submitted in this block below the span that the client's headers name."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        children = {request.request_id: [parent, request.params.n] for request in requests} if parent else {}
        self._parents.update(children)
        try:
            yield
        except BaseException:  # the engine has not taken them
            for name in children:
                self._parents.pop(name, None)
            raise

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """A step has ended, and at `now` the sampled sequences got their tokens."""
        for seq in decision.sampled:
            self._first_tokens.setdefault(seq, now)
            if seq.finish_reason is not None:
                self._end(seq, now)

    def on_abort(self, sequences: Iterable[Sequence], now: float) -> None:
        """Sequences were aborted. Those that had finished before have their spans already."""
        for seq in sequences:
            if seq.finish_reason == "abort":
                self._end(seq, now)

    def shutdown(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _end(self, seq: Sequence, now: float) -> None:
        """Send the span of a sequence that is over."""
        from opentelemetry.trace import SpanKind

        first, started = self._first_tokens.pop(seq, None), seq.first_scheduled_time
        span = self._tracer.start_span(
            SPAN, self._parent_of(seq), SpanKind.SERVER, start_time=self._nanoseconds(seq.arrival_time)
        )
        span.set_attributes(self._attributes(seq, first, now))
        for name, moment in (("first scheduled", started), ("first token", first)):
            if moment is not None:
                span.add_event(name, timestamp=self._nanoseconds(moment))
        span.end(self._nanoseconds(now))

    def _parent_of(self, seq: Sequence) -> Any:
        """Context of the span above a sequence that has ended; forgotten with the last sequence of its request."""
        entry = self._parents.get(seq.request_id)
        if entry is None:
            return None
        entry[1] -= 1
        if not entry[1]:
            del self._parents[seq.request_id]
        return entry[0]

    def _attributes(self, seq: Sequence, first: float | None, now: float) -> dict[str, Any]:
        params, started = seq.params, seq.first_scheduled_time
        found = {
            "gen_ai.response.model": self.model_name,
            "gen_ai.request.id": seq.request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.response.finish_reasons": [seq.finish_reason],
            "gen_ai.usage.prompt_tokens": seq.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": seq.num_output_tokens,
            "gen_ai.latency.e2e": now - seq.arrival_time,
            "gen_ai.latency.time_in_queue": (now if started is None else started) - seq.arrival_time,
        }
        if first is not None and started is not None:
            found["gen_ai.latency.time_to_first_token"] = first - seq.arrival_time
            found["gen_ai.latency.time_in_model_prefill"] = first - started
            found["gen_ai.latency.time_in_model_decode"] = now - first
        return {name: value for name, value in found.items() if value is not None}

    def _nanoseconds(self, moment: float) -> int:
        """A moment of `time.monotonic` as OpenTelemetry writes it: nanoseconds since 1970."""
        return int((moment + self._offset) * 1e9)
