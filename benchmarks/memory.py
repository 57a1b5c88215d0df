"""Share of reserved KV memory that holds tokens, and sequences that run at once: paged against reserved in advance.

Run it: ``python benchmarks/memory.py --help``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.datasets import MIXED_INPUT, MIXED_OUTPUT, draw_lengths
from solutions.benchmarks.memory import (
    Buddy,
    FirstFit,
    Lengths,
    Usage,
    reserve_exactly,
    reserve_max,
    reserve_power_of_two,
    simulate_contiguous,
    simulate_paged,
)
from solutions.benchmarks.report import Parser, record, show_table, write_json
from solutions.core.config import parse_bytes
from solutions.memory.cache_engine import block_bytes, scale_bytes
from solutions.models.loader import resolve_model

DESCRIPTION = """\
How much of the memory that is set aside for keys and values (KV) holds any?

Requests with 16..512 prompt and 16..256 output tokens stream from an endless queue through the same memory under several
ways to set it aside. No model runs; the paged side is the engine's own scheduler and block manager.
  contiguous, max N     one piece of N slots for each sequence, N the longest that the server takes
  contiguous, pow2      prompt plus the output rounded up to a power of two, in a buddy allocator
  contiguous, oracle    the exact final length, which no server knows; in a buddy allocator and, better, by first fit
  paged, N              blocks of N tokens, added as the sequence grows
Each slot counts as: holding a token; reserved for a later token of its sequence; reserved and never used; or free, while
requests wait for more than that. waste = reserved slots that hold no token / reserved slots.
"""
EPILOG = """\
examples:
  a 7B model with 12 GiB for its KV, block sizes 1 to 128, with a plot
    python benchmarks/memory.py --plot memory.png --output-json memory.json
  the same question for the default model in one GiB
    python benchmarks/memory.py --model smollm2-135m --kv-cache-memory-bytes 1GiB
"""
COLORS = {"tokens": "#2a9d8f", "later": "#e9c46a", "never": "#e76f51", "free": "#d9d9d9"}
MEANING = {
    "tokens": "holds a token",
    "later": "reserved, filled later",
    "never": "reserved, never filled",
    "free": "free, too little or too scattered",
}
BASELINE_MAX_LEN = 2048
"""Ratios are to reserving this much, the limit of the models in the paper."""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/memory.py [flag ...]", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--model", default="llama-7b", help="whose KV to store; its weights are not needed (default: llama-7b)")
    parser.add_argument(
        "--kv-cache-memory-bytes", type=parse_bytes, default=12 << 30, metavar="SIZE", help="the memory (default: 12GiB)"
    )
    parser.add_argument(
        "--block-sizes", type=int, nargs="+", default=[1, 8, 16, 32, 128], metavar="N", help="paged (default: 1 8 16 32 128)"
    )
    parser.add_argument(
        "--max-model-lens", type=int, nargs="+", default=[768, 1024, 2048], metavar="N",
        help=f"contiguous; at least {MIXED_INPUT[1] + MIXED_OUTPUT[1]}, the longest request (default: 768 1024 2048)",
    )  # fmt: skip
    parser.add_argument("--num-requests", type=int, default=2000, metavar="N", help="requests (default: 2000)")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the lengths (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a chart (png, svg or pdf)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    args = parser.parse_args(argv)
    longest = MIXED_INPUT[1] + MIXED_OUTPUT[1]
    if min(args.max_model_lens) < longest:
        parser.error(f"--max-model-lens must be at least {longest}, the longest request, got {min(args.max_model_lens)}")
    parser.check_counts(args, "block_sizes", "num_requests")
    if args.plot is not None and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot must end in .png, .svg or .pdf, got {args.plot}")
    return args


def token_bytes(model: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys and values for one token, with their scales if they are int8.

    Raises:
        ValueError: the model is not known.
    """
    config = resolve_model(model, "dummy").config
    sizes = config.num_layers, 1, config.num_kv_heads
    return block_bytes(*sizes, config.head_dim, dtype) + scale_bytes(*sizes, dtype)


