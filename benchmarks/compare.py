"""This engine, transformers, and any OpenAI server on the same requests, in turns: who is faster, and is it certain?

Output tokens a second with everything there at once. All systems run the same requests in turns, every second time in the
opposite order, so what disturbs the machine disturbs all; the first one is then compared with each other, run by run.

  W1  one request, 128 tokens in, 128 out: how long one user waits for a token
  W2  32 requests, 128 in, 128 out: a full batch
  W3  64 requests, 16..512 in, 16..256 out: what continuous batching is for
  W4  32 requests with 512 common tokens and 16 own, 32 out: what prefix caching is for
  W5  32 turns of 8 conversations, 32 new tokens each, 64 out: what people do
  W6  32 prompts that repeat themselves, 128 in, 128 out: what n-gram speculation is for
Prompts are random token ids, greedy, the end of sequence ignored; a system that does other work ends the comparison. A server
gets the ids as streamed completions; its time includes HTTP, which works against it by some percent.

systems of --backends:
  bf16 int8 int4 int8-kv invariant eager portable float32   this engine with those settings, offline
  server                                                    this engine's server
  hf                                                        transformers, static batches of 32
  vllm sglang llama.cpp ik_llama.cpp                        their servers, started if they are installed

examples:
  this engine in two precisions, and transformers
    python benchmarks/compare.py
  server against server; VLLM and SGLANG may name their environments; ik_llama.cpp's program is found as ik-llama-server
    python benchmarks/compare.py --backends server vllm --repeats 5 --plot servers.png
  what is left of it beside one busy process
    python benchmarks/compare.py --backends bf16 int8 --busy 1
  a server that you have started, such as OpenVINO's, which has the model in a form of its own
    python benchmarks/compare.py --backends bf16 --url openvino=http://localhost:8000/v3
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.comparison import in_turns, rates, ratio
from solutions.benchmarks.datasets import WORKLOADS, BenchRequest, make_requests
from solutions.benchmarks.end_to_end import first_model, run_server
from solutions.benchmarks.report import Flags, Parser, drawing, finish, one_line_errors, say, show_table, spread
from solutions.benchmarks.servers import MAX_SEQUENCES, STARTERS, running_server, start
from solutions.benchmarks.throughput import Measurement, load_hf, run_engine, run_hf, warm_up_requests
from solutions.core.cli import place
from solutions.core.config import DEFAULT_MODEL
from solutions.core.engine import LLM
from solutions.core.platform.machine import pick_threads
from solutions.core.worker import pick_device, pick_dtype
from solutions.models.loader import resolve_model

SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "auto"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "gguf": {"quantization": "gguf"},
    "int8-kv": {"kv_cache_dtype": "int8"},
    "invariant": {"batch_invariant": True},
    "eager": {"enforce_eager": True},
    "portable": {"enable_cpu_kernels": False, "attention_backend": "torch"},
    "float32": {"dtype": "float32"},
}
"""Name → settings of the engine. "bf16" is float32 on a processor that does not multiply bfloat16."""

PAUSE = 4
"""Seconds before a run where a server is measured too: vLLM's threads turn on for a second or more after its last request."""

WAITS = ("ttft_ms_median", "tpot_ms_median")
Runner = Callable[[list[BenchRequest]], Measurement]


def parse_flags(argv: list[str] | None) -> Flags:
    """Flags; exits with one line if one is wrong."""
    parser = Parser("compare", __doc__, "speeds and ratios")
    parser.add_flag("--model", DEFAULT_MODEL, "what to run")
    parser.add_flag("--workloads", ["W1", "W2", "W3", "W4"], "see above", choices=tuple(WORKLOADS))
    names = [*SETTINGS, "hf", "server", *STARTERS]
    parser.add_flag("--backends", ["bf16", "int8", "hf"], "see above", nargs="*", choices=names, metavar="NAME")
    parser.add_argument("--url", nargs="+", default=[], metavar="NAME=URL", help="servers to measure; URL has /completions")
    parser.add_argument("--api-key", help="key for the servers of --url")
    parser.add_flag("--repeats", 3, "runs of each, in turns")
    parser.add_argument("--busy", type=int, default=0, help="measure again beside 1 to so many processes that never rest")
    args = parser.parse_args(argv)
    if not all("=" in server for server in args.url):
        parser.error("--url wants NAME=URL, such as vllm=http://localhost:8001/v1")
    if not args.backends and not args.url:
        parser.error("there is nothing to measure: give --backends or --url")
    return args


def make_runner(name: str, args: Flags, stack: ExitStack) -> Runner:
    """What runs a list of requests on a system; what was started for it ends with `stack`. Raises ValueError if the model
    cannot be had, RuntimeError if a server is not installed, or does not start."""
    say(f"loading {name}")
    if name == "hf":
        source, device = resolve_model(args.model), pick_device("auto")
        return partial(run_hf, load_hf(source, "auto", pick_dtype("auto", device, source.config.torch_dtype), device))
    if name in SETTINGS:
        return partial(run_engine, LLM(args.model, touch_kv_cache=True, **SETTINGS[name]))
    if name == "server":
        flags = ("--model", args.model, "--max-num-seqs", str(MAX_SEQUENCES), "--touch-kv-cache")
        _, url = stack.enter_context(running_server(*flags))
    else:
        url = stack.enter_context(start(name, args.model))
    return partial(run_server, url, first_model(url))


