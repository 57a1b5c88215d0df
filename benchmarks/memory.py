"""Share of reserved KV memory that holds tokens, and sequences that run at once: paged against reserved in advance.

How much of the memory that is set aside for keys and values (KV) holds any?

Requests with 16..512 prompt and 16..256 output tokens stream from an endless queue through the same memory under several
ways to set it aside. No model runs; the paged side is the engine's own scheduler and block manager.
  contiguous, max N     one piece of N slots for each sequence, N the longest that the server takes
  contiguous, pow2      prompt plus the output rounded up to a power of two, in a buddy allocator
  contiguous, oracle    the exact final length, which no server knows; in a buddy allocator and, better, by first fit
  paged, N              blocks of N tokens, added as the sequence grows
Each slot counts as: holding a token; reserved for a later token of its sequence; reserved and never used; or free, while
requests wait for more than that. waste = reserved slots that hold no token / reserved slots.

examples:
  a 7B model with 12 GiB for its KV, block sizes 1 to 128, with a plot
    python benchmarks/memory.py --plot memory.png --output-json memory.json
  the same question for the default model in one GiB
    python benchmarks/memory.py --model smollm2-135m --kv-cache-memory-bytes 1GiB
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks import memory as kv
from solutions.benchmarks.datasets import MIXED_INPUT, MIXED_OUTPUT, draw_lengths
from solutions.benchmarks.report import Flags, Parser, drawing, finish, one_line_errors, show_table, tracked
from solutions.core.config import parse_bytes
from solutions.memory.cache_engine import block_bytes, scale_bytes
from solutions.models.loader import resolve_model

KINDS = {
    "tokens": ("holds a token", "#2a9d8f"),
    "later": ("reserved, filled later", "#e9c46a"),
    "never": ("reserved, never filled", "#e76f51"),
    "free": ("free, too little or too scattered", "#d9d9d9"),
}
"""What a slot of the memory is for: its meaning and its colour."""
LONGEST = MIXED_INPUT[1] + MIXED_OUTPUT[1]
BASELINE_MAX_LEN = 2048
"""Ratios are to reserving this much, the limit of the models in the paper."""


def token_bytes(model: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys and values for one token, with int8's scales. Raises ValueError if the model is not known."""
    config = resolve_model(model, "dummy").config
    sizes = config.num_layers, 1, config.num_kv_heads
    return block_bytes(*sizes, config.head_dim, dtype) + scale_bytes(*sizes, dtype)


def per_token(model: str) -> str:
    """A line: what a token takes in bfloat16, and what keys and values of all heads would take."""
    config, held = resolve_model(model, "dummy").config, token_bytes(model)
    width = 2 * config.head_dim if config.latent is None else config.latent.query_dim + config.latent.value
    whole = config.num_layers * config.num_heads * width * 2
    return f"{model}: {held / 1024:,.1f} KiB a token; keys and values of all heads would take {whole / 1024:,.1f}"


def systems(args: Flags, capacity: int, int8_capacity: int, lengths: kv.Lengths) -> list[Callable[[], kv.Usage]]:
    """One simulation each."""

    def contiguous(name: str, reserve: Callable[[int, int], int], memory: type[kv.FirstFit | kv.Buddy]) -> Any:
        return partial(kv.simulate_contiguous, f"contiguous, {name}", capacity, lengths, reserve, memory(capacity))

    most, sizes = sorted(args.max_model_lens, reverse=True), sorted(args.block_sizes, reverse=True)
    return [
        *(contiguous(f"max {length}", kv.reserve_max(length), kv.FirstFit) for length in most),
        contiguous("pow2", kv.reserve_power_of_two, kv.Buddy),
        contiguous("oracle (buddy)", kv.reserve_exactly, kv.Buddy),
        contiguous("oracle (first fit)", kv.reserve_exactly, kv.FirstFit),
        *(partial(kv.simulate_paged, f"paged, {n}", capacity, lengths, n) for n in sizes),
        partial(kv.simulate_paged, "paged, 16, int8", int8_capacity, lengths, 16),
    ]


