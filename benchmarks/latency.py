"""How long clients of a server wait, at growing load: percentiles of TTFT, TPOT and ITL, and goodput.

Run it: ``python benchmarks/latency.py --help``.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.datasets import DATASETS_HELP, Workload, add_workload_flags, make_requests, pick_workload
from solutions.benchmarks.end_to_end import Client, arrivals, check_tokens, first_model
from solutions.benchmarks.latency import Limits, Stream, summarise, sustained_rate
from solutions.benchmarks.report import Parser, record, show_table, write_json
from solutions.benchmarks.serving import running_server
from solutions.benchmarks.throughput import warm_up_requests
from solutions.core.config import DEFAULT_MODEL

DESCRIPTION = f"""\
Two kinds of load on a server, and what its clients see of it.

  closed loop  --concurrency users, each of whom asks again once answered: a slow server is asked less, so waits look short
  open loop    requests come at random at a rate, whatever the server is at; each one's clock starts when it was due

Without --rates, the rates are --loads, as shares of what the closed loop with the most users was served. Goodput counts the
answers a second whose first token came within --ttft-limit and the further ones within --tpot-limit in the mean.

{DATASETS_HELP}"""
EPILOG = """\
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
COLUMNS = (
    "load", "offered", "served", "tok/s", "TTFT p50", "p90", "p99", "TPOT p50", "p99", "ITL p99", "in time", "goodput",
)  # fmt: skip


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, Workload]:
    """Flags and the workload that they describe; exits with one line if they do not fit together."""
    parser = Parser(usage="python benchmarks/latency.py [flag ...]", description=DESCRIPTION, epilog=EPILOG)
    add_workload_flags(parser)
    group = parser.add_argument_group("load")
    group.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="users (default: 1 8 32)")
    group.add_argument(
        "--rates", type=float, nargs="+", metavar="R", help="requests a second of the open loop; inf: all at once"
    )
    group.add_argument(
        "--loads", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9], metavar="S",
        help="shares of the capacity instead (default: 0.25 0.5 0.75 0.9)",
    )  # fmt: skip
    group.add_argument("--burst", type=int, default=1, help="requests that arrive together (default: 1)")
    group = parser.add_argument_group("measurement")
    group.add_argument("--model", help=f"what to serve, or which model of the server (default: {DEFAULT_MODEL}, or its first)")
    group.add_argument("--url", help="a server that runs already, with /v1 at the end; else this engine's is started")
    group.add_argument("--api-key", help="for the server")
    group.add_argument("--serve", default="", metavar="FLAGS", help="flags of the server that is started, in one string")
    group.add_argument("--ttft-limit", type=float, default=1000.0, metavar="MS", help="milliseconds (default: 1000)")
    group.add_argument("--tpot-limit", type=float, default=100.0, metavar="MS", help="milliseconds (default: 100)")
    group.add_argument("--repeats", type=int, default=1, help="of each load, put together; other arrivals (default: 1)")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the waits over the load, PNG or SVG")
    group.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    args = parser.parse_args(argv)
    parser.check_counts(args, "concurrency", "burst", "repeats")
    if min([*(args.rates or args.loads), args.ttft_limit, args.tpot_limit]) <= 0:
        parser.error("--rates, --loads and the limits must be above 0")
    if args.url and args.serve:
        parser.error("--serve is for the server that is started, and --url names one that runs")
    try:
        return args, pick_workload(args)
    except ValueError as error:
        parser.error(str(error))


class Load:
    """Puts a server under load.

    Args:
        workload: whose requests are sent, other ones at each run: a server's prefix cache knows those that it has answered.
    """

    def __init__(self, client: Client, workload: Workload, args: argparse.Namespace) -> None:
        self.client, self.workload, self.args = client, workload, args
        self.limits = Limits(args.ttft_limit / 1e3, args.tpot_limit / 1e3)
        self._seed = args.data_seed

    def run(self, kind: str, size: float) -> dict[str, Any]:
        """One row: `kind` "users" with that many, or "rate" with as many requests a second.

        Raises:
            ValueError: a request failed, or nothing was answered.
        """
        streams: list[Stream] = []
        seconds = 0.0
        for _ in range(self.args.repeats):
            self._seed += 1
            requests = make_requests(self.workload, seed=self._seed)
            if kind == "users":
                load = self.client.closed_loop(requests, int(size))
            else:
                load = self.client.open_loop(
                    requests, arrivals(len(requests), size, burst=self.args.burst, seed=self._seed)
                )  # fmt: skip
            found = asyncio.run(load)
            check_tokens(requests, found)
            offset = seconds - min(stream.start for stream in found)
            for stream in found:  # one run behind the other
                stream.start += offset
                stream.times = [time + offset for time in stream.times]
            seconds = max([seconds, *(stream.times[-1] for stream in found if stream.times)])
            streams += found
        return {"kind": kind, "size": size} | summarise(streams, self.limits)

    def warm_up(self) -> None:
        """Short requests that do not count."""
        asyncio.run(self.client.closed_loop(warm_up_requests(make_requests(self.workload)), 8))


