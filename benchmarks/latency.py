"""How long clients of a server wait, at growing load: percentiles of TTFT, TPOT and ITL, and goodput.

Two kinds of load on a server, and what its clients see of it.

  closed loop  --concurrency users, each of whom asks again once answered: a slow server is asked less, so waits look short
  open loop    requests come at random at a rate, whatever the server is at; each one's clock starts when it was due

Without --rates, the rates are --loads, as shares of what the closed loop with the most users was served. Goodput counts the
answers a second whose first token came within --ttft-limit and the further ones within --tpot-limit in the mean.

DATASETS
examples:
  the default model
    python benchmarks/latency.py
  this engine's server with settings of your own
    python benchmarks/latency.py --serve "--max-num-seqs 64 --quantization int8"
  any OpenAI server that runs already, at rates of your choice
    python benchmarks/latency.py --url http://localhost:8001/v1 --rates 1 2 4 8 --plot latency.png
  the same number of requests, but eight at a time
    python benchmarks/latency.py --rates 2 --burst 8
"""

from __future__ import annotations

import asyncio
import itertools
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.datasets import DATASETS_HELP, Workload, add_workload_flags, make_requests, parse_workload
from solutions.benchmarks.end_to_end import Client, arrivals, check, first_model
from solutions.benchmarks.latency import Limits, Stream, summarise, sustained_rate
from solutions.benchmarks.report import Flags, Parser, drawing, finish, one_line_errors, say, show_table, tracked
from solutions.benchmarks.servers import running_server
from solutions.benchmarks.throughput import warm_up_requests
from solutions.core.config import DEFAULT_MODEL

WAITS = ("ttft p50", "ttft p90", "ttft p99", "tpot p50", "tpot p99", "itl p99")
Row = dict[str, Any]
COLUMNS = (
    "load", "offered", "served", "tok/s", "TTFT p50", "p90", "p99", "TPOT p50", "p99", "ITL p99", "in time", "goodput",
)  # fmt: skip


def parse_flags(argv: list[str] | None) -> tuple[Flags, Workload]:
    """Flags and the workload that they describe; exits with one line if they do not fit together."""
    parser = Parser("latency", __doc__.replace("DATASETS", DATASETS_HELP), "the waits over the load")
    add_workload_flags(parser)
    group = parser.add_argument_group("load")
    parser.add_flag("--concurrency", [1, 8, 32], "users", group, metavar="N")
    text = "requests a second of the open loop; inf: all at once"
    group.add_argument("--rates", type=float, nargs="+", metavar="R", help=text)
    parser.add_flag("--loads", [0.25, 0.5, 0.75, 0.9], "shares of the capacity instead", group, metavar="S")
    parser.add_flag("--burst", 1, "requests that arrive together", group)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--model", help=f"the model to serve (default: {DEFAULT_MODEL}), or to ask the server for (default: its first)"
    )
    group.add_argument("--url", help="a server that runs already, with /v1 at the end; else this engine's is started")
    group.add_argument("--api-key", help="key for the server")
    group.add_argument("--serve", default="", metavar="FLAGS", help="flags of the server that is started, in one string")
    parser.add_flag("--ttft-limit", 1000.0, "most milliseconds to the first token, for goodput", group, metavar="MS")
    parser.add_flag("--tpot-limit", 100.0, "most milliseconds per token after it, for goodput", group, metavar="MS")
    parser.add_flag("--repeats", 1, "runs of each load, with other arrivals; their requests are counted together", group)
    args, workload = parse_workload(parser, argv)
    if min([*(args.rates or args.loads), args.ttft_limit, args.tpot_limit]) <= 0:
        parser.error("--rates, --loads and the limits must be above 0")
    if args.url and args.serve:
        parser.error("--serve is for the server that is started, and --url names one that runs")
    return args, workload


def run(client: Client, workload: Workload, kind: str, size: float, args: Flags, seeds: Iterator[int]) -> Row:
    """One row: `kind` "users" with that many, or "rate" with as many requests a second. Each run has a seed of its own, for a
    server's prefix cache knows what it has answered. Raises ValueError if a request failed, or none was answered."""
    streams: list[Stream] = []
    seconds = 0.0
    for seed in itertools.islice(seeds, args.repeats):
        requests = make_requests(workload, seed=seed)
        if kind == "users":
            load = client.closed_loop(requests, int(size))
        else:
            load = client.open_loop(requests, arrivals(len(requests), size, burst=args.burst, seed=seed))
        found = asyncio.run(load)
        check(requests, found, may_refuse=True)
        offset = seconds - min(stream.start for stream in found)
        for stream in found:  # one run behind the other
            stream.start += offset
            stream.times = [time + offset for time in stream.times]
        seconds = max([seconds, *(stream.times[-1] for stream in found if stream.times)])
        streams += found
    return {"kind": kind, "size": size} | summarise(streams, Limits(args.ttft_limit / 1e3, args.tpot_limit / 1e3))


