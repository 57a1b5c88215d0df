"""How many frames a second the page draws while it shows a busy engine.

Run it: ``python benchmarks/page.py --help``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.page import DESKTOP, TRACE_RATE, measure, open_browser, static_copy, synthetic_trace
from solutions.benchmarks.report import Parser, record, show_table, write_json

DESCRIPTION = """\
A browser without a screen or a GPU shows a made-up trace, in which all sequences decode, at twice the rate of a server's feed.
What is counted are the browser's own frames; a page that computes for too long between two of them misses some.
"""
EPILOG = """\
examples:
  what results quote
    python benchmarks/page.py --output-json page.json
  more than a server runs by default
    python benchmarks/page.py --running 1024
"""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/page.py [flag ...]", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--running", type=int, default=256, help="sequences that run (default: 256)")
    parser.add_argument("--seconds", type=int, default=10, help="of counting (default: 10)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    args = parser.parse_args(argv)
    parser.check_counts(args, "running", "seconds")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write; exits with one line on a problem."""
    args = parse_flags(argv)
    try:
        with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
            trace = Path(folder) / "trace.jsonl"
            synthetic_trace(trace, args.running, TRACE_RATE * (args.seconds + 10))
            with static_copy(trace) as address:
                page = browser.new_page(viewport=DESKTOP)
                page.goto(address)
                results = measure(page, args.running, args.seconds) | {"browser": browser.version}
                page.close()
    except ValueError as error:
        sys.exit(f"error: {error}")
    row = [f"{results[name]:.1f}" for name in ("frames_per_second", "median_ms", "longest_ms")]
    title = f"the page with {args.running} running sequences, Chromium {results['browser']}"
    show_table(title, ["", "frames a second", "between two, ms", "longest, ms"], [["the page", *row]])
    if args.output_json is not None:
        write_json(args.output_json, record("page", vars(args), results))


if __name__ == "__main__":
    main()
