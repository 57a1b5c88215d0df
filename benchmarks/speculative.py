"""Speculative decoding against plain decoding, on text that repeats itself, ordinary text and random text.

Run it: ``python benchmarks/speculative.py --help``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.report import Parser, record, show_table, write_json
from solutions.benchmarks.speculative import PLAIN, TEXTS, Row, measure

DESCRIPTION = """\
Tokens a step and speed with drafts from the text itself (n-grams) and from a smaller model, against plain decoding of the same
prompts, in turns. Nothing is switched off at large batches here, so that the table shows where speculation loses.
"""
COLOURS = {PLAIN: "#999999", "ngram": "#0072B2", "draft model": "#E69F00"}


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/speculative.py [flag ...]", description=DESCRIPTION)
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder (default: smollm2-135m)")
    parser.add_argument("--draft-model", help="alias or folder (default: the model itself, quantized)")
    parser.add_argument("--draft-quantization", default="int8", help="of the draft model; none: as it is (default: int8)")
    parser.add_argument("--draft-tokens", type=int, default=3, help="drafted by the model in a step (default: 3)")
    parser.add_argument("--ngram-tokens", type=int, default=5, help="drafted from the text in a step (default: 5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="requests at once (default: 1 4 16)")
    parser.add_argument("--output-len", type=int, default=96, help="tokens of each answer (default: 96)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn; medians count (default: 3)")
    parser.add_argument("--dtype", default="auto", help="as of the engine (default: auto)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-up, as PNG or SVG")
    args = parser.parse_args(argv)
    if min(*args.batches, args.output_len, args.repeats, args.draft_tokens, args.ngram_tokens) < 1:
        parser.error("all counts must be at least 1")
    return args


def summarize(rows: list[Row]) -> list[dict[str, Any]]:
    """Medians of each case, with the speed-up over plain decoding in the same round and its spread."""
    cases: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.text, row.batch, row.method), []).append(row)
    summary = []
    for (text, batch, method), runs in cases.items():
        plain = cases[text, batch, PLAIN]
        ratios = [run.tokens_per_second / base.tokens_per_second for run, base in zip(runs, plain, strict=True)]
        entry = {"text": text, "batch": batch, "method": method}
        for name in ("tokens_per_second", "tokens_per_step", "acceptance"):
            values = [getattr(run, name) for run in runs]
            entry[name] = None if None in values else statistics.median(values)
        summary.append(entry | {"speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)]})
    return summary


def show(model: str, summary: list[dict[str, Any]]) -> None:
    """Print a row for each case."""
    rows = []
    for case in summary:
        low, high = case["speedup_range"]
        accepted = "" if case["acceptance"] is None else f"{case['acceptance']:.0%}"
        numbers = [f"{case['tokens_per_second']:.0f}", f"{case['tokens_per_step']:.2f}", accepted]
        gain = "" if case["method"] == PLAIN else f"{case['speedup']:.2f}x ({low:.2f}-{high:.2f})"
        rows.append([f"{case['text']}, batch {case['batch']}", case["method"], *numbers, gain])
    columns = ["text", "method", "tokens/s", "tokens a step", "accepted", "as fast as plain"]
    show_table(f"Speculative decoding, {model}", columns, rows)


def draw(summary: list[dict[str, Any]], path: Path) -> None:
    """Speed-up by batch size, a panel for each kind of text."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(TEXTS), figsize=(9, 3.2), sharey=True, layout="constrained")
    batches = sorted({case["batch"] for case in summary})
    for axes, text in zip(panels, TEXTS, strict=True):
        for method, colour in COLOURS.items():
            points = [case["speedup"] for case in summary if case["text"] == text and case["method"] == method]
            axes.plot(range(len(points)), points, "o-", color=colour, label=method)
        axes.set_xticks(range(len(batches)), batches)
        axes.set(title=f"{text} text", xlabel="requests at once")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("as fast as plain decoding")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    quantization = None if args.draft_quantization == "none" else args.draft_quantization
    always = {"disable_by_batch_size": 1 << 20}
    settings = {
        "ngram": {"method": "ngram", "num_speculative_tokens": args.ngram_tokens, **always},
        "draft model": {
            "method": "draft_model", "model": args.draft_model or args.model, "quantization": quantization,
            "num_speculative_tokens": args.draft_tokens, **always,
        },
    }  # fmt: skip
    total = args.repeats * len(TEXTS) * len(args.batches) * (1 + len(settings))
    try:
        runs = measure(
            args.model, settings, args.batches, args.output_len, args.repeats, dtype=args.dtype, max_model_len=1024,
            max_num_seqs=max(args.batches), kv_cache_memory_bytes=512 << 20,
        )  # fmt: skip
        rows = list(track(runs, "runs", total, transient=True))
    except ValueError as error:
        sys.exit(f"error: {error}")
    summary = summarize(rows)
    show(args.model, summary)
    if args.plot:
        draw(summary, args.plot)
    if args.output_json:
        results = {"cases": summary, "runs": [asdict(row) for row in rows]}
        write_json(args.output_json, record("speculative", vars(args), results))


if __name__ == "__main__":
    main()
