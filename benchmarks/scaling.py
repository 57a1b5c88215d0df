"""One model on 1, 2, 4 and 8 devices, and what sums over ranks cost by each way to make them.

Run it: ``python benchmarks/scaling.py --help``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.report import Parser, record, show_table, write_json
from solutions.benchmarks.scaling import (
    CollectiveTime,
    RankTime,
    measure_collectives,
    measure_ranks,
    medians,
    possible_ranks,
    write_shape,
)
from solutions.core.platform import native
from solutions.models.config.entries import ModelError
from solutions.models.loader import resolve_model

DESCRIPTION = """\
How much faster a model runs when its matrices are cut over more devices (--tensor-parallel-size), each rank on a GPU of its own
or, without any, on one core. Weights are random, so nothing is downloaded. Sizes for which there are no devices are left out.
Beside it on a CPU: the time of one sum over two ranks by the ring of the course, by gloo and through shared memory.
"""
COLLECTIVE_SIZES, COLLECTIVE_REPEATS = [1 << n for n in range(8, 25, 2)], 50


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/scaling.py [flag ...]", description=DESCRIPTION)
    parser.add_argument("--model", default="1b", help="alias or folder; 1b: the shape of TinyLlama-1.1B (default: 1b)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="sizes to measure (default: 1 2 4 8)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="of decode steps (default: 1 8)")
    parser.add_argument("--context", type=int, default=256, help="tokens of each sequence (default: 256)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the measured prompt (default: 256)")
    parser.add_argument("--steps", type=int, default=24, help="measurements, of which the median counts (default: 24)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size, in turn; medians count (default: 3)")
    parser.add_argument("--disable-cpu-kernels", action="store_true", help="PyTorch's products, and sums through gloo")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw sums by size and way, as PNG or SVG")
    args = parser.parse_args(argv)
    counts = *args.ranks, *args.batches, args.prompt, args.steps, args.repeats
    if min(counts) < 1 or args.context <= 2 * args.steps:
        parser.error("all counts must be at least 1, and --context more than twice --steps")
    return args


def show_ranks(model: str, times: list[RankTime]) -> None:
    """Print how each kind of step scales."""
    first = {(t.what, t.batch): t for t in reversed(times)}
    rows = []
    for t in times:
        share = "" if t.communication is None else f"{t.communication:.1%}"
        faster = first[t.what, t.batch].seconds / t.seconds
        reads = "" if t.read_bandwidth is None else f"{t.read_bandwidth / 1e9:.1f}"
        bandwidths = [f"{t.weight_bandwidth / 1e9:.1f}", reads]
        cells = [str(t.ranks), f"{t.context:.0f}", f"{t.seconds * 1e3:.2f}", *bandwidths, share]
        rows.append([f"{t.what}, batch {t.batch}", *cells, f"{faster:.2f}x"])
    where = "GPUs" if torch.cuda.is_available() else "cores"
    columns = ["step", where, "context", "ms", "weights, GB/s", "can read, GB/s", "in sums", "as fast"]
    show_table(f"{model} in bfloat16, random weights", columns, rows)


def show_collectives(times: list[CollectiveTime]) -> None:
    """Print the time of one sum by size and way."""
    methods = list(dict.fromkeys(t.method for t in times))
    seconds = {(t.method, t.bytes): t.seconds for t in times}
    rows = [[f"{size:,}", *(f"{seconds[m, size] * 1e6:,.1f}" for m in methods)] for size in sorted({t.bytes for t in times})]
    show_table(f"One sum over {times[0].ranks} ranks of one core each, µs", ["bytes", *methods], rows)


def draw(times: list[CollectiveTime], path: Path) -> None:
    """Time of a sum against its size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method, colour in {"ring": "#E69F00", "gloo": "#CC79A7", "shared memory": "#0072B2"}.items():
        points = [(t.bytes, t.seconds * 1e6) for t in times if t.method == method]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=method)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="µs, median of the slowest rank")
    axes.set_title(f"One all-reduce over {times[0].ranks} ranks of one host")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    sizes = possible_ranks(sorted(set(args.ranks)))
    if not sizes:
        sys.exit(f"error: --ranks {' '.join(map(str, args.ranks))}: this machine has fewer devices")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        model = str(write_shape(Path(folder))) if args.model == "1b" else args.model
        runs = []
        try:
            resolve_model(model, "dummy")  # says now if there is none
            for size in track(sizes * args.repeats, "ranks", transient=True):
                kernels = not args.disable_cpu_kernels
                runs += measure_ranks(model, size, args.batches, args.context, args.prompt, args.steps, kernels)
        except (ModelError, RuntimeError) as error:
            sys.exit(f"error: {error}")
        times = medians(runs)
        show_ranks(args.model, times)
        results = {"steps": [asdict(t) for t in times], "runs": [asdict(t) for t in runs]}
        if not torch.cuda.is_available() and native.load() is not None and 2 in sizes:
            memory = Path(folder) / "memory"
            memory.touch()
            collectives = measure_collectives(2, COLLECTIVE_SIZES, COLLECTIVE_REPEATS, memory)
            show_collectives(collectives)
            results["collectives"] = [asdict(t) for t in collectives]
            if args.plot:
                draw(collectives, args.plot)
    if args.output_json:
        write_json(args.output_json, record("scaling", vars(args), results))


if __name__ == "__main__":
    main()
