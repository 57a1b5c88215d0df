"""Many streams at once to the server for minutes, between two runs of the same engine without one.

Run it: ``python benchmarks/serving.py --help``.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.datasets import BenchRequest
from solutions.benchmarks.end_to_end import Client
from solutions.benchmarks.latency import Stream, latencies, percentiles
from solutions.benchmarks.report import Parser, record, show_table, spread, write_json
from solutions.benchmarks.serving import (
    FEED_SECONDS,
    MIB,
    Watched,
    as_flags,
    chat_sized_requests,
    feed_cost,
    offline_rate,
    running_server,
    totals,
    under_watch,
)
from solutions.core.config import DEFAULT_MODEL, parse_bytes
from solutions.models.loader import load_tokenizer, resolve_model

DESCRIPTION = """\
A server in a process of its own, a client in another, which keeps --streams requests under way: prompts of 16 to 112 tokens as
text, streamed answers of 64 to 192, a new request whenever one has ended. Before and after it the same engine runs the same
requests offline, from token ids to token ids. The difference is what HTTP and text cost, the client's own work included where
it shares the server's processor cores.

Meanwhile /health is asked every 50 ms and the server's memory measured every second. In the end the server's histograms are
compared with what the client has measured.
"""
EPILOG = """\
examples:
  what results quote
    python benchmarks/serving.py --output-json serving.json
  what it costs when somebody watches, among so much noise a matter of minutes
    python benchmarks/serving.py --feed --seconds 300
  a first look
    python benchmarks/serving.py --streams 32 --seconds 20 --warm-up 5
"""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/serving.py [flag ...]", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"what to serve (default: {DEFAULT_MODEL})")
    parser.add_argument("--streams", type=int, default=256, help="requests under way at once (default: 256)")
    parser.add_argument("--seconds", type=int, default=120, help="of load that is measured (default: 120)")
    parser.add_argument("--warm-up", type=int, default=20, help="seconds of load before it (default: 20)")
    parser.add_argument("--kv-cache", type=parse_bytes, default="2GiB", metavar="SIZE", help="memory of both (default: 2GiB)")
    parser.add_argument("--feed", action="store_true", help="say what it costs when somebody reads /live, and nothing else")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    args = parser.parse_args(argv)
    parser.check_counts(args, "streams", "seconds", "warm_up")
    return args


def say(line: str) -> None:
    """A line about what is going on, beside the results."""
    print(line, file=sys.stderr, flush=True)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Of the offline engine and, as flags, of the server. The cache is touched at the start, or memory would grow with use."""
    return {
        "model": args.model, "max_num_seqs": args.streams, "max_model_len": 512, "kv_cache_memory_bytes": args.kv_cache,
        "touch_kv_cache": True,
    }  # fmt: skip


def serve_load(
    args: argparse.Namespace, requests: list[BenchRequest], feed: list[tuple[float, float]] | None = None
) -> tuple[list[Stream], Watched, dict[str, float]]:
    """The client's streams, what the server was like, and the totals of its metrics in the end; `feed` as for `under_watch`.

    Raises:
        RuntimeError: the server does not start, or does not end well.
    """
    with running_server(*as_flags(settings(args))) as (server, url):
        load = Client(url, args.model).closed_loop(requests, args.streams, seconds=args.warm_up + args.seconds)
        streams, seen = asyncio.run(under_watch(url, server.pid, load, feed))
        found = totals(httpx.get(url.removesuffix("/v1") + "/metrics").text)
        server.send_signal(signal.SIGTERM)
        if server.wait(30) or (said := server.stdout.read()):
            raise RuntimeError(f"the server ended with {server.returncode}:\n{said}")
    return streams, seen, found


def make_requests(args: argparse.Namespace) -> list[BenchRequest]:
    """More than can be answered."""
    tokenizer = load_tokenizer(resolve_model(args.model))
    return chat_sized_requests(tokenizer, args.streams * (args.warm_up + args.seconds), seed=0)