def measure(client: Client, workload: Workload, args: Flags) -> list[Row]:
    """A row for each load, after short requests that do not count. Raises what `run` does."""
    seeds = itertools.count(args.data_seed + 1)
    asyncio.run(client.closed_loop(warm_up_requests(make_requests(workload)), 8))
    rows = [run(client, workload, "users", users, args, seeds) for users in tracked(args.concurrency, "users")]
    capacity = max(row["requests_per_second"] for row in rows)
    rates = args.rates or [share * capacity for share in args.loads]
    return rows + [run(client, workload, "rate", rate, args, seeds) for rate in tracked(rates, "open loop")]


def show(rows: list[dict[str, Any]], title: str) -> None:
    cells = []
    for row in rows:
        waits = [row.get(f"{kind}_ms", {}).get(which, math.nan) for kind, which in map(str.split, WAITS)]
        load = [f"{row['size']:.0f} users", ""] if row["kind"] == "users" else ["open loop", f"{row['size']:.2f}"]
        cells.append([
            *load, f"{row['requests_per_second']:.2f}", f"{row['output_tokens_per_second']:.0f}",
            *(f"{wait:.1f}" for wait in waits), f"{row['attainment']:.0%}", f"{row['goodput']:.2f}",
        ])  # fmt: skip
    show_table(title, COLUMNS, cells, caption="offered, served and goodput in requests a second; waits in milliseconds")


def draw(rows: list[dict[str, Any]], limits: dict[str, float], path: Path) -> None:
    """Draw the open loop's waits and goodput over the rate."""
    rows = [row for row in rows if row["kind"] == "rate"]
    rates = [row["size"] for row in rows]
    with drawing(path, 3, dpi=120, figsize=(12, 3.4)) as panels:
        for axes, (kind, limit) in zip(panels, limits.items(), strict=False):
            for which, marker, color in (("p50", "o", "#0072B2"), ("p90", "^", "#E69F00"), ("p99", "s", "#D55E00")):
                values = [row.get(f"{kind}_ms", {}).get(which, math.nan) for row in rows]
                axes.plot(rates, values, f"{marker}-", color=color, label=which)
            axes.axhline(limit, color="black", lw=0.8, ls="--", label="limit")
            axes.set(ylabel="ms", title=kind.upper(), yscale="log")
        panels[2].plot(rates, [row["requests_per_second"] for row in rows], "o-", color="#56B4E9", label="answered")
        panels[2].plot(rates, [row["goodput"] for row in rows], "s-", color="#009E73", label="answered in time")
        panels[2].set(ylabel="a second", title="goodput", ylim=(0, None))
        for axes in panels:
            axes.set_xlabel("requests a second")
            axes.legend(frameon=False)


def main(argv: list[str] | None = None) -> None:
    args, workload = parse_flags(argv)
    with one_line_errors(RuntimeError), ExitStack() as stack:
        url = args.url
        if url is None:
            say("starting the server")
            _, url = stack.enter_context(running_server("--model", args.model or DEFAULT_MODEL, *shlex.split(args.serve)))
        model = (args.model if args.url else None) or first_model(url, args.api_key)
        rows = measure(Client(url, model, args.api_key), workload, args)
    show(rows, f"{model}, {workload.dataset}: {workload.num_prompts * args.repeats} requests a row")
    best = sustained_rate((row["size"], row["attainment"]) for row in rows if row["kind"] == "rate")
    limits = {"ttft": args.ttft_limit, "tpot": args.tpot_limit}
    within = f"{args.ttft_limit:.0f} ms to the first token and {args.tpot_limit:.0f} ms for each further one"
    print(f"90 % within {within}: up to {best:.2f} requests a second of those measured")
    finish(args, "latency", {"rows": rows, "sustained_rate": best}, partial(draw, rows, limits))


if __name__ == "__main__":
    main()
