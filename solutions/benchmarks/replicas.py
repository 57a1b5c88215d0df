"""Several engines behind one endpoint: requests routed by cached prefix against requests dealt out in turn.

Users come in groups, and all prompts of a group begin alike: a long system prompt, a document, a conversation so far. An
engine's KV cache under Ray Serve holds the beginnings of its share of the groups and not those of all. In turn, every engine
sees every group and finds little of it; by prefix, each keeps to some groups. Both routers have engines of their own, which
work in turn, on the same requests in random order; each round has new ones, so nothing is cached before it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from ..core.config import DEFAULT_MODEL, EngineConfig
from ..core.platform.machine import available_cores
from .datasets import BenchRequest, token_ids
from .end_to_end import Client, check
from .latency import Stream, duration, percentiles
from .report import Flags, Parser, finish, one_line_errors, say, show_table, spread
from .servers import free_port

SHAPE = ("groups", "requests", "prefix_len", "input_len", "output_len", "concurrency")
"""What is asked for: so many beginnings of `prefix_len` tokens, `requests` of each with `input_len` tokens more, answers of
`output_len`, and how many requests are under way at once."""
COLUMNS = {
    "hit_rate": "prompt tokens cached", "ttft_p50": "TTFT p50, ms", "ttft_p99": "TTFT p99, ms",
    "output_tokens_per_second": "output tok/s",
}  # fmt: skip


def grouped_requests(args: Flags, seed: int) -> list[BenchRequest]:
    """The requests, in random order."""
    rng = random.Random(seed)
    beginnings = [token_ids(rng, args.prefix_len) for _ in range(args.groups)]
    prompts = [start + token_ids(rng, args.input_len) for start in beginnings * args.requests]
    requests = [BenchRequest(prompt, args.output_len) for prompt in prompts]
    rng.shuffle(requests)
    return requests


def blocks_for(args: Flags, block_size: int) -> int:
    """KV blocks with which an engine holds its share of the beginnings and what runs on it, but not all beginnings; and with
    which it can run its share of the requests, even if each had a beginning of its own."""
    beginning = -(-args.prefix_len // block_size)
    own = -(-(args.input_len + args.output_len) // block_size) + 1
    share, running = -(-args.groups // args.replicas), -(-args.concurrency // args.replicas)
    return max(share * beginning + args.concurrency * own, running * (beginning + own))


def summarise(requests: Sequence[BenchRequest], streams: Sequence[Stream], seconds: float) -> dict[str, float]:
    """The share of the prompts' tokens that were cached, 0 to 1, milliseconds to the first token, and tokens a second of all
    engines together. Raises what `check` does."""
    check(requests, streams)
    waits = percentiles(stream.ttft for stream in streams)
    cached = sum(stream.num_cached for stream in streams) / sum(len(request.prompt_token_ids) for request in requests)
    rate = sum(stream.num_tokens for stream in streams) / seconds
    return dict(zip(COLUMNS, (cached, waits["p50"], waits["p99"], rate), strict=True))


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
    say(f"starting the engines of {len(services)} services")
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


def alternate(urls: dict[str, str], rounds: int, run: Callable[[str, int], dict[str, float]]) -> dict[str, dict[str, Any]]:
    """The `spread` of each of a run's figures, by service; `run` takes an address and the number of the round."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
    for number in range(rounds):
        for name, url in urls.items():
            say(f"{name}: round {number + 1} of {rounds}")
            runs[name].append(run(url, number))
    return {name: {figure: spread(run[figure] for run in each) for figure in each[0]} for name, each in runs.items()}


def measure(args: Flags, url: str, number: int) -> dict[str, float]:
    """Send requests in their order, a new one whenever one has ended."""
    requests = grouped_requests(args, seed=number)
    streams = asyncio.run(Client(url, args.model).closed_loop(requests, args.concurrency))
    return summarise(requests, streams, duration(streams))


def show(summary: dict[str, dict[str, Any]], args: Flags) -> None:
    rows = []
    for router, by_name in summary.items():
        hits, p50, p99, rate = (found["median"] for found in by_name.values())
        rows.append([router, f"{100 * hits:.1f} %", f"{p50:.0f}", f"{p99:.0f}", f"{rate:.1f}"])
    title = (
        f"{args.replicas} engines of {args.model} with {args.kv_blocks} KV blocks each; {args.groups} groups of "
        f"{args.requests} requests, {args.prefix_len} common tokens and {args.input_len} own"
    )
    caption = f"medians of {args.rounds} rounds, {args.concurrency} requests at once"
    show_table(title, ["router", *COLUMNS.values()], rows, caption)


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
    args.kv_blocks = args.kv_blocks or blocks_for(args, EngineConfig().block_size)
    context = args.prefix_len + args.input_len + args.output_len + EngineConfig().block_size
    settings = {"model": args.model, "max_model_len": context, "num_gpu_blocks_override": args.kv_blocks}
    services = {router: {"replicas": args.replicas, "router": router} for router in ("prefix", "round_robin")}
    short = Flags(**vars(args) | {"groups": 8, "requests": 4, "prefix_len": 16, "input_len": 16, "output_len": 8})
    with one_line_errors(), serving(settings, services) as urls:
        for url in urls.values():  # so that every engine has run once
            measure(short, url, 99)
        summary = alternate(urls, args.rounds, partial(measure, args))
    show(summary, args)
    finish(args, "replicas", summary, workload={name: getattr(args, name) for name in SHAPE}, ray=version("ray"))


if __name__ == "__main__":
    main()