def measure(runners: dict[str, Runner], workload: str, repeats: int, pause: float) -> dict[str, list[Measurement]]:
    """All systems on one workload, with a pause in seconds before each run. Every turn has prompts of its own: a server's
    prefix cache cannot be emptied from outside, and would know those of the turn before. Raises ValueError if they did not do
    the same work, or a server refused some of it."""
    turns = [make_requests(WORKLOADS[workload], token_seed=turn) for turn in range(1, repeats + 1)]

    def on_start(name: str, number: int) -> None:
        say(f"{workload}, {name}: run {number} of {repeats}")
        time.sleep(pause)

    def turn_by_turn(run: Runner) -> Callable[[], Measurement]:
        run(warm_up_requests(turns[0]))
        left = iter(turns)
        return lambda: run(next(left))

    return in_turns({name: turn_by_turn(run) for name, run in runners.items()}, repeats, on_start)


def summarise(results: dict[str, dict[str, list[Measurement]]]) -> dict[str, Any]:
    """Workload → system → medians with their spread, and how many times faster the first system is."""
    summary: dict[str, Any] = {}
    for workload, by_name in results.items():
        first = next(iter(by_name))
        summary[workload] = {}
        for name, runs in by_name.items():
            entry: dict[str, Any] = {"output_tokens_per_second": spread(rates(runs))}
            entry |= {key: spread(run.details[key] for run in runs) for key in WAITS if key in runs[0].details}
            if name != first:
                found = ratio(rates(by_name[first]), rates(runs))
                entry[f"{first}_over_this"] = asdict(found) | {"is_clear": found.is_clear}
            summary[workload][name] = entry
    return summary


def show(summary: dict[str, Any], setting: str) -> None:
    """Print a table of speeds and one of ratios: a row a system, a column a workload."""
    first, *others = next(iter(summary.values()))
    speeds = []
    for name in (first, *others):
        cells = []
        for entry in (by_name[name] for by_name in summary.values()):
            rate = entry["output_tokens_per_second"]
            waits = [f"{entry[key]['median']:.1f}" for key in WAITS if key in entry]
            shown = f" ({', '.join(waits)})" if waits else ""
            cells.append(f"{rate['median']:.0f}, {rate['min']:.0f}-{rate['max']:.0f}{shown}")
        speeds.append([name, *cells])
    show_table(f"Output tokens a second, median, range (TTFT, TPOT in ms); {setting}", ["", *summary], speeds)
    if not others:
        return
    rows = []
    for name in others:
        found = [by_name[name][f"{first}_over_this"] for by_name in summary.values()]
        cells = [f"{r['mean']:.2f} ({r['low']:.2f}-{r['high']:.2f}){'' if r['is_clear'] else ' ?'}" for r in found]
        rows.append([name, *cells])
    caption = "geometric mean of the pairs of runs, and its 95 % interval; ? is within the noise, or a single pair"
    show_table(f"How many times faster {first} is", ["than", *summary], rows, caption=caption)


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw the speeds, with a line from the slowest to the fastest run."""
    colors = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#999999")
    with drawing(path, len(summary), dpi=120, figsize=(3 * len(summary), 3.2), squeeze=False) as panels:
        for axes, (workload, by_name) in zip(panels[0], summary.items(), strict=True):
            for number, (name, entry) in enumerate(by_name.items()):
                rate = entry["output_tokens_per_second"]
                axes.barh(name, rate["median"], color=colors[number % len(colors)])
                axes.plot([rate["min"], rate["max"]], [name, name], color="black", lw=1.5)
                axes.text(rate["max"], number, f" {rate['median']:.0f}", va="center")
            axes.set(title=workload, xlabel="output tokens a second")
            axes.margins(x=0.25)
            axes.invert_yaxis()


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    device = pick_device("auto")
    if device.type == "cpu":
        torch.set_num_threads(pick_threads())
    with one_line_errors(RuntimeError), ExitStack() as stack:
        runners = {name: make_runner(name, args, stack) for name in args.backends}
        for name, _, url in (server.partition("=") for server in args.url):
            runners[name] = partial(run_server, url, first_model(url, args.api_key), api_key=args.api_key)
        pause = PAUSE if runners.keys() - SETTINGS.keys() - {"hf"} else 0
        found = {}
        for busy in range(args.busy + 1):
            if busy:
                stack.callback(subprocess.Popen([sys.executable, "-c", "while True: pass"]).kill)
            for name in args.workloads:
                found[f"{name} beside {busy}" if busy else name] = measure(runners, name, args.repeats, pause)
    summary = summarise(found)
    show(summary, place(device))
    finish(args, "compare", summary, partial(draw, summary), threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
