"""LLaMA-7B on one GPU beside what that GPU can do, and the floors of a step computed for known cards.

Run it: ``python benchmarks/gpu.py --help``.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from solutions.attention.backends import make_backend
from solutions.benchmarks.gpu import StepTime, measure_attention, measure_card, measure_decode, measure_prefill
from solutions.benchmarks.report import Parser, record, show_table, write_json
from solutions.benchmarks.roofline import CARDS, Card, decode_cost
from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.models.config.model_config import ModelConfig
from solutions.models.loader import resolve_model

DESCRIPTION = """\
What a step takes on this GPU beside the least it could take. First, computed and not measured, the floors of a decode step on
known cards. Then, if there is a GPU: its measured copy bandwidth and product rate; attention alone by each backend; decode
steps and prompts of the whole model, with CUDA graphs and without. Random weights do, so nothing is downloaded.
"""
BATCHES, PROMPTS = (1, 32, 64, 256), (512, 2000)
BACKENDS = ("triton", "cuda", "torch")
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
RESULTS = Path(__file__).parent / "results"


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser(usage="python benchmarks/gpu.py [flag ...]", description=DESCRIPTION)
    parser.add_argument("--model", default="llama-7b", help="run with random weights (default: llama-7b)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="of decode steps (default: 1 32 64 256)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each; fewer if memory is short (default: 1024)")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="lengths of prompts (default: 512 2000)")
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=BACKENDS,
        help="the first runs everything, the others attention alone and the second batch (default: triton cuda torch)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=24, help="measurements, of which the median counts (default: 24)")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="default: benchmarks/results/<card>_gpu.json")
    args = parser.parse_args(argv)
    if min(*args.batches, *args.prompts, args.context, args.steps) < 1:
        parser.error("--batches, --prompts, --context and --steps must be at least 1")
    return args


def show_floors(model: ModelConfig, args: argparse.Namespace) -> None:
    """The computed table: floors of a decode step on known cards."""
    rows = []
    for batch in args.batches:
        cost = decode_cost(model, batch, args.context)
        moved = cost.weight_bytes + cost.kv_bytes
        operations = cost.product_operations + cost.attention_operations
        cells = []
        for card in CARDS:
            floor = cost.floor(card)
            rate = f"{batch / floor:,.0f}" if moved < card.memory else "too large"
            cells.append(f"{floor * 1e3:.2f} ({rate})")
        rows.append([str(batch), f"{moved / 1e9:.1f}", f"{operations / 1e12:.2f}", *cells])
    title = f"Computed, not measured: a decode step of {args.model} in bfloat16 at a context of {args.context}"
    show_table(title, ["batch", "GB", "TFLOP", *(f"{card.name}, ms (tok/s)" for card in CARDS)], rows)


def show_steps(title: str, steps: list[StepTime]) -> None:
    """A table of measured steps."""
    rows = [
        [step.what, str(step.batch), f"{step.context:.0f}", f"{step.seconds * 1e3:.2f}", f"{step.floor * 1e3:.2f}",
         f"{step.floor / step.seconds:.0%}", f"{step.bandwidth_share:.0%}", f"{step.tokens_per_second:,.0f}"]
        for step in steps
    ]  # fmt: skip
    show_table(title, ["step", "batch", "context", "ms", "floor, ms", "of the floor", "of bandwidth", "tok/s"], rows)


def measure_model(args: argparse.Namespace, backend: str, card: Card, first: bool) -> dict[str, list[dict[str, Any]]]:
    """The model with one attention backend: all batches and prompts with the first, one batch with the others."""
    batches = args.batches if first else args.batches[1:2] or args.batches[:1]
    longest = max(args.context, *args.prompts) + 1
    config = EngineConfig(
        model=args.model, device="cuda", dtype="bfloat16", load_format="dummy", attention_backend=backend,
        max_model_len=longest, max_num_seqs=max(batches),
    )  # fmt: skip
    engine = LLMEngine(config)
    worker = engine.executor.worker
    steps = [measure_decode(engine, card, batch, args.context, args.steps) for batch in batches]
    prompts = [measure_prefill(engine, card, length, args.steps) for length in (args.prompts if first else ())]
    show_steps(
        f"{args.model} on {card.name}, {backend} attention, {'CUDA graphs' if worker.graphs else 'no graphs'}", steps + prompts
    )
    results = {"steps": [as_dict(step) for step in steps + prompts]}
    if first and worker.graphs is not None:
        worker.graphs = None
        eager = [measure_decode(engine, card, batch, args.context, args.steps) for batch in batches]
        show_steps(f"{args.model} on {card.name}, {backend} attention, --enforce-eager", eager)
        results["eager"] = [as_dict(step) for step in eager]
    return results


def as_dict(step: StepTime) -> dict[str, Any]:
    return asdict(step) | {"tokens_per_second": step.tokens_per_second}


def measure(args: argparse.Namespace, model: ModelConfig) -> dict[str, Any]:
    """Everything that needs the card."""
    device = torch.device("cuda")
    with torch.inference_mode():
        card = measure_card(device)
        print(f"{card.name}: copies {card.bandwidth / 1e9:,.0f} GB/s, multiplies {card.rate / 1e12:,.0f} TFLOP/s in bfloat16")
        attention = [
            measure_attention(
                name, card, device, (model.num_heads, model.num_kv_heads), model.head_dim, batch, args.context,
                block_size=16, repeats=args.steps, kv_cache_dtype=kind,
            )
            for batch in args.batches
            for name in args.backends
            for kind in (KV_CACHE_DTYPES if name == "triton" else ("auto",))
        ]  # fmt: skip
    rows = [
        [t.backend, t.kv_cache_dtype, str(t.batch), f"{t.seconds * 1e6:.1f}", f"{t.bandwidth_share:.0%}"] for t in attention
    ]
    show_table(f"Attention of one layer, context {args.context}", ["backend", "KV cache", "batch", "µs", "of bandwidth"], rows)
    results: dict[str, Any] = {"card": asdict(card), "attention": [asdict(t) for t in attention]}
    for i, name in enumerate(args.backends):
        results[name] = measure_model(args, name, card, first=i == 0)
        gc.collect()  # the engine's memory is for the next one
        torch.cuda.empty_cache()
    return results


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    try:
        model = resolve_model(args.model, "dummy").config
        show_floors(model, args)
        if not torch.cuda.is_available():
            print("no GPU here: nothing is measured. What is above is computed.")
            return
        for name in args.backends:
            make_backend(name, "cuda", torch.bfloat16, model.head_dim)  # says now what cannot run
        results = measure(args, model)
    except ValueError as error:
        sys.exit(f"error: {error}")
    name = re.sub(r"[^a-z0-9]+", "-", results["card"]["name"].lower()).strip("-")
    write_json(args.output_json or RESULTS / f"{name}_gpu.json", record("gpu", vars(args), results))


if __name__ == "__main__":
    main()
