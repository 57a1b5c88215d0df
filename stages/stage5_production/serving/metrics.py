"""What Prometheus reads at ``/metrics``. Names and buckets are vLLM's, so vLLM's dashboards work here.

The engine tells an `EngineMetrics` of every step, on its own thread and with one clock. Times between tokens are measured there
and not at the client, because a slow reader is not a slow engine. Most sequences of a step have waited equally long for their
token, so one entry with a count stands for all of them.

Names and buckets: vLLM's ``docs/usage/metrics.md`` and ``v1/metrics/loggers.py``.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..batching.scheduler_output import SchedulerOutput
from ..batching.sequence import Sequence

if TYPE_CHECKING:
    from ..core.engine import EngineStats

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
    2560.0,
)  # fmt: skip
TOKEN = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0,
)  # fmt: skip
REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
    7680.0,
)  # fmt: skip
STEP = tuple(float(1 << power) for power in range(15))


def one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to `most`: buckets for numbers of tokens."""
    return tuple(float(d * 10**e) for e in range(len(str(most))) for d in (1, 2, 5) if d * 10**e <= most)


class Histogram:
    """Counts values in buckets; `bounds` are their upper ends, inclusive and ascending."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name, self.text, self.bounds = name, text, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Enter a value, `count` times, into the first bucket whose bound is not below it."""
        # Hint: Draw a request as a line: arrival, first step, first token, tokens, last token. Each histogram is the
        # distance between two of these points.
        raise NotImplementedError("Stage 5 · Task 5.8: Histogram.observe, see stages/stage5_production/GUIDE.md#task-5-8")

    def family(self, labels: dict[str, str]) -> Metric:
        """The counts as Prometheus wants them: for each bound, how many values were not above it."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self.name, self.text, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self.sum)
        return family


class EngineMetrics(Collector):
    """Follows every sequence of an engine from its first step to its last; an observer of `LLMEngine`.

    Steps and ends come on the engine's thread; a scrape may come on any.

    Args:
        model_name: label of every sample. stats: the engine's. max_model_len: largest bucket for numbers of tokens.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats], max_model_len: int) -> None:
        self.labels = {"model_name": model_name}
        self._stats = stats
        self._lock = threading.Lock()
        self._times: dict[Sequence, list[float]] = {}  # of the first token and of the last so far, and how many there are
        self.finished: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        lengths = one_two_five(max_model_len)
        self.first_token = Histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN)
        self.between = Histogram("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", TOKEN)
        self.per_token = Histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between the tokens of a request.", TOKEN
        )
        self.whole = Histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", REQUEST)
        self.queue = Histogram("vllm:request_queue_time_seconds", "From arrival to the first step.", REQUEST)
        self.prefill = Histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.", REQUEST)
        self.decode = Histogram("vllm:request_decode_time_seconds", "From the first token to the last.", REQUEST)
        self.prompt_len = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self.output_len = Histogram("vllm:request_generation_tokens", "Generated tokens of a request.", lengths)
        self.step_size = Histogram(
            "vllm:iteration_tokens_total", "Prompt tokens computed and tokens generated in a step.", STEP
        )
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    # ---------------------------------------------------------------------------------------- told by the engine

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """A step has ended: `now` is the time of the tokens that it sampled. A sequence's first is timed from its arrival, each
        other from the one before, several of a step as one; one that has finished is entered and forgotten (`_end`).

        As vLLM counts, the size of a step is the prompt tokens that it computed, which is all that is scheduled of a sequence
        without a token yet, and the tokens that it generated, a first one among them; a prompt that is pooled has none. What is
        computed again behind a preemption is neither. All of it is entered under `_lock`, which a scrape takes too, and equal
        waits as one, with their count.
        """
        raise NotImplementedError("Stage 5 · Task 5.8: EngineMetrics.on_step, see stages/stage5_production/GUIDE.md#task-5-8")

    def on_abort(self, sequences: Iterable[Sequence], now: float) -> None:
        """Sequences were aborted. Those that had finished before are not counted."""
        with self._lock:
            for seq in sequences:
                if seq.finish_reason == "abort":
                    self._end(seq, now)

    def on_rejection(self, reason: str) -> None:
        """A request was refused before the engine took it."""
        with self._lock:
            self.rejected[reason] += 1

    def _end(self, seq: Sequence, now: float) -> None:
        """Enter what is known of a sequence that is over: its lengths, its reason, and how long it waited, was prefilled and
        decoded, and lasted. One that was never scheduled has waited until now; one without a token was neither prefilled nor
        decoded. Whoever calls this holds the lock."""
        raise NotImplementedError("Stage 5 · Task 5.8: EngineMetrics._end, see stages/stage5_production/GUIDE.md#task-5-8")

    # ------------------------------------------------------------------------------------------ read by Prometheus

    def collect(self) -> Iterator[Metric]:
        """All metrics at this moment."""
        stats, names, values = self._stats(), list(self.labels), list(self.labels.values())
        for name, text, value in (
            ("num_requests_running", "Sequences in the running set.", stats.num_running),
            ("num_requests_waiting", "Sequences in the waiting queue or before it.", stats.num_waiting + stats.num_deferred),
            ("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all of them.", stats.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_cache_hits),
            ("num_preemptions", "Times that a running sequence lost its blocks.", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens computed or found in the prefix cache.", stats.num_prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.num_generation_tokens),
            ("spec_decode_num_drafts", "Drafts verified, one for each sequence and step.", stats.spec_decode_num_drafts),
            ("spec_decode_num_draft_tokens", "Tokens drafted.", stats.spec_decode_num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Drafted tokens accepted.", stats.spec_decode_num_accepted_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=names)
            counter.add_metric(values, value)
            yield counter
        with self._lock:
            ends, refusals = sorted(self.finished.items()), sorted(self.rejected.items())
            families = [each.family(self.labels) for each in vars(self).values() if isinstance(each, Histogram)]
        for name, text, label, counts in (
            ("request_success", "Sequences that have ended, by reason.", "finished_reason", ends),
            ("admission_rejections", "Requests refused before they were queued, by reason.", "reason", refusals),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=[*names, label])
            for reason, count in counts:
                counter.add_metric([*values, reason], count)
            yield counter
        yield from families

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
