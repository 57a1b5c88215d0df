"""Each CPU kernel beside the machine's limits, PyTorch's operators and the portable path.

Run it: ``python benchmarks/kernels.py --help``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.kernels import Ceilings, Timing, all_kernels, measure_ceilings
from solutions.benchmarks.report import Parser, record, show_table, write_json
from solutions.core.platform import native
from solutions.core.platform.machine import pick_threads

DESCRIPTION = """\
What the C++ kernels reach on this machine. A kernel's floor is its bytes over the measured read bandwidth or its operations
over the best measured matrix product, whichever takes longer; the share says how near it comes.

  linear     the matrix products of SmolLM2-135M, packed; beside PyTorch's on plain weights of the same type (int8, int4: bf16)
  attention  one layer over shuffled blocks of 16; beside the batched PyTorch path, and PyTorch's own on contiguous K and V
  rms_norm   between two products
"""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/kernels.py [flag ...]", description=DESCRIPTION)
    parser.add_argument(
        "--repeats", type=int, default=15, help="measurements of each, of which the median counts (default: 15)"
    )
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the shares, as PNG or SVG")
    args = parser.parse_args(argv)
    parser.check_counts(args, "repeats")
    return args


def show(ceilings: Ceilings, timings: list[Timing]) -> None:
    """Print the table."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceilings.operations.items())
    rows = []
    for t in timings:
        peers = ", ".join(f"{name} {seconds / t.seconds:.1f}x" for name, seconds in t.peers.items())
        rate = f"{t.bytes / t.seconds / 1e9:.1f}", f"{t.operations / t.seconds / 1e9:.0f}"
        rows.append([f"{t.kernel}, {t.size}", t.precision, f"{t.seconds * 1e6:.1f}", *rate, f"{t.share:.0%}", peers])
    columns = ["kernel", "type", "µs", "GB/s", "GFLOP/s", "of the floor", "how many times as long others take"]
    title = f"Reads {ceilings.read_bytes / 1e9:.0f} GB/s; matrix products, GFLOP/s: {rates}; {torch.get_num_threads()} threads"
    show_table(title, columns, rows)


def draw(timings: list[Timing], path: Path) -> None:
    """The share of the floor that each kernel and its peers reach."""
    import matplotlib.pyplot as plt

    colours = {"ours": "#0072B2", "torch": "#E69F00", "portable": "#009E73", "SDPA, contiguous": "#CC79A7"}
    figure, axes = plt.subplots(figsize=(10, 0.22 * len(timings) + 1.5), layout="constrained")
    for row, t in enumerate(timings):
        axes.barh(row, t.share, color="#D9E8F2", height=0.9)
        for name, seconds in {"ours": t.seconds, **t.peers}.items():
            axes.plot(t.floor / seconds, row, "o", color=colours[name], markersize=5)
    axes.set_yticks(range(len(timings)), [f"{t.kernel}, {t.size}, {t.precision}" for t in timings], fontsize=7)
    axes.set_ylim(len(timings) - 0.5, -0.5)
    axes.set_xlim(0, max(1.1, *(t.share for t in timings)))
    axes.set_xlabel("share of what memory or multipliers allow (1 is the floor)")
    axes.set_title("CPU kernels against this machine's limits")
    axes.legend([plt.Line2D([], [], marker="o", linestyle="", color=c) for c in colours.values()], colours, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    if native.load() is None:
        sys.exit(f"error: there are no C++ kernels here: {native.why_not}")
    torch.set_num_threads(pick_threads())
    native.set_threads(torch.get_num_threads())
    torch.manual_seed(0)
    with torch.inference_mode():
        ceilings = measure_ceilings(args.repeats)
        timings = [measure() for measure in track(all_kernels(ceilings, args.repeats), "measuring", transient=True)]
    show(ceilings, timings)
    if args.output_json:
        results = {"ceilings": asdict(ceilings), "kernels": [asdict(t) | {"share": t.share} for t in timings]}
        write_json(args.output_json, record("kernels", vars(args), results))
    if args.plot:
        draw(timings, args.plot)


if __name__ == "__main__":
    main()
