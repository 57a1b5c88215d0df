"""Many streams at once to the server for minutes, between two runs of the same engine without one.

A server in a process of its own, a client in another, which keeps --streams requests under way: prompts of 16 to 112 tokens as
text, streamed answers of 64 to 192, a new request whenever one has ended. Before and after it the same engine runs the same
requests offline, from token ids to token ids. The difference is what HTTP and text cost, the client's own work included where
it shares the server's processor cores.

Meanwhile /health is asked every 50 ms and the server's memory measured every second, to see whether anything leaks. In the end
the server's histograms are compared with what the client has measured.

examples:
  what results quote
    python -m solutions.benchmarks.serving --output-json serving.json
  what it costs when somebody watches, among so much noise a matter of minutes
    python -m solutions.benchmarks.serving --feed --seconds 300
  a first look
    python -m solutions.benchmarks.serving --streams 32 --seconds 20 --warm-up 5
"""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from ..batching.sampling_params import RequestOutputKind
from ..core.config import DEFAULT_MODEL, EngineConfig, parse_bytes
from ..core.engine import LLMEngine
from ..models.loader import load_tokenizer, resolve_model
from .datasets import BenchRequest, token_ids
from .end_to_end import Client, client_session
from .latency import Stream, latencies, percentiles
from .report import Flags, Parser, finish, one_line_errors, say, show_table, spread
from .servers import as_flags, running_server
from .timing import in_new_process

HEALTH_EVERY, MEMORY_EVERY = 0.05, 1.0
MIB, FEED_SECONDS = 2**20, 20.0
Spans = list[tuple[float, float]]
"""When something began and ended, in seconds."""


def chat_sized_requests(tokenizer: Any, count: int, seed: int) -> list[BenchRequest]:
    """Prompts of about 16..112 tokens as text, answers of 64..192."""
    rng = random.Random(seed)
    texts = tokenizer.batch_decode([token_ids(rng, rng.randint(16, 96)) for _ in range(count)])
    prompts = tokenizer(texts)["input_ids"]  # not always the ids that the text was made of
    return [BenchRequest(prompt, rng.randint(64, 192), text) for prompt, text in zip(prompts, texts, strict=True)]


def offline_rate(args: Flags, requests: list[BenchRequest], seconds: float) -> float:
    """Output tokens a second of an engine in this process with --streams requests always under way, which are token ids and
    become token ids: neither HTTP nor text. The clock starts after --warm-up seconds and runs for `seconds`."""
    engine, queue = LLMEngine(EngineConfig(**settings(args))), enumerate(requests)

    def add() -> None:
        number, request = next(queue)
        params = request.params(detokenize=False, output_kind=RequestOutputKind.DELTA)
        engine.add_request(str(number), request.prompt, params)

    for _ in range(args.streams):
        add()
    start, tokens = time.perf_counter() + args.warm_up, 0
    while (now := time.perf_counter()) < start + seconds:
        outputs = engine.step()
        if now >= start:
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        for output in outputs:
            if output.finished:
                add()
    rate = tokens / (time.perf_counter() - start)
    engine.close()
    return rate