def measure(load: Load, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each load, with a bar on a terminal.

    Raises:
        ValueError: see `Load.run`.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("warm-up", total=1 + len(args.concurrency) + len(args.rates or args.loads))
        load.warm_up()
        rows = []
        for users in args.concurrency:
            bar.update(task, advance=1, description=f"{users} users")
            rows.append(load.run("users", users))
        capacity = max(row["requests_per_second"] for row in rows)
        for rate in args.rates or [share * capacity for share in args.loads]:
            bar.update(task, advance=1, description=f"{rate:.3g} requests/s")
            rows.append(load.run("rate", rate))
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    cells = []
    for row in rows:
        empty = dict.fromkeys(("p50", "p90", "p99"), float("nan"))
        ttft, tpot, itl = (row.get(f"{kind}_ms", empty) for kind in ("ttft", "tpot", "itl"))
        name = f"{row['size']:.0f} users" if row["kind"] == "users" else "open loop"
        offered = "" if row["kind"] == "users" else f"{row['size']:.2f}"
        waits = [ttft["p50"], ttft["p90"], ttft["p99"], tpot["p50"], tpot["p99"], itl["p99"]]
        cells.append([
            name, offered, f"{row['requests_per_second']:.2f}", f"{row['output_tokens_per_second']:.0f}",
            *(f"{wait:.1f}" for wait in waits), f"{row['attainment']:.0%}", f"{row['goodput']:.2f}",
        ])  # fmt: skip
    show_table(title, COLUMNS, cells, caption="offered, served and goodput in requests a second; waits in milliseconds")


def plot(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Draw the open loop's waits and goodput over the rate."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["kind"] == "rate"]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    rates = [row["size"] for row in rows]
    for place, kind, limit in ((axes[0], "ttft", args.ttft_limit), (axes[1], "tpot", args.tpot_limit)):
        for which, marker, color in (("p50", "o", "#0072B2"), ("p90", "^", "#E69F00"), ("p99", "s", "#D55E00")):
            values = [row.get(f"{kind}_ms", {}).get(which, float("nan")) for row in rows]
            place.plot(rates, values, f"{marker}-", color=color, label=which)
        place.axhline(limit, color="black", lw=0.8, ls="--", label="limit")
        place.set(xlabel="requests a second", ylabel="ms", title=kind.upper(), yscale="log")
        place.legend(frameon=False)
    axes[2].plot(rates, [row["requests_per_second"] for row in rows], "o-", color="#56B4E9", label="answered")
    axes[2].plot(rates, [row["goodput"] for row in rows], "s-", color="#009E73", label="answered in time")
    axes[2].set(xlabel="requests a second", ylabel="a second", title="goodput", ylim=(0, None))
    axes[2].legend(frameon=False)
    figure.savefig(args.plot, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write; exits with one line on a problem."""
    args, workload = parse_flags(argv)
    try:
        with ExitStack() as stack:
            url = args.url
            if url is None:
                print("starting the server", file=sys.stderr, flush=True)
                _, url = stack.enter_context(running_server("--model", args.model or DEFAULT_MODEL, *shlex.split(args.serve)))
            model = (args.model if args.url else None) or first_model(url, args.api_key)
            rows = measure(Load(Client(url, model, args.api_key), workload, args), args)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    show(rows, f"{model}, {workload.dataset}: {workload.num_prompts * args.repeats} requests a row")
    best = sustained_rate((row["size"], row["attainment"]) for row in rows if row["kind"] == "rate")
    limits = f"{args.ttft_limit:.0f} ms to the first token and {args.tpot_limit:.0f} ms for each further one"
    print(f"90 % within {limits}: up to {best:.2f} requests a second of those measured")
    if args.plot is not None:
        plot(rows, args)
    if args.output_json is not None:
        write_json(args.output_json, record("latency", vars(args), {"rows": rows, "sustained_rate": best}))


if __name__ == "__main__":
    main()