def measure_feed(args: argparse.Namespace) -> dict[str, Any]:
    """Served, with somebody who reads ``/live`` for every other stretch of time.

    Raises:
        ValueError: there was not time enough for two comparisons.
    """
    say(f"served: {args.warm_up + args.seconds} s")
    feed: list[tuple[float, float]] = []
    _, seen, _ = serve_load(args, make_requests(args), feed)
    costs = feed_cost(seen, feed, args.warm_up)
    if len(costs) < 2:
        raise ValueError(f"two comparisons take {5 * FEED_SECONDS:.0f} s; give --seconds more")
    return {
        "served_tokens_per_second": seen.rate(args.warm_up, args.seconds),
        "cost_of_feed": spread(costs)
        | {
            "mean": statistics.mean(costs),
            "standard_error": statistics.stdev(costs) / len(costs) ** 0.5,
        },
    }


def show_feed(results: dict[str, Any]) -> None:
    """Print the result, with how far it can be trusted."""
    cost = results["cost_of_feed"]
    rate, error, compared = results["served_tokens_per_second"], cost["standard_error"], len(cost["values"])
    print(f"{rate:,.0f} output tok/s; somebody who reads /live costs {cost['mean']:.1%} of them, with a standard error of")
    print(f"{error:.1%}, in the mean of {compared} comparisons, which range from {cost['min']:.1%} to {cost['max']:.1%}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Offline, served, offline."""
    half, requests = args.seconds / 2, make_requests(args)

    def run_offline() -> float:
        say(f"offline: {args.warm_up + half:.0f} s")
        return offline_rate(settings(args), requests, args.streams, args.warm_up, half)

    before = run_offline()
    say(f"served: {args.warm_up + args.seconds} s")
    streams, seen, metrics = serve_load(args, requests)
    offline = [before, run_offline()]
    client = latencies(streams)
    means = {
        name: {"client": client[f"{name}_ms"]["mean"], "server": 1e3 * metrics[f"{metric}_sum"] / metrics[f"{metric}_count"]}
        for name, metric in (
            ("ttft", "vllm:time_to_first_token_seconds"), ("itl", "vllm:inter_token_latency_seconds"),
            ("latency", "vllm:e2e_request_latency_seconds"),
        )
    }  # fmt: skip
    served = seen.rate(args.warm_up, args.seconds)
    return {
        "offline_tokens_per_second": spread(offline),
        "served_tokens_per_second": served,
        "cost_of_serving": 1 - served / spread(offline)["median"],
        "requests": len(streams),
        "errors": sum(stream.error is not None for stream in streams),
        "client": client,
        "means_ms": means,
        "tokens": {"client": sum(stream.num_tokens for stream in streams), "server": metrics["vllm:generation_tokens_total"]},
        "health_ms": percentiles(seen.health),
        "memory_mib": {"first": seen.memory[0][1] / MIB, "last": seen.memory[-1][1] / MIB, "per_minute": seen.memory_slope()},
    }


def show(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the tables."""
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
        of = results["client"][f"{name}_ms"]
        server = results["means_ms"].get(name, {}).get("server")
        numbers = [of["p50"], of["p90"], of["p99"], of["mean"]]
        rows.append([name.upper(), *(f"{value:,.1f}" for value in numbers), "" if server is None else f"{server:,.1f}"])
    show_table("milliseconds", ["", "p50", "p90", "p99", "mean", "mean, says the server"], rows)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write; exits with one line on a problem."""
    args = parse_flags(argv)
    try:
        results = measure_feed(args) if args.feed else measure(args)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if args.feed:
        show_feed(results)
    else:
        show(results, args)
    if args.output_json is not None:
        write_json(args.output_json, record("feed" if args.feed else "serving", vars(args), results))
        say(f"written: {args.output_json}")


if __name__ == "__main__":
    main()