def show(args: Flags, capacity: int, usages: list[kv.Usage]) -> None:
    baseline = next((u for u in usages if u.system == f"contiguous, max {BASELINE_MAX_LEN}"), usages[0])
    rows = [
        [
            usage.system, *(f"{100 * getattr(usage, kind):.1f}" for kind in KINDS), f"{100 * usage.waste:.1f}",
            f"{usage.running:.1f}", f"{usage.running / baseline.running:.2f}x", str(usage.preemptions),
        ]
        for usage in usages
    ]  # fmt: skip
    columns = ["% of the KV memory", "tokens", "later", "never", "free", "waste", "running", "ratio", "preempted"]
    title = (
        f"KV memory of {capacity:,} tokens ({args.model}, {args.kv_cache_memory_bytes / 2**30:g} GiB in bfloat16), "
        f"{args.num_requests:,} requests of {MIXED_INPUT[0]}..{MIXED_INPUT[1]} in, {MIXED_OUTPUT[0]}..{MIXED_OUTPUT[1]} out"
    )
    caption = f"waste: % of what is reserved. running: sequences at once. ratio: of these, to {baseline.system}."
    show_table(title, columns, rows, caption)


def draw(capacity: int, usages: list[kv.Usage], path: Path) -> None:
    """Draw what the memory holds, and how many sequences run in it, side by side."""
    names, start = [usage.system for usage in usages], np.zeros(len(usages))
    size = (11, 0.42 * len(usages) + 1.6)
    with drawing(path, 2, dpi=150, figsize=size, sharey=True, width_ratios=(2, 1)) as (left, right):
        for kind, (meaning, color) in KINDS.items():
            shares = np.array([100 * getattr(usage, kind) for usage in usages])
            bars = left.barh(names, shares, left=start, color=color, label=meaning)
            start += shares
            if kind == "tokens":
                left.bar_label(bars, fmt="%.1f %%", label_type="center", fontsize=8)
        left.invert_yaxis()
        left.set(xlim=(0, 100), xlabel="% of the KV memory")
        left.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
        colors = ["#264653" if name.startswith("paged") else "#8d99ae" for name in names]
        bars = right.barh(names, [usage.running for usage in usages], color=colors)
        right.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        right.set(xlabel=f"sequences at once in {capacity:,} slots")
        right.margins(x=0.15)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("memory", __doc__, "a chart")
    parser.add_flag("--model", "llama-7b", "the model whose KV cache is stored; its weights are not needed")
    parser.add_flag("--kv-cache-memory-bytes", "12GiB", "the memory", type=parse_bytes, metavar="SIZE")
    parser.add_flag("--block-sizes", [1, 8, 16, 32, 128], "paged", metavar="N")
    text = f"contiguous; at least {LONGEST}, the longest request"
    parser.add_flag("--max-model-lens", [768, 1024, 2048], text, metavar="N")
    parser.add_flag("--num-requests", 2000, "requests", metavar="N")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the lengths (default: 0)")
    args = parser.parse_args(argv)
    if min(args.max_model_lens) < LONGEST:
        parser.error(f"--max-model-lens must be at least {LONGEST}, the longest request, got {min(args.max_model_lens)}")
    with one_line_errors():
        capacity = args.kv_cache_memory_bytes // token_bytes(args.model)
        int8_capacity = args.kv_cache_memory_bytes // token_bytes(args.model, torch.int8)
        lengths = draw_lengths(args.num_requests, random.Random(args.data_seed))
        usages = [run() for run in tracked(systems(args, capacity, int8_capacity, lengths), "simulating")]
    show(args, capacity, usages)
    print(per_token(args.model))
    rows = [asdict(usage) | {"waste": usage.waste} for usage in usages]
    finish(args, "memory", {"capacity_tokens": capacity, "systems": rows}, partial(draw, capacity, usages))


if __name__ == "__main__":
    main()