def systems(args: argparse.Namespace, capacity: int, int8_capacity: int, lengths: Lengths) -> list[Callable[[], Usage]]:
    """One simulation each."""

    def contiguous(name: str, reserve: Callable[[int, int], int], memory: type[FirstFit | Buddy]) -> Callable[[], Usage]:
        return lambda: simulate_contiguous(f"contiguous, {name}", capacity, lengths, reserve, memory(capacity))

    def paged(block_size: int) -> Callable[[], Usage]:
        return lambda: simulate_paged(f"paged, {block_size}", capacity, lengths, block_size)

    return [
        *(contiguous(f"max {length}", reserve_max(length), FirstFit) for length in sorted(args.max_model_lens, reverse=True)),
        contiguous("pow2", reserve_power_of_two, Buddy),
        contiguous("oracle (buddy)", reserve_exactly, Buddy),
        contiguous("oracle (first fit)", reserve_exactly, FirstFit),
        *(paged(size) for size in sorted(args.block_sizes, reverse=True)),
        lambda: simulate_paged("paged, 16, int8", int8_capacity, lengths, 16),
    ]


def show(args: argparse.Namespace, capacity: int, usages: list[Usage]) -> None:
    """Print the table."""
    baseline = next((u for u in usages if u.system == f"contiguous, max {BASELINE_MAX_LEN}"), usages[0])
    rows = [
        [
            usage.system, *(f"{100 * getattr(usage, kind):.1f}" for kind in MEANING), f"{100 * usage.waste:.1f}",
            f"{usage.running:.1f}", f"{usage.running / baseline.running:.2f}x", str(usage.preemptions),
        ]
        for usage in usages
    ]  # fmt: skip
    columns = ["% of the KV memory", "tokens", "later", "never", "free", "waste", "running", "ratio", "preempted"]
    show_table(
        f"KV memory of {capacity:,} tokens ({args.model}, {args.kv_cache_memory_bytes / 2**30:g} GiB in bfloat16), "
        f"{args.num_requests:,} requests of {MIXED_INPUT[0]}..{MIXED_INPUT[1]} in, {MIXED_OUTPUT[0]}..{MIXED_OUTPUT[1]} out",
        columns, rows,
        caption=f"waste: % of what is reserved. running: sequences at once. ratio: of these, to {baseline.system}.",
    )  # fmt: skip


def plot(path: Path, capacity: int, usages: list[Usage]) -> None:
    """Draw what the memory holds, and how many sequences run in it, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.42 * len(usages) + 1.6), sharey=True, width_ratios=(2, 1), layout="constrained"
    )
    names = [usage.system for usage in usages]
    start = [0.0] * len(usages)
    for kind, meaning in MEANING.items():
        shares = [100 * getattr(usage, kind) for usage in usages]
        bars = left.barh(names, shares, left=start, color=COLORS[kind], label=meaning)
        if kind == "tokens":
            left.bar_label(bars, fmt="%.1f %%", label_type="center", fontsize=8)
        start = [a + b for a, b in zip(start, shares, strict=True)]
    left.invert_yaxis()
    left.set(xlim=(0, 100), xlabel="% of the KV memory")
    left.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    colors = ["#264653" if name.startswith("paged") else "#8d99ae" for name in names]
    right.bar_label(right.barh(names, [usage.running for usage in usages], color=colors), fmt="%.1f", padding=3, fontsize=8)
    right.set(xlabel=f"sequences at once in {capacity:,} slots")
    right.margins(x=0.15)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Simulate, print, draw, write; exits with one line on a problem."""
    args = parse_flags(argv)
    try:
        capacity = args.kv_cache_memory_bytes // token_bytes(args.model)
        lengths = draw_lengths(args.num_requests, random.Random(args.data_seed))
        int8_capacity = args.kv_cache_memory_bytes // token_bytes(args.model, torch.int8)
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            usages = [run() for run in bar.track(systems(args, capacity, int8_capacity, lengths), description="simulating")]
    except ValueError as error:
        sys.exit(f"error: {error}")
    show(args, capacity, usages)
    if args.plot is not None:
        plot(args.plot, capacity, usages)
    if args.output_json is not None:
        rows = [asdict(usage) | {"waste": usage.waste} for usage in usages]
        write_json(args.output_json, record("memory", vars(args), {"capacity_tokens": capacity, "systems": rows}))


if __name__ == "__main__":
    main()
