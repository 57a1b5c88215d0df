"""Several engines behind one endpoint: requests routed by cached prefix against requests dealt out in turn.

Run it: ``python benchmarks/replicas.py --help``.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.replicas import ROUTERS, Groups, Measured, measure, serving
from solutions.benchmarks.report import Parser, record, show_table, spread, write_json
from solutions.core.config import DEFAULT_MODEL, EngineConfig
from solutions.core.platform.machine import available_cores

DESCRIPTION = """\
Groups of requests with long common beginnings, in random order, to several engines under Ray Serve. An engine's KV cache holds
the beginnings of its share of the groups, not those of all. Both routers have engines of their own, which work in turn, on
the same requests; each round has new ones, so nothing is cached before it.
"""
EPILOG = """\
examples:
  what results quote
    python benchmarks/replicas.py --output-json replicas.json
  longer beginnings
    python benchmarks/replicas.py --prefix-len 1024
"""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/replicas.py [flag ...]", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"what to run (default: {DEFAULT_MODEL})")
    parser.add_argument("--replicas", type=int, default=2, help="engines of each router (default: 2)")
    parser.add_argument("--groups", type=int, default=8, help="beginnings (default: 8)")
    parser.add_argument("--requests", type=int, default=8, help="of each group in a round (default: 8)")
    parser.add_argument("--prefix-len", type=int, default=512, help="tokens of a beginning (default: 512)")
    parser.add_argument("--input-len", type=int, default=64, help="tokens after it (default: 64)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens to generate (default: 32)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests under way at once (default: 8)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of each router, in turn, of which the median counts (default: 3)"
    )
    parser.add_argument("--kv-blocks", type=int, help="of each engine; default: its share of the beginnings and what runs")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    args = parser.parse_args(argv)
    names = ("replicas", "groups", "requests", "prefix_len", "input_len", "output_len", "concurrency", "rounds", "kv_blocks")
    parser.check_counts(args, *names)
    return args


def run(args: argparse.Namespace, groups: Groups) -> dict[str, list[Measured]]:
    """Router → its rounds.

    Raises:
        ValueError: Ray is not installed, or a model cannot be had.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = args.prefix_len + args.input_len + args.output_len
    settings: dict[str, Any] = {
        "model": args.model, "max_model_len": context + EngineConfig().block_size, "num_gpu_blocks_override": args.kv_blocks,
    }  # fmt: skip
    results: dict[str, list[Measured]] = {router: [] for router in ROUTERS}
    print(f"starting {len(ROUTERS)} times {args.replicas} engines", file=sys.stderr, flush=True)
    with serving(settings, args.replicas, port, available_cores()) as urls:
        for url in urls.values():  # short ones, so that every engine has run once
            measure(url, args.model, Groups(8, 4, 16, 16, 8).make(seed=99), args.concurrency)
        for number in range(args.rounds):
            for router, url in urls.items():
                print(f"{router}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
                results[router].append(measure(url, args.model, groups.make(seed=number), args.concurrency))
    return results


def show(results: dict[str, list[Measured]], groups: Groups, args: argparse.Namespace) -> None:
    """Print the table: a row a router, medians of the rounds."""
    rows = []
    for router, rounds in results.items():
        hits, p50, p99, rate = (spread(getattr(r, f.name) for r in rounds)["median"] for f in fields(Measured))
        rows.append([router, f"{100 * hits:.1f} %", f"{p50:.0f}", f"{p99:.0f}", f"{rate:.1f}"])
    title = (
        f"{args.replicas} engines of {args.model} with {args.kv_blocks} KV blocks each; {groups.groups} groups of "
        f"{groups.requests} requests, {groups.prefix_len} common tokens and {groups.input_len} own"
    )
    columns = ["router", "prompt tokens cached", "TTFT p50, ms", "TTFT p99, ms", "output tok/s"]
    show_table(title, columns, rows, f"medians of {args.rounds} rounds, {groups.concurrency} requests at once")


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write; exits with one line on a problem."""
    args = parse_flags(argv)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    groups = Groups(args.groups, args.requests, args.prefix_len, args.input_len, args.output_len, args.concurrency)
    args.kv_blocks = args.kv_blocks or groups.blocks_for(args.replicas, EngineConfig().block_size)
    try:
        results = run(args, groups)
    except ValueError as error:
        sys.exit(f"error: {error}")
    show(results, groups, args)
    if args.output_json is not None:
        summary = {
            router: {f.name: spread(getattr(r, f.name) for r in rounds) for f in fields(Measured)}
            for router, rounds in results.items()
        }
        flags = {**vars(args), "workload": asdict(groups), "ray": version("ray")}
        write_json(args.output_json, record("replicas", flags, summary))


if __name__ == "__main__":
    main()
