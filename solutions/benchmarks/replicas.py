"""Several engines behind one endpoint: requests routed by cached prefix against requests dealt out in turn.

Users come in groups, and all prompts of a group begin alike: a long system prompt, a document, a conversation so far. An
engine's KV cache under Ray Serve holds the beginnings of its share of the groups and not those of all. In turn, every engine
sees every group and finds little of it; by prefix, each keeps to some groups. Both routers have engines of their own, which
work in turn, on the same requests in random order; each round has new ones, so nothing is cached before it.

examples:
  what results quote
    python -m solutions.benchmarks.replicas --output-json replicas.json
  longer beginnings
    python -m solutions.benchmarks.replicas --prefix-len 1024
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

from ..core.config import DEFAULT_MODEL, EngineConfig
from ..core.platform.machine import available_cores
from .datasets import BenchRequest, token_ids
from .end_to_end import Client, check
from .latency import Stream, duration, percentiles
from .report import Flags, Parser, finish, one_line_errors, say, show_table, spread
from .servers import free_port

ROUTERS = ("prefix", "round_robin")


@dataclass(frozen=True, slots=True)
class Groups:
    """What is asked for: so many beginnings of `prefix_len` tokens, `requests` of each with `input_len` tokens more, answers of
    `output_len`, and how many requests are under way at once."""

    groups: int = 8
    requests: int = 8
    prefix_len: int = 512
    input_len: int = 64
    output_len: int = 32
    concurrency: int = 8

    def make(self, seed: int) -> list[BenchRequest]:
        """The requests, in random order."""
        rng = random.Random(seed)
        beginnings = [token_ids(rng, self.prefix_len) for _ in range(self.groups)]
        prompts = [start + token_ids(rng, self.input_len) for start in beginnings * self.requests]
        requests = [BenchRequest(prompt, self.output_len) for prompt in prompts]
        rng.shuffle(requests)
        return requests

    def blocks_for(self, replicas: int, block_size: int) -> int:
        """KV blocks with which an engine holds its share of the beginnings and what runs on it, but not all beginnings; and
        with which it can run its share of the requests, even if each had a beginning of its own."""
        beginning = -(-self.prefix_len // block_size)
        own = -(-(self.input_len + self.output_len) // block_size) + 1
        share, running = -(-self.groups // replicas), -(-self.concurrency // replicas)
        return max(share * beginning + self.concurrency * own, running * (beginning + own))


@dataclass(slots=True)
class Measured:
    """One router on one set of requests: the share of the prompts' tokens that were cached, 0 to 1, milliseconds to the first
    token, and tokens a second of all engines together."""

    hit_rate: float
    ttft_p50: float
    ttft_p99: float
    output_tokens_per_second: float


def summarise(requests: Sequence[BenchRequest], streams: Sequence[Stream], seconds: float) -> Measured:
    """What the streams of the requests come to. Raises what `check` does."""
    check(requests, streams)
    waits = percentiles(stream.ttft for stream in streams)
    cached = sum(stream.num_cached for stream in streams) / sum(len(request.prompt_token_ids) for request in requests)
    return Measured(cached, waits["p50"], waits["p99"], sum(stream.num_tokens for stream in streams) / seconds)


def measure(url: str, model: str, requests: Sequence[BenchRequest], concurrency: int) -> Measured:
    """Send requests in their order, a new one whenever one has ended."""
    streams = asyncio.run(Client(url, model).closed_loop(requests, concurrency))
    return summarise(requests, streams, duration(streams))


@contextmanager
def serving(settings: dict[str, Any], services: dict[str, dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Services with engines of their own, of which one works while the others rest; gives their addresses. This machine's cores
    are dealt out over the engines of each. Raises ValueError if Ray is not installed.

    Args:
        settings: of all. services: name → its own.
    """
    from ..core.ray_executor import import_ray

    ray = import_ray()
    from ray import serve

    from ..serving.replicas.ray_app import app

    port, cores = free_port(), available_cores()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        "local", num_cpus=2 * cores * len(services), include_dashboard=False, object_store_memory=80 << 20,
        log_to_driver=False, logging_level="error",
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for number, (name, own) in enumerate(services.items()):
            each = max(1, cores // (own["replicas"] + own.get("prefill_replicas", 0)))
            serve.run(app({**settings, **own, "cores_per_replica": each}), name=name, route_prefix=f"/{number}")
        yield {name: f"http://127.0.0.1:{port}/{number}/v1" for number, name in enumerate(services)}
    finally:
        ray.shutdown()


def run(args: Flags, groups: Groups) -> dict[str, list[Measured]]:
    """Router → its rounds. Raises ValueError if Ray is not installed, or a model cannot be had."""
    context = args.prefix_len + args.input_len + args.output_len + EngineConfig().block_size
    settings = {"model": args.model, "max_model_len": context, "num_gpu_blocks_override": args.kv_blocks}
    results: dict[str, list[Measured]] = {router: [] for router in ROUTERS}
    say(f"starting {len(ROUTERS)} times {args.replicas} engines")
    with serving(settings, {router: {"replicas": args.replicas, "router": router} for router in ROUTERS}) as urls:
        for url in urls.values():  # short ones, so that every engine has run once
            measure(url, args.model, Groups(8, 4, 16, 16, 8).make(seed=99), args.concurrency)
        for number in range(args.rounds):
            for router, url in urls.items():
                say(f"{router}: round {number + 1} of {args.rounds}")
                results[router].append(measure(url, args.model, groups.make(seed=number), args.concurrency))
    return results


def show(summary: dict[str, dict[str, Any]], args: Flags) -> None:
    rows = []
    for router, by_name in summary.items():
        hits, p50, p99, rate = (found["median"] for found in by_name.values())
        rows.append([router, f"{100 * hits:.1f} %", f"{p50:.0f}", f"{p99:.0f}", f"{rate:.1f}"])
    title = (
        f"{args.replicas} engines of {args.model} with {args.kv_blocks} KV blocks each; {args.groups} groups of "
        f"{args.requests} requests, {args.prefix_len} common tokens and {args.input_len} own"
    )
    columns = ["router", "prompt tokens cached", "TTFT p50, ms", "TTFT p99, ms", "output tok/s"]
    show_table(title, columns, rows, f"medians of {args.rounds} rounds, {args.concurrency} requests at once")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("replicas", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "what to run")
    parser.add_flag("--replicas", 2, "engines behind each router")
    parser.add_flag("--groups", 8, "beginnings")
    parser.add_flag("--requests", 8, "requests of each group in a round")
    parser.add_flag("--prefix-len", 512, "tokens of a group's common beginning")
    parser.add_flag("--input-len", 64, "tokens after the common beginning")
    parser.add_flag("--output-len", 32, "tokens to generate")
    parser.add_flag("--concurrency", 8, "requests at once")
    parser.add_flag("--rounds", 3, "rounds of each router, in turn; the median counts")
    text = "KV blocks of each engine (default: room for its share of the beginnings and for what runs)"
    parser.add_argument("--kv-blocks", type=int, help=text)
    args = parser.parse_args(argv)
    if args.kv_blocks is not None and args.kv_blocks < 1:
        parser.error(f"--kv-blocks must be at least 1, got {args.kv_blocks}")
    groups = Groups(args.groups, args.requests, args.prefix_len, args.input_len, args.output_len, args.concurrency)
    args.kv_blocks = args.kv_blocks or groups.blocks_for(args.replicas, EngineConfig().block_size)
    with one_line_errors():
        results = run(args, groups)
    summary = {
        router: {field.name: spread(getattr(run, field.name) for run in runs) for field in fields(Measured)}
        for router, runs in results.items()
    }
    show(summary, args)
    finish(args, "replicas", summary, workload=asdict(groups), ray=version("ray"))


if __name__ == "__main__":
    main()