@dataclass(slots=True)
class Watched:
    """What a server was like while it worked: seconds that each ``/health`` took, (seconds, bytes that its processes held), and
    (seconds, tokens generated so far) as its ``/metrics`` say."""

    health: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[tuple[float, float]] = field(default_factory=list)

    def memory_slope(self) -> float:
        """MiB a minute, by least squares over the later half, when caches and pools have filled."""
        times, held = zip(*self.memory[len(self.memory) // 2 :], strict=True)
        return 60 * statistics.linear_regression(times, held).slope / MIB

    def rate(self, warm_up: float, seconds: float) -> float:
        """Tokens a second between two moments, by least squares: a step brings hundreds of tokens at once."""
        inside = [sample for sample in self.tokens if warm_up <= sample[0] <= warm_up + seconds]
        return statistics.linear_regression(*zip(*inside, strict=True)).slope


async def watch(url: str, process: int, into: Watched) -> None:
    """Ask a server at `url`, with ``/v1``, how it is, and its process how large, until cancelled."""
    base, server = url.removesuffix("/v1"), psutil.Process(process)
    start = due = time.perf_counter()
    async with client_session() as client:
        while True:
            asked = time.perf_counter()
            async with client.get(f"{base}/health") as answer:
                answer.raise_for_status()
            into.health.append(time.perf_counter() - asked)
            if asked >= due:
                due = asked + MEMORY_EVERY
                family = [server, *server.children(recursive=True)]
                into.memory.append((asked - start, sum(each.memory_info().rss for each in family)))
                async with client.get(f"{base}/metrics") as answer:
                    metrics = totals(await answer.text())
                into.tokens.append((time.perf_counter() - start, metrics["vllm:generation_tokens_total"]))
            await asyncio.sleep(HEALTH_EVERY)


async def watch_feed(url: str, into: Spans) -> None:
    """Read ``/live`` for every other `FEED_SECONDS`, until cancelled. The times at which each reading began and ended, in
    seconds since the first call, are put `into` the list."""
    origin = time.perf_counter()
    async with client_session() as client:
        while True:
            await asyncio.sleep(FEED_SECONDS)
            start = time.perf_counter()
            async with client.get(url.removesuffix("/v1") + "/live", raise_for_status=True) as answer:
                async for _ in answer.content.iter_any():
                    if time.perf_counter() - start > FEED_SECONDS:
                        break
            into.append((start - origin, time.perf_counter() - origin))


def feed_cost(seen: Watched, watched: Spans, warm_up: float) -> list[float]:
    """Share of the throughput that each reading of the feed cost, against the times before and after it."""
    costs = []
    for start, end in watched:
        if warm_up <= start - FEED_SECONDS and end + FEED_SECONDS <= seen.tokens[-1][0]:
            without = (seen.rate(start - FEED_SECONDS, FEED_SECONDS) + seen.rate(end, FEED_SECONDS)) / 2
            costs.append(1 - seen.rate(start, end - start) / without)
    return costs


def totals(text: str) -> dict[str, float]:
    """Sums over labels of every sample in Prometheus' text, by name, without buckets."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" not in sample.labels:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


async def under_watch(url: str, process: int, load: Any, feed: Spans | None = None) -> tuple[Any, Watched]:
    """What an awaited load gives, and what the server was like meanwhile; `feed` as for `watch_feed`, if it is read."""
    seen = Watched()
    watching = asyncio.gather(watch(url, process, seen), *([] if feed is None else [watch_feed(url, feed)]))
    try:
        return await load, seen
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def settings(args: Flags) -> dict[str, Any]:
    """Of the offline engine and, as flags, of the server. The cache is touched at the start, or memory would grow with use."""
    return {
        "model": args.model, "max_num_seqs": args.streams, "max_model_len": 512, "kv_cache_memory_bytes": args.kv_cache,
        "touch_kv_cache": True,
    }  # fmt: skip


def serve_load(args: Flags, requests: list[BenchRequest], feed: Spans | None = None) -> tuple[list[Stream], Watched, Any]:
    """The client's streams, what the server was like, and the totals of its metrics in the end; `feed` as for `under_watch`.
    Raises RuntimeError if the server does not start, or does not end well."""
    say(f"served: {args.warm_up + args.seconds} s")
    with running_server(*as_flags(settings(args))) as (server, url):
        load = Client(url, args.model).closed_loop(requests, args.streams, seconds=args.warm_up + args.seconds)
        streams, seen = asyncio.run(under_watch(url, server.pid, load, feed))
        found = totals(httpx.get(url.removesuffix("/v1") + "/metrics").text)
        server.send_signal(signal.SIGTERM)
        if server.wait(30) or (said := server.stdout.read()):
            raise RuntimeError(f"the server ended with {server.returncode}:\n{said}")
    return streams, seen, found


def measure_feed(args: Flags, requests: list[BenchRequest]) -> dict[str, Any]:
    """Served, with somebody who reads ``/live`` for every other stretch of time; prints the cost, and how far to trust it.
    Raises ValueError if there was not time enough for two comparisons."""
    feed: Spans = []
    _, seen, _ = serve_load(args, requests, feed)
    costs, rate = feed_cost(seen, feed, args.warm_up), seen.rate(args.warm_up, args.seconds)
    if len(costs) < 2:
        raise ValueError(f"two comparisons take {5 * FEED_SECONDS:.0f} s; give --seconds more")
    mean, error = statistics.mean(costs), statistics.stdev(costs) / len(costs) ** 0.5
    print(f"{rate:,.0f} output tok/s; somebody who reads /live costs {mean:.1%} of them, with a standard error of")
    print(f"{error:.1%}, in the mean of {len(costs)} comparisons, which range from {min(costs):.1%} to {max(costs):.1%}")
    return {"served_tokens_per_second": rate, "cost_of_feed": spread(costs) | {"mean": mean, "standard_error": error}}


def measure(args: Flags, requests: list[BenchRequest]) -> dict[str, Any]:
    """Offline, served, offline."""

    def run_offline() -> float:
        say(f"offline: {args.warm_up + args.seconds / 2:.0f} s")
        return in_new_process(offline_rate, args, requests, args.seconds / 2)

    before = run_offline()
    streams, seen, metrics = serve_load(args, requests)
    offline = spread([before, run_offline()])
    client, served = latencies(streams), seen.rate(args.warm_up, args.seconds)
    names = {"ttft": "time_to_first_token", "itl": "inter_token_latency", "latency": "e2e_request_latency"}
    means = {}
    for name, metric in names.items():
        total, count = (metrics[f"vllm:{metric}_seconds_{what}"] for what in ("sum", "count"))
        means[name] = {"client": client[f"{name}_ms"]["mean"], "server": 1e3 * total / count}
    return {
        "offline_tokens_per_second": offline,
        "served_tokens_per_second": served,
        "cost_of_serving": 1 - served / offline["median"],
        "requests": len(streams),
        "errors": sum(stream.error is not None for stream in streams),
        "client": client,
        "means_ms": means,
        "tokens": {"client": sum(stream.num_tokens for stream in streams), "server": metrics["vllm:generation_tokens_total"]},
        "health_ms": percentiles(seen.health),
        "memory_mib": {"first": seen.memory[0][1] / MIB, "last": seen.memory[-1][1] / MIB, "per_minute": seen.memory_slope()},
    }


def show(results: dict[str, Any], args: Flags) -> None:
    offline, served = results["offline_tokens_per_second"], results["served_tokens_per_second"]
    memory, health, tokens = results["memory_mib"], results["health_ms"], results["tokens"]
    rows = [
        ["output tok/s offline, before and after", " and ".join(f"{value:,.0f}" for value in offline["values"])],
        ["output tok/s served", f"{served:,.0f}"],
        ["cost of HTTP and text", f"{results['cost_of_serving']:.1%}"],
        ["requests, errors", f"{results['requests']:,}, {results['errors']}"],
        ["tokens counted by the client, by the server", f"{tokens['client']:,}, {tokens['server']:,.0f}"],
        ["/health p50, p99, longest", f"{health['p50']:.1f}, {health['p99']:.1f}, {health['max']:.1f} ms"],
        ["memory at the start, at the end", f"{memory['first']:,.0f}, {memory['last']:,.0f} MiB"],
        ["memory's slope over the later half", f"{memory['per_minute']:+.1f} MiB a minute"],
    ]
    show_table(f"{args.model}, {args.streams} streams for {args.seconds} s", ["", "measured"], rows)
    rows = []
    for name in ("ttft", "tpot", "itl", "latency"):
        values = [results["client"][f"{name}_ms"][of] for of in ("p50", "p90", "p99", "mean")]
        values += [means["server"] for means in [results["means_ms"].get(name)] if means]
        rows.append([name.upper(), *(f"{value:,.1f}" for value in values)])
    show_table("milliseconds", ["", "p50", "p90", "p99", "mean", "mean, says the server"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("serving", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "the model to serve")
    parser.add_flag("--streams", 256, "requests at once")
    parser.add_flag("--seconds", 120, "how long the load is measured")
    parser.add_flag("--warm-up", 20, "seconds of load before the measurement")
    parser.add_flag("--kv-cache", "2GiB", "KV memory of the server and of the engine offline", type=parse_bytes, metavar="SIZE")
    parser.add_argument("--feed", action="store_true", help="measure only what a client of /live costs")
    args = parser.parse_args(argv)
    with one_line_errors(RuntimeError):
        tokenizer = load_tokenizer(resolve_model(args.model))
        requests = chat_sized_requests(tokenizer, args.streams * (args.warm_up + args.seconds), seed=0)  # more than are sent
        results = measure_feed(args, requests) if args.feed else measure(args, requests)
    if not args.feed:
        show(results, args)
    finish(args, "serving", results)


if __name__ == "__main__":
    main()
