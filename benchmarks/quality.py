"""Perplexity and size of one model in several precisions: 16 bits, int8, int4, and 4 bits by RTN, GPTQ and AWQ.

Run it: ``python benchmarks/quality.py --help``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.quality import Quality, cut_text, measure, write_rounded
from solutions.benchmarks.report import Parser, record, show_table, write_json
from solutions.models.config.entries import ModelError
from solutions.quantization import awq, gptq

DESCRIPTION = """\
What a few bits cost: perplexity on held-out pieces of Python's own documentation, in the model's precision, with
--quantization int8 and int4, with --kv-cache-dtype int8, and of 4-bit checkpoints that are made on the spot: rounded to nearest
(RTN), GPTQ and AWQ. They are calibrated on the other pieces. Making them takes minutes each; --folder keeps them.
"""
CAPTION = (
    "The default model's weights come from a file of 4 bits in groups of 32, which int4 gives back nearly as they are; "
    "RTN, GPTQ and AWQ take other groups, on which that file's values do not lie."
)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/quality.py [flag ...]", description=DESCRIPTION)
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder of a LLaMA or Mistral (default: smollm2-135m)")
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 128], help="group sizes (default: 64 128)")
    parser.add_argument("--pieces", type=int, default=24, help="of held-out text (default: 24)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a piece (default: 512)")
    parser.add_argument("--num-samples", type=int, default=64, help="pieces of calibration text (default: 64)")
    parser.add_argument("--folder", type=Path, help="where the 4-bit models are kept and, if there, taken from")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw perplexity against size, as PNG or SVG")
    args = parser.parse_args(argv)
    if min(*args.groups, args.pieces, args.length - 1, args.num_samples) < 1:
        parser.error("all counts must be at least 1")
    return args


def make_models(args: argparse.Namespace, folder: Path, text: str) -> dict[str, dict[str, Any]]:
    """Make the 4-bit models that are not there yet; name → arguments of the engine."""
    calibration = folder / "calibration.txt"
    calibration.write_text(text)
    settings = {}
    for size in args.groups:
        rounded = folder / f"rtn-{size}"
        if not (rounded / "config.json").is_file():
            write_rounded(args.model, rounded, size)
        settings[f"RTN, groups of {size}"] = {"model": str(rounded)}
        for name, method, flags in (
            ("GPTQ", gptq, []), ("GPTQ, act-order", gptq, ["--act-order"]), ("AWQ", awq, [])
        ):  # fmt: skip
            target = folder / f"{name.lower().replace(', ', '-')}-{size}"
            if not (target / "config.json").is_file():
                print(f"{name}, groups of {size}", file=sys.stderr)
                method.main([
                    "--model", args.model, "--group-size", str(size), "--calibration-file", str(calibration), "--num-samples",
                    str(args.num_samples), "--sequence-length", str(args.length), "--output", str(target), *flags,
                ])  # fmt: skip
            settings[f"{name}, groups of {size}"] = {"model": str(target)}
    return settings


def show(model: str, results: list[Quality]) -> None:
    """Print a row for each precision."""
    base = results[0]
    rounded = {r.name.rpartition(" ")[2]: r for r in results if r.name.startswith("RTN")}
    rows = []
    for r in results:
        gap = math.log(r.perplexity / base.perplexity)
        closed = ""
        if r.name.startswith(("GPTQ", "AWQ")):
            closed = f"{1 - gap / math.log(rounded[r.name.rpartition(' ')[2]].perplexity / base.perplexity):.0%}"
        numbers = [f"{r.perplexity:.3f}", f"{r.perplexity / base.perplexity - 1:+.2%}", f"{gap:.4f}", closed]
        rows.append([r.name, *numbers, f"{r.weight_bytes / 2**20:.0f}"])
    columns = ["precision", "perplexity", "more", "nats a token more", "of RTN's gap closed", "MiB of weights"]
    show_table(f"{model} on Python's documentation", columns, rows, CAPTION)


def draw(results: list[Quality], path: Path) -> None:
    """A row for each precision: how much its perplexity is above the first one's, and the size of its weights."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 0.6 + 0.32 * len(results)), layout="constrained")
    names = [r.name for r in results]
    more = [100 * (r.perplexity / results[0].perplexity - 1) for r in results]
    colors = ["#0072B2" if "groups" in name else "#D55E00" for name in names]
    for bar, r in zip(axes.barh(names, more, color=colors), results, strict=True):
        text = f"{r.perplexity:.2f}, {r.weight_bytes / 2**20:.0f} MiB of weights"
        axes.annotate(text, (bar.get_width(), bar.get_y() + 0.4), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(xlabel="perplexity more than 16 bits', in %", xlim=(0, 1.45 * max(*more, 1e-9)))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held_out, text = cut_text(args.model, args.length, args.pieces)
            whole = {"model": args.model}
            settings = {
                "16 bits": whole,
                "int8 KV cache": whole | {"kv_cache_dtype": "int8"},
                "int8": whole | {"quantization": "int8"},
                "int4, groups of 32": whole | {"quantization": "int4"},
            } | make_models(args, folder, text)
            results = list(track(measure(settings, held_out), "precisions", len(settings), transient=True))
        except (ModelError, ValueError) as error:
            sys.exit(f"error: {error}")
    show(args.model, results)
    if args.plot:
        draw(results, args.plot)
    if args.output_json:
        tokens = sum(len(piece) - 1 for piece in held_out)
        write_json(args.output_json, record("quality", vars(args), {"tokens": tokens, "runs": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
