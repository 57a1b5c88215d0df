"""Microseconds that a step costs the host besides the model, a running sequence: scheduling, arrays, results, text.

Run it: ``python benchmarks/overhead.py --help``.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.batching.sequence import RequestOutputKind
from solutions.benchmarks.overhead import PHASES, Overhead, measure, slope
from solutions.benchmarks.report import Parser, record, show_table, write_json
from solutions.core.config import DEFAULT_MODEL
from solutions.core.platform.machine import settle_heap

DESCRIPTION = """\
What a decode step costs besides the model. On a fast device the model waits for the host, so every microsecond here is
lost throughput. The engine is the real one; a fake executor gives each sequence the next token of a text.

  schedule   who runs, how many tokens each, which blocks they need (with the prefix cache: hashes of full blocks)
  arrays     the flat batch: token ids, positions, slots, block tables
  update     append the new tokens, see who is done, free
  output     DELTA: text of each new token, as a streaming server needs it; FINAL_ONLY: nothing before the end
Goals, on one core: at most 8 µs a sequence and step with text, 4 µs without, and no more at 1,024 sequences than at 64.
"""
EPILOG = """\
examples:
  the whole table
    python benchmarks/overhead.py --output-json overhead.json
  where the time goes, function by function
    python -m cProfile -s tottime benchmarks/overhead.py --num-seqs 256 | head -40
"""
KINDS = (RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY)
GOALS = {"DELTA": 8.0, "FINAL_ONLY": 4.0}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/overhead.py [flag ...]", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--num-seqs", type=int, nargs="+", default=[64, 256, 1024], metavar="N", help="running (default: 64 256 1024)"
    )
    parser.add_argument("--steps", type=int, default=32, help="measured steps in a round (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (default: 5)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"whose tokenizer makes the text (default: {DEFAULT_MODEL})")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    args = parser.parse_args(argv)
    parser.check_counts(args, "num_seqs", "steps", "rounds")
    return args


def pin_to_one_core() -> None:
    """Keep this thread on one core with warm caches, where the system can, and tensors from starting more threads.

    The heap is settled as in the server's process.
    """
    settle_heap()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def show(results: list[Overhead]) -> None:
    """Print the table and how the cost grows."""
    columns = ["prefix cache, output", "running", *PHASES, "rest", "total µs", "range", "goal"]
    rows = [
        [
            f"{'on' if r.prefix_caching else 'off'}, {r.output_kind}", str(r.num_seqs),
            *(f"{r.phases[name]:.2f}" for name in (*PHASES, "rest")), f"{r.total:.2f}", f"{r.lowest:.2f}–{r.highest:.2f}",
            f"{GOALS[r.output_kind]:g} {'met' if r.total <= GOALS[r.output_kind] else 'MISSED'}",
        ]
        for r in results
    ]  # fmt: skip
    show_table("Host time of a decode step, µs a running sequence (CPU time of one thread)", columns, rows)
    for (caching, kind), costs in growth(results).items():
        text = f"prefix cache {'on' if caching else 'off'}, {kind}"
        print(f"{text}: a sequence costs {slope(costs):.2f}x as much at {max(costs)[0]} as at {min(costs)[0]} running")


def growth(results: list[Overhead]) -> dict[tuple[bool, str], list[tuple[int, float]]]:
    """(sequences, cost) of every setting that was measured with more than one number of sequences."""
    costs: dict[tuple[bool, str], list[tuple[int, float]]] = {}
    for r in results:
        costs.setdefault((r.prefix_caching, r.output_kind), []).append((r.num_seqs, r.total))
    return {setting: every for setting, every in costs.items() if len(every) > 1}


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write; exits with one line on a problem."""
    args = parse_flags(argv)
    pin_to_one_core()
    settings = [(caching, kind, n) for caching in (True, False) for kind in KINDS for n in sorted(args.num_seqs)]
    try:
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            results = [
                measure(n, caching, kind, rounds=args.rounds, steps=args.steps, tokenizer_of=args.model)
                for caching, kind, n in bar.track(settings, description="measuring")
            ]
    except ValueError as error:
        sys.exit(f"error: {error}")
    show(results)
    if args.output_json is not None:
        rows = [asdict(result) for result in results]
        write_json(args.output_json, record("overhead", vars(args), {"microseconds_per_sequence_and_step": rows}))


if __name__ == "__main__":
    main()
