"""How many tokens a second: this engine, and beside it transformers in static batches, on the same requests.

Run it: ``python benchmarks/throughput.py --help``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.comparison import in_turns, rates, ratio
from solutions.benchmarks.datasets import (
    DATASETS_HELP,
    BenchRequest,
    Workload,
    add_workload_flags,
    check_context,
    make_requests,
    pick_workload,
)
from solutions.benchmarks.report import Parser, record, show_table, spread, write_json
from solutions.benchmarks.throughput import (
    Measurement,
    load_hf,
    peak_memory_bytes,
    run_engine,
    run_hf,
    warmed,
)
from solutions.core.config import add_engine_flags, config_from_flags
from solutions.core.engine import LLM
from solutions.core.platform.machine import pick_threads
from solutions.core.worker import pick_device, pick_dtype
from solutions.models.loader import resolve_model

DESCRIPTION = f"""\
Offline throughput: all requests are there at once, and the clock runs until the last token is out.

Output tokens a second count only what the requests asked for. A static batch of transformers also computes tokens that
nobody asked for, because it goes on until its longest output is done; the last column of the table says how much of its
work was useful. Both backends run the same weights in the same precision with the same number of threads, greedy, with
the end of sequence ignored.

{DATASETS_HELP}"""
EPILOG = """\
examples:
  the engine alone
    python benchmarks/throughput.py --model smollm2-135m --input-len 128 --output-len 256
  against transformers, three times each in turn, with a record of it
    python benchmarks/throughput.py --dataset mixed --backend both --repeats 3 --output-json mixed.json
  what one optimization is worth: run with it and without it
    python benchmarks/throughput.py --dataset shared-prefix
    python benchmarks/throughput.py --dataset shared-prefix --no-enable-prefix-caching
  a model that you do not have: random weights run as fast as real ones
    python benchmarks/throughput.py --model llama-7b --load-format dummy --num-prompts 8 --output-len 16
Numbers are comparable only on an idle machine; the record keeps the load that it saw.
"""
BACKENDS = {"engine": ("engine",), "hf": ("hf",), "both": ("engine", "hf"), "engine,hf": ("engine", "hf")}
LABELS = {"engine": "this engine", "hf": "transformers"}


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, Workload]:
    """Flags and the workload that they describe; exits with one line if they do not fit together."""
    parser = Parser(usage="python benchmarks/throughput.py [flag ...]", description=DESCRIPTION, epilog=EPILOG)
    add_workload_flags(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--backend", choices=tuple(BACKENDS), default="engine", metavar="{engine,hf,both}",
        help="this engine, transformers, or both in turn (default: engine)",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=32, help="of transformers' static batches (default: 32)")
    group.add_argument("--repeats", type=int, default=1, help="runs of each backend, in turn (default: 1)")
    group.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    parser.check_counts(args, "repeats", "batch_size")
    try:
        return args, pick_workload(args)
    except ValueError as error:
        parser.error(str(error))


class Bench:
    """The backends that were asked for, loaded and warm.

    Args:
        args: parsed flags. workload: what to run.

    Raises:
        ValueError: the model cannot be had or the requests do not fit it.
    """

    def __init__(self, args: argparse.Namespace, workload: Workload) -> None:
        config = config_from_flags(args)
        source = resolve_model(config.model, config.load_format)
        self.device = device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, device, source.config.torch_dtype)
        self.requests = make_requests(workload, source.config.vocab_size, args.data_seed)
        check_context(self.requests, config.max_model_len or source.config.max_position_embeddings)
        self.runners: dict[str, Callable[[], Measurement]] = {}
        if device.type == "cpu":
            torch.set_num_threads(pick_threads())
        if "engine" in BACKENDS[args.backend]:
            say("loading the engine")
            llm = LLM(**config.to_args())
            self._add("engine", lambda requests: run_engine(llm, requests, True))
        if "hf" in BACKENDS[args.backend]:
            say("loading transformers")
            model = load_hf(source, config.load_format, self.dtype, device)
            self._add("hf", lambda requests: run_hf(model, requests, args.batch_size, True))

    def _add(self, name: str, run: Callable[[list[BenchRequest]], Measurement]) -> None:
        self.runners[name] = warmed(run, self.requests)


def say(line: str) -> None:
    """A line about what is going on, beside the results."""
    print(line, file=sys.stderr, flush=True)


def summarise(results: dict[str, list[Measurement]]) -> dict[str, Any]:
    """Results ready for JSON: every run, medians with their spread, and the ratio if there are two backends."""
    summary: dict[str, Any] = {
        name: {
            "output_tokens_per_second": spread(run.output_tokens_per_second for run in runs),
            "total_tokens_per_second": spread(run.total_tokens_per_second for run in runs),
            "runs": [run.as_dict() for run in runs],
        }
        for name, runs in results.items()
    }
    if len(results) == 2:
        summary["ratio_engine_to_hf"] = asdict(ratio(rates(results["engine"]), rates(results["hf"])))
    # with two backends, both models are in it
    summary["peak_memory_bytes"] = peak_memory_bytes()
    return summary


def show(workload: Workload, results: dict[str, list[Measurement]], summary: dict[str, Any], setting: str) -> None:
    """Print the table."""
    rows = []
    for name, runs in results.items():
        rate, total = summary[name]["output_tokens_per_second"], summary[name]["total_tokens_per_second"]
        seconds = spread(run.seconds for run in runs)["median"]
        useful = runs[0].num_output_tokens / runs[0].num_computed_tokens
        own = [rate["median"], rate["min"], rate["max"], total["median"], seconds]
        rows.append([LABELS[name], *(f"{value:,.1f}" for value in own), f"{useful:.0%}"])
    run = next(iter(results.values()))[0]
    title = (
        f"{workload.dataset}: {run.num_requests} requests, {run.num_prompt_tokens:,} prompt tokens, "
        f"{run.num_output_tokens:,} output tokens; {setting}"
    )
    columns = ["", "output tok/s", "lowest", "highest", "total tok/s", "seconds", "useful work"]
    show_table(title, columns, rows, caption=f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    if found := summary.get("ratio_engine_to_hf"):
        print(f"this engine / transformers: {found['mean']:.2f}x ({found['low']:.2f} to {found['high']:.2f})")
    if "engine" in results:
        details = results["engine"][-1].details
        print("engine, last run: " + ", ".join(f"{name} {value:,.6g}" for name, value in details.items()))


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write; exits with one line on a problem."""
    args, workload = parse_flags(argv)
    try:
        bench = Bench(args, workload)
        results = in_turns(
            bench.runners, args.repeats, lambda name, number: say(f"{LABELS[name]}: run {number} of {args.repeats}")
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    summary = summarise(results)
    place = f"{torch.get_num_threads()} threads" if bench.device.type == "cpu" else torch.cuda.get_device_name(bench.device)
    setting = f"{args.model}, {str(bench.dtype).removeprefix('torch.')}, {place}"
    show(workload, results, summary, setting)
    if args.output_json is not None:
        flags = vars(args) | {"dtype": str(bench.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
        write_json(args.output_json, record("throughput", flags, summary))
        say(f"written: {args.output_json}")


if __name__ == "__main__":
    main()
