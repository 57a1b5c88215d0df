"""The engine on a CPU on the four workloads that results quote, beside transformers and any OpenAI server.

Run it: ``python benchmarks/cpu.py --help``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.datasets import WORKLOADS, make_requests
from solutions.benchmarks.end_to_end import first_model, run_server
from solutions.benchmarks.report import Parser, record, show_table, spread, write_json
from solutions.benchmarks.throughput import Measurement, load_hf, measure_alternately, run_engine, run_hf, warm_up_requests
from solutions.core.config import DEFAULT_MODEL
from solutions.core.engine import LLM
from solutions.core.machine import pick_threads
from solutions.core.worker import pick_dtype
from solutions.models.loader import resolve_model

DESCRIPTION = """\
Output tokens a second, offline, with everything at once; all backends in turn, so what disturbs the machine disturbs all.

  W1  one request, 128 tokens in, 128 out: how long one user waits for a token
  W2  32 requests, 128 in, 128 out: a full batch
  W3  64 requests, 16..512 in, 16..256 out: what continuous batching is for
  W4  32 requests with 512 common tokens and 16 own, 32 out: what prefix caching is for
Prompts are random token ids, greedy, the end of sequence ignored. A server given with --url gets the same token ids as streamed
completions; its time includes HTTP, which works against it by a percent or two.
"""
EPILOG = """\
examples:
  both precisions of this engine, and transformers
    python benchmarks/cpu.py
  the engine against a server that you have started (vLLM, llama.cpp, SGLang, OpenVINO)
    python benchmarks/cpu.py --backends bf16 --url vllm=http://localhost:8001/v1 --repeats 3
"""
BACKENDS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "auto"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8-kv": {"kv_cache_dtype": "int8"},
    "invariant": {"batch_invariant": True},
    "eager": {"enforce_eager": True},
    "portable": {"enable_cpu_kernels": False, "attention_backend": "torch"},
    "float32": {"dtype": "float32"},
}
"""Name → settings of the engine; "hf" is transformers. "bf16" is float32 on a processor that does not multiply bfloat16."""


PAUSE = 4
"""Seconds before a run where a server is measured too: vLLM's threads turn on for a second or more after its last request."""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/cpu.py [flag ...]", description=DESCRIPTION, epilog=EPILOG)
    names = [*BACKENDS, "hf"]
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"what to run (default: {DEFAULT_MODEL})")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=list(WORKLOADS), help="default: all four")
    parser.add_argument("--backends", nargs="*", choices=names, default=["bf16", "int8", "hf"], help="default: bf16 int8 hf")
    parser.add_argument("--url", nargs="+", default=[], metavar="NAME=URL", help="servers to measure too, with /v1 at the end")
    parser.add_argument("--api-key", help="for the servers")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn, of which the median counts (default: 3)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    args = parser.parse_args(argv)
    parser.check_counts(args, "repeats")
    if not all("=" in server for server in args.url):
        parser.error("--url wants NAME=URL, such as vllm=http://localhost:8001/v1")
    return args


Runner = Callable[[list], Measurement]


def make_runners(args: argparse.Namespace) -> dict[str, Runner]:
    """Name → what runs a list of requests.

    Raises:
        ValueError: a model cannot be had, or a server does not answer.
    """
    runners: dict[str, Runner] = {}
    for name in args.backends:
        print(f"loading {name}", file=sys.stderr, flush=True)
        if name == "hf":
            source = resolve_model(args.model)
            dtype = pick_dtype("auto", torch.device("cpu"), source.config.torch_dtype)
            model = load_hf(source, "auto", dtype, torch.device("cpu"))
            runners[name] = lambda requests, model=model: run_hf(model, requests)
        else:
            llm = LLM(args.model, device="cpu", touch_kv_cache=True, **BACKENDS[name])
            runners[name] = lambda requests, llm=llm: run_engine(llm, requests)
    for server in args.url:
        name, _, url = server.partition("=")
        served = first_model(url, args.api_key)
        runners[name] = lambda requests, url=url, served=served: run_server(url, served, requests, args.api_key)
    return runners


def measure(runners: dict[str, Runner], workload: str, repeats: int, pause: float) -> dict[str, list[Measurement]]:
    """All backends on one workload, warmed up by short requests of the same shape, with a pause in seconds before each run."""
    requests = make_requests(WORKLOADS[workload])
    for run in runners.values():
        run(warm_up_requests(requests))

    def say(name: str, number: int) -> None:
        print(f"{workload}, {name}: run {number} of {repeats}", file=sys.stderr, flush=True)
        time.sleep(pause)

    bound = {name: lambda run=run: run(requests) for name, run in runners.items()}
    return measure_alternately(bound, repeats, say)


def summarise(results: dict[str, dict[str, list[Measurement]]]) -> dict[str, Any]:
    """Workload → backend → medians with their spread."""
    return {
        workload: {
            name: {
                "output_tokens_per_second": spread(run.output_tokens_per_second for run in runs),
                **{
                    key: spread(run.details[key] for run in runs)
                    for key in ("ttft_ms_median", "tpot_ms_median")
                    if key in runs[0].details
                },
            }
            for name, runs in by_name.items()
        }
        for workload, by_name in results.items()
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table: a row a backend."""
    names = list(next(iter(summary.values())))
    rows = []
    for name in names:
        cells = []
        for by_name in summary.values():
            one = by_name[name]
            rate = one["output_tokens_per_second"]
            times = [f"{one[key]['median']:.0f}" if key.startswith("ttft") else f"{one[key]['median']:.1f}"
                     for key in ("ttft_ms_median", "tpot_ms_median") if key in one]  # fmt: skip
            low, high = (f"{rate[bound]:.0f}" for bound in ("min", "max"))
            cells.append(f"{rate['median']:.0f}, {low}-{high}" + (f" ({', '.join(times)})" if times else ""))
        rows.append([name, *cells])
    title = "Output tokens a second, median, range (TTFT, TPOT in ms)"
    show_table(f"{title}; {torch.get_num_threads()} threads", ["", *summary], rows)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    torch.set_num_threads(pick_threads())
    try:
        runners = make_runners(args)
        summary = summarise({name: measure(runners, name, args.repeats, PAUSE if args.url else 0) for name in args.workloads})
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    show(summary)
    if args.output_json:
        write_json(args.output_json, record("cpu", vars(args) | {"threads": torch.get_num_threads()}, summary))


if __name__ == "__main__":
    main()
