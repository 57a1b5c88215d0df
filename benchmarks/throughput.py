"""How many tokens a second: this engine, and beside it transformers in static batches, on the same requests.

Offline throughput: all requests are there at once, and the clock runs until the last token is out.

Output tokens a second count only what the requests asked for. A static batch of transformers also computes tokens that
nobody asked for, because it goes on until its longest output is done; the last column of the table says how much of its
work was useful. Both backends run the same weights in the same precision with the same number of threads, greedy, with
the end of sequence ignored. Numbers are comparable only on an idle machine; the record keeps the load that it saw.

DATASETS
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
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks import datasets
from solutions.benchmarks.comparison import in_turns, rates, ratio
from solutions.benchmarks.report import Flags, Parser, finish, one_line_errors, say, show_table, spread
from solutions.benchmarks.throughput import Measurement, load_hf, peak_memory_bytes, run_engine, run_hf, warmed
from solutions.core.cli import place
from solutions.core.config import EngineConfig, add_engine_flags, config_from_flags
from solutions.core.engine import LLM
from solutions.core.platform.machine import pick_threads
from solutions.core.startup import longest_sequence
from solutions.core.worker import pick_device, pick_dtype
from solutions.models.loader import resolve_model

BACKENDS = {"engine": ("engine",), "hf": ("hf",), "both": ("engine", "hf"), "engine,hf": ("engine", "hf")}
RATES = ("output_tokens_per_second", "total_tokens_per_second")
LABELS = {"engine": "this engine", "hf": "transformers"}


def parse_flags(argv: list[str] | None) -> tuple[Flags, datasets.Workload]:
    """Flags and the workload that they describe; exits with one line if they do not fit together."""
    parser = Parser("throughput", __doc__.replace("DATASETS", datasets.DATASETS_HELP))
    datasets.add_workload_flags(parser)
    group = parser.add_argument_group("measurement")
    text = "this engine, transformers, or both in turn"
    parser.add_flag("--backend", "engine", text, group, choices=tuple(BACKENDS), metavar="{engine,hf,both}")
    parser.add_flag("--batch-size", 32, "size of transformers' static batches", group)
    parser.add_flag("--repeats", 1, "runs of each backend, in turn", group)
    add_engine_flags(parser)
    return datasets.parse_workload(parser, argv)


def load(args: Flags, workload: datasets.Workload, config: EngineConfig) -> dict[str, Callable[[], Measurement]]:
    """The backends that were asked for, warm; the flags get the precision that they run in. Raises ValueError if the model
    cannot be had or the requests do not fit it."""
    source, device = resolve_model(config.model, config.load_format), pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, source.config.torch_dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    requests = datasets.make_requests(workload, source.config.vocab_size, args.data_seed)
    datasets.check_context(requests, longest_sequence(config, source.config))
    if device.type == "cpu":
        torch.set_num_threads(pick_threads())
    runners = {}
    for name in BACKENDS[args.backend]:
        say(f"loading {LABELS[name]}")
        if name == "engine":
            run = partial(run_engine, LLM(**config.to_args()), show_progress=True)
        else:
            model = load_hf(source, config.load_format, dtype, device)
            run = partial(run_hf, model, batch_size=args.batch_size, show_progress=True)
        runners[name] = warmed(run, requests)
    return runners


def summarise(results: dict[str, list[Measurement]]) -> dict[str, Any]:
    """Results ready for JSON: every run, medians with their spread, and the ratio if there are two backends."""
    summary: dict[str, Any] = {}
    for name, runs in results.items():
        every = [asdict(run) | {key: getattr(run, key) for key in RATES} for run in runs]
        summary[name] = {key: spread(run[key] for run in every) for key in RATES} | {"runs": every}
    if len(results) == 2:
        summary["ratio_engine_to_hf"] = asdict(ratio(rates(results["engine"]), rates(results["hf"])))
    return summary | {"peak_memory_bytes": peak_memory_bytes()}  # with two backends, both models are in it


def show(dataset: str, results: dict[str, list[Measurement]], summary: dict[str, Any], setting: str) -> None:
    rows = []
    for name, runs in results.items():
        rate, total = (summary[name][key] for key in RATES)
        seconds = spread(run.seconds for run in runs)["median"]
        own = [rate["median"], rate["min"], rate["max"], total["median"], seconds]
        useful = f"{runs[0].num_output_tokens / runs[0].num_computed_tokens:.0%}"
        rows.append([LABELS[name], *(f"{value:,.1f}" for value in own), useful])
    run = next(iter(results.values()))[0]
    work = f"{run.num_requests} requests, {run.num_prompt_tokens:,} prompt tokens, {run.num_output_tokens:,} output tokens"
    columns = ["", "output tok/s", "lowest", "highest", "total tok/s", "seconds", "useful work"]
    memory = f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    show_table(f"{dataset}: {work}; {setting}", columns, rows, memory)
    if found := summary.get("ratio_engine_to_hf"):
        print(f"this engine / transformers: {found['mean']:.2f}x ({found['low']:.2f} to {found['high']:.2f})")
    if "engine" in results:
        details = results["engine"][-1].details
        print("engine, last run: " + ", ".join(f"{name} {value:,.6g}" for name, value in details.items()))


def main(argv: list[str] | None = None) -> None:
    args, workload = parse_flags(argv)
    with one_line_errors():
        config = config_from_flags(args)
        runners = load(args, workload, config)
        results = in_turns(runners, args.repeats, lambda name, number: say(f"{LABELS[name]}: run {number} of {args.repeats}"))
    summary = summarise(results)
    show(workload.dataset, results, summary, f"{args.model}, {args.dtype}, {place(pick_device(config.device))}")
    finish(args, "throughput", summary, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
