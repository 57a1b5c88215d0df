"""Where a decode step's time goes on a CPU, operator by operator.

Run it: ``python benchmarks/step_profile.py --help``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.benchmarks.kernels import Ceilings, measure_ceilings
from solutions.benchmarks.report import Parser, record, show_table, write_json
from solutions.benchmarks.step_profile import OperatorTime, profile_step
from solutions.core.config import DEFAULT_MODEL, EngineConfig
from solutions.core.engine import LLMEngine

DESCRIPTION = """\
Where a decode step's time goes: for each operator, over all layers, the bytes that it has to move, its operations, the time
that this machine needs for them at least (its measured read bandwidth, its best measured matrix product), and what it takes.
"everything else" is the step less its operators: scheduling, laying out the batch, handing tokens out, Python.
"""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/step_profile.py [flag ...]", description=DESCRIPTION)
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"a LLaMA model (default: {DEFAULT_MODEL})")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="sequences in a step (default: 1 32)")
    parser.add_argument("--context", type=int, default=256, help="tokens of each (default: 256)")
    parser.add_argument("--quantization", choices=["int8"], help="of the weights (default: none, bfloat16)")
    parser.add_argument("--repeats", type=int, default=41, help="measurements, of which the median counts (default: 41)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
    args = parser.parse_args(argv)
    parser.check_counts(args, "context", "repeats", "batches")
    if args.context <= args.repeats:
        parser.error(f"--context {args.context} must be larger than --repeats {args.repeats}")
    return args


def show(ceilings: Ceilings, batch: int, rows: list[OperatorTime]) -> None:
    """Print the table."""
    cells = []
    for row in rows:
        is_kernel = row.floor is not None
        cells.append([
            row.operator, f"{row.bytes / 1e6:.1f}" if is_kernel else "", f"{row.operations / 1e6:.0f}" if is_kernel else "",
            f"{row.floor * 1e3:.2f}" if is_kernel else "", f"{row.seconds * 1e3:.2f}",
            f"{row.floor / row.seconds:.0%}" if is_kernel else "",
        ])  # fmt: skip
    total, floor = sum(row.seconds for row in rows), sum(row.floor or 0 for row in rows)
    cells.append(["step", "", "", f"{floor * 1e3:.2f}", f"{total * 1e3:.2f}", f"{floor / total:.0%}"])
    title = f"A decode step of {batch}; reads {ceilings.read_bytes / 1e9:.0f} GB/s; {torch.get_num_threads()} threads"
    show_table(title, ["operator", "MB", "MFLOP", "floor, ms", "ms", "of the floor"], cells)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    try:
        largest = max(args.batches)
        engine = LLMEngine(
            EngineConfig(
                model=args.model, device="cpu", quantization=args.quantization, max_num_seqs=largest,
                max_num_batched_tokens=largest * args.context,
            )
        )  # fmt: skip
        with torch.inference_mode():
            ceilings = measure_ceilings(7)
            precision = args.quantization or str(engine.executor.worker.dtype).removeprefix("torch.")
            profiles = {
                batch: profile_step(engine, ceilings, precision, batch, args.context, args.repeats) for batch in args.batches
            }
    except ValueError as error:
        sys.exit(f"error: {error}")
    for batch, rows in profiles.items():
        show(ceilings, batch, rows)
    if args.output_json:
        results = {
            "ceilings": asdict(ceilings), "batches": {batch: [asdict(row) for row in rows] for batch, rows in profiles.items()}
        }  # fmt: skip
        write_json(args.output_json, record("profile", vars(args) | {"threads": torch.get_num_threads()}, results))


if __name__ == "__main__":
    main()
