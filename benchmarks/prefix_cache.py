"""What the prefix cache gains on a common beginning and a chat, what it costs where nothing is shared, and who goes first.

Run it: ``python benchmarks/prefix_cache.py --help``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.prefix_cache import chat, cost_without_hits, hits_by_policy, shared_prefix
from solutions.benchmarks.report import Parser, record, show_table, spread, write_json

DESCRIPTION = """\
Four small measurements of the prefix cache, with and without it (--no-enable-prefix-caching) where time is compared.
"""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/prefix_cache.py [flag ...]", description=DESCRIPTION)
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder (default: smollm2-135m)")
    parser.add_argument("--num-requests", type=int, default=32, help="with a common beginning, and with none (default: 32)")
    parser.add_argument("--prefix-len", type=int, default=512, help="tokens of the common beginning (default: 512)")
    parser.add_argument("--own-len", type=int, default=16, help="tokens behind it (default: 16)")
    parser.add_argument("--turns", type=int, default=6, help="of the chat (default: 6)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of runs on prompts that share nothing (default: 7)")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the prompts (default: 0)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    args = parser.parse_args(argv)
    if min(args.num_requests - 1, args.prefix_len, args.own_len, args.turns, args.repeats) < 1:
        parser.error("all counts must be at least 1, and --num-requests at least 2")
    if args.prefix_len + args.own_len > 1000:
        parser.error("--prefix-len and --own-len may be 1,000 tokens together at most")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    try:
        shared = shared_prefix(args.model, args.num_requests, args.prefix_len, args.own_len, args.data_seed)
        turns = chat(args.model, args.turns, 48, 32, args.data_seed)
        ratios = spread(cost_without_hits(args.model, args.num_requests, 128, 32, args.repeats, args.data_seed))
        policies = hits_by_policy(args.model, 6, 4, args.prefix_len, args.own_len, args.data_seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    rows = [
        ["first of those with a common beginning", f"{shared.first * 1e3:.1f}", ""],
        ["the others, median", f"{shared.others * 1e3:.1f}", f"{shared.first / shared.others:.1f}x"],
        ["without the cache, median", f"{shared.without * 1e3:.1f}", f"{shared.first / shared.without:.1f}x"],
    ]
    title = f"{args.num_requests} requests with {args.prefix_len} common tokens and {args.own_len} of their own, one by one"
    show_table(title, ["time to first token", "ms", "faster than the first"], rows)
    rows = [[str(i), str(t.prompt), str(t.cached), str(t.prompt - t.cached), str(t.new)] for i, t in enumerate(turns, 1)]
    show_table("A chat", ["turn", "tokens so far", "cached", "computed", "of them new"], rows, "answers have 32 tokens")
    low, high = ratios["min"], ratios["max"]
    cost = [[f"{statistics.median(ratios['values']):.3f}", f"{low:.3f} to {high:.3f}"]]
    show_table("Throughput with the cache over that without, nothing shared", ["median of pairs", "range"], cost)
    rows = [[name, f"{share:.0%}"] for name, share in policies.items()]
    show_table("Prompt tokens cached when 6 groups come in turns and 2 beginnings fit", ["policy", "cached"], rows)
    if args.output_json:
        results = {"shared_prefix": asdict(shared), "chat": [asdict(t) for t in turns], "ratios_without_hits": ratios,
                   "cached_by_policy": policies}  # fmt: skip
        write_json(args.output_json, record("prefix_cache", vars(args), results))


if __name__ == "__main__":
    main()
