"""Models with random weights beside what one GPU can do, or a CPU, and the floors of a step computed for known cards.

The floors come first and are not measured. Then, if there is a GPU: the bandwidth of a large copy and the rate of a large
product, which all else is compared with; attention alone by each backend; decode steps and prompts of whole models, of the
first with CUDA graphs and without; and the requests of nano-vllm's benchmark. On a CPU only steps and prompts are measured.

examples:
  what results quote of a CPU; moe-1b has 1 billion active weights out of 3.5
    python -m solutions.benchmarks.gpu --device cpu --models smollm2-135m qwen3-0.6b moe-1b --batches 1 32 --context 256 \
      --prompts 512 --steps 18
"""

from __future__ import annotations

import gc
import itertools
import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.backends import make_backend
from ..core.engine import LLM, LLMEngine
from ..core.graphs.decode_graphs import CudaGraphRecorder
from ..core.platform.machine import processor_name, total_memory
from ..memory.cache_engine import element_type
from ..memory.int8_cache import quantize_vectors
from ..models.config.model_config import ModelConfig
from ..models.costs.roofline import CARDS, Card, StepCost, decode_cost, prefill_cost
from ..models.loader import resolve_model
from .datasets import BenchRequest
from .kernels import measure_ceilings, paged_step
from .report import Flags, Parser, finish, one_line_errors, show_table
from .throughput import run_engine
from .timing import made_up, median_seconds

BACKENDS = ["triton", "cuda", "torch"]
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
RESULTS = Path(__file__).parents[2] / "benchmarks/results"
CACHE_BYTES = 256 << 20
"""More than any card's second-level cache holds."""
WARM_UP, NUMBERS = 3, itertools.count()
"""Calls that do not count, and numbers of all requests."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """One measured step.

    Attributes:
        what: "decode" or "prefill". batch: sequences. context: tokens of each, the mean over the measured steps.
        seconds: median of a step; for a prompt from its arrival to its first token.
        floor: seconds it takes at least, at the measured bandwidth and rate. bandwidth_share: bytes that the step has to move,
            over its time, as a share of the measured bandwidth.
    """

    what: str
    batch: int
    context: float
    seconds: float
    floor: float
    bandwidth_share: float

    @property
    def tokens_per_second(self) -> float:
        return (self.batch if self.what == "decode" else self.context) / self.seconds


@dataclass(frozen=True, slots=True)
class AttentionTime:
    """One layer's attention of a decode step by one backend; seconds are a median, the share as in `StepTime`."""

    backend: str
    kv_cache_dtype: str
    batch: int
    context: int
    seconds: float
    bandwidth_share: float


def measure_card(device: torch.device, copy_bytes: int = 2 << 30, size: int = 8192, repeats: int = 20) -> Card:
    """The device with the bandwidth (bytes read and written by a copy; by a CPU read alone) and the bfloat16 rate that it
    reaches now."""
    if device.type == "cpu":
        found = measure_ceilings(repeats)
        return Card(processor_name(), found.read_bytes, found.operations["bfloat16"], total_memory())
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    copy = median_seconds(partial(torch.empty_like(source).copy_, source), repeats, WARM_UP)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    product = median_seconds(lambda: a @ b, repeats, WARM_UP)
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    return Card(name, 2 * copy_bytes / copy, 2 * size**3 / product, memory)


def measure_decode(engine: LLMEngine, looks: Sequence[Callable[[], Card]], batch: int, context: int, steps: int) -> StepTime:
    """Decode steps of `batch` sequences, around `context` tokens of each, or as many as the KV cache holds."""
    limits, scheduler, each = engine.limits, engine.scheduler, -(-steps // len(looks))
    room = limits.num_blocks // batch * engine.config.block_size - engine.config.block_size
    prompt_len = min(context, room, limits.max_model_len - 1) - 2 * steps
    if prompt_len < 1:
        raise ValueError(f"the KV cache has no room for {batch} sequences of {2 * steps} tokens; measure fewer at once")
    submit(engine, batch, prompt_len, limits.max_model_len - prompt_len - 1)
    while scheduler.waiting or any(seq.num_output_tokens < 2 for seq in scheduler.running):
        engine.step()

    def measure(card: Card) -> StepTime:
        mean = statistics.fmean(len(seq.tokens) for seq in scheduler.running) + (each - 1) / 2
        cost = decode_cost(engine.model_config, batch, mean, engine.executor.dtype)
        return step_time("decode", batch, mean, median_seconds(engine.step, each), cost, card)

    step = typical(looks, measure)
    for seq in [*scheduler.running, *scheduler.waiting]:
        engine.abort_request(seq.request_id)
    return step


def measure_prefill(engine: LLMEngine, looks: Sequence[Callable[[], Card]], length: int, repeats: int) -> StepTime:
    """One prompt of `length` tokens on an idle engine: time to its first token."""

    def run() -> None:
        submit(engine, 1, length, 1)
        while engine.has_unfinished_requests():
            engine.step()

    cost, each = prefill_cost(engine.model_config, length, engine.executor.dtype), -(-repeats // len(looks))
    return typical(looks, lambda card: step_time("prefill", 1, length, median_seconds(run, each), cost, card))


def typical(looks: Sequence[Callable[[], Card]], measure: Callable[[Card], StepTime]) -> StepTime:
    """The median by share of the floor: a CPU that others share is not the same for long, so each round looks at it first."""
    return sorted((measure(look()) for look in looks), key=lambda step: step.floor / step.seconds)[len(looks) // 2]


def step_time(what: str, batch: int, context: float, seconds: float, cost: StepCost, card: Card) -> StepTime:
    share = (cost.weight_bytes + cost.kv_bytes) / seconds / card.bandwidth
    return StepTime(what, batch, context, seconds, cost.floor(card), share)


def submit(engine: LLMEngine, count: int, length: int, max_tokens: int) -> None:
    """Give the engine prompts of random tokens, all different, so that the prefix cache finds none of them."""
    for ids in torch.randint(engine.model_config.vocab_size, (count, length)).tolist():
        request = BenchRequest(ids, max_tokens)
        engine.add_request(f"bench-{next(NUMBERS)}", request.prompt, request.params())


def measure_attention(
    name: str, card: Card, device: torch.device, heads: tuple[int, int], head_dim: int, batch: int, context: int,
    block_size: int, repeats: int, dtype: torch.dtype = torch.bfloat16, kv_cache_dtype: str = "auto",
) -> AttentionTime:  # fmt: skip
    """One layer's attention of a decode step over a cache whose blocks lie in random order; `heads` are (query heads, KV
    heads), and `kv_cache_dtype` is one of `KV_CACHE_DTYPES`. It runs over as many layers' caches as exceed `CACHE_BYTES`
    together, so that none is read from the card's own cache, and in a CUDA graph where the backend allows it, as engines do."""
    kind, (_, num_kv_heads) = element_type(kv_cache_dtype, dtype), heads
    layer_bytes = 2 * batch * -(-context // block_size) * block_size * num_kv_heads * head_dim * kind.itemsize
    num_layers = -(-CACHE_BYTES // layer_bytes)
    ones, lengths = [1] * batch, [context] * batch
    metadata, (query, key, value) = paged_step(ones, lengths, dtype, num_layers, heads, head_dim, block_size, device)
    if kind == torch.int8:
        metadata.kv_caches, metadata.kv_scales = map(list, zip(*map(quantize_vectors, metadata.kv_caches), strict=True))
    elif kind != dtype:
        metadata.kv_caches = [kv_cache.to(kind) for kv_cache in metadata.kv_caches]
    metadata.backend = backend = make_backend(name, device, dtype, head_dim, block_size)
    metadata.plan = backend.plan(metadata, None)

    def attend() -> Tensor:
        for layer in range(num_layers):
            out = backend.attend(layer, query, key, value, metadata, head_dim**-0.5)
        return out

    run = CudaGraphRecorder()(attend) if device.type == "cuda" and backend.capturable else attend
    seconds = median_seconds(run, repeats, WARM_UP) / num_layers
    vector = head_dim * kind.itemsize + (2 if metadata.kv_scales else 0)  # a scale is a float16
    moved = 2 * batch * context * num_kv_heads * vector
    return AttentionTime(name, kv_cache_dtype, batch, context, seconds, moved / seconds / card.bandwidth)


def show_floors(model: ModelConfig, args: Flags) -> None:
    """The computed table: floors of a decode step on known cards."""
    rows = []
    for batch in args.batches:
        cost = decode_cost(model, batch, args.context)
        moved, operations = cost.weight_bytes + cost.kv_bytes, cost.product_operations + cost.attention_operations
        rates = [f"{batch / cost.floor(card):,.0f}" if moved < card.memory else "too large" for card in CARDS]
        cells = [f"{cost.floor(card) * 1e3:.2f} ({rate})" for card, rate in zip(CARDS, rates, strict=True)]
        rows.append([batch, f"{moved / 1e9:.1f}", f"{operations / 1e12:.2f}", *cells])
    title = f"Computed, not measured: a decode step of {args.models[0]} in bfloat16 at a context of {args.context}"
    show_table(title, ["batch", "GB", "TFLOP", *(f"{card.name}, ms (tok/s)" for card in CARDS)], rows)


def show_steps(title: str, steps: list[StepTime]) -> list[dict[str, Any]]:
    """Print a table of measured steps; returns them ready for JSON."""
    rows = [
        [step.what, step.batch, f"{step.context:.0f}", f"{step.seconds * 1e3:.2f}", f"{step.floor * 1e3:.2f}",
         f"{step.floor / step.seconds:.0%}", f"{step.bandwidth_share:.0%}", f"{step.tokens_per_second:,.0f}"]
        for step in steps
    ]  # fmt: skip
    show_table(title, ["step", "batch", "context", "ms", "floor, ms", "of the floor", "of bandwidth", "tok/s"], rows)
    return [asdict(step) | {"tokens_per_second": step.tokens_per_second} for step in steps]


def nano_requests(count: int, longest: int = 1024, last_token: int = 10000) -> list[BenchRequest]:
    """The requests of nano-vllm's ``bench.py``, token for token: prompts and answers of 100 to 1,024 tokens, seed 0."""
    rng, shortest = random.Random(0), min(100, longest)
    prompts = [[rng.randint(0, last_token) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]
    return [BenchRequest(prompt, rng.randint(shortest, longest)) for prompt in prompts]


def measure_model(args: Flags, name: str, card: Card, whole: bool = True, eager: bool = False, **more: Any) -> dict[str, Any]:
    """A model: decode steps, and if it is to be the `whole` also prompts and, as --requests asks, those of nano-vllm; else the
    second batch alone. `eager`: once more without CUDA graphs. `more` are further settings."""
    gc.collect()  # the memory of the engine before is for this one
    torch.cuda.empty_cache()
    batches = args.batches if whole else args.batches[1:2] or args.batches[:1]
    longest = max(args.context, *args.prompts, 2 * args.longest if args.requests else 0) + 1
    with made_up(name) as place:
        llm = LLM(place, dtype="bfloat16", load_format="dummy", max_model_len=longest, max_num_seqs=max(batches), **more)
    engine, worker = llm.llm_engine, llm.llm_engine.executor.worker
    title = f"{name} on {card.name}, {worker.backend.name} attention"
    looks = [partial(measure_card, worker.device, repeats=3)] * 9 if worker.device.type == "cpu" else [lambda: card]

    def decode() -> list[StepTime]:
        return [measure_decode(engine, looks, batch, args.context, args.steps) for batch in batches]

    steps = decode() + [measure_prefill(engine, looks, length, args.steps) for length in (args.prompts if whole else ())]
    results: dict[str, Any] = {"steps": show_steps(f"{title}, {'CUDA graphs' if worker.graphs else 'no graphs'}", steps)}
    if whole and args.requests:
        run = run_engine(llm, nano_requests(args.requests, args.longest, min(10000, engine.model_config.vocab_size - 1)))
        print(f"{name}, {run.num_requests} requests of nano-vllm's: {run.output_tokens_per_second:,.0f} output tok/s")
        results["requests"] = asdict(run) | {"output_tokens_per_second": run.output_tokens_per_second}
    if eager and worker.graphs is not None:
        worker.graphs = None
        results["eager"] = show_steps(f"{title}, --enforce-eager", decode())
    engine.close()
    return results


def measure_backends(args: Flags, card: Card, model: ModelConfig) -> dict[str, Any]:
    """What the first model is measured with besides: attention alone, and each backend for it."""
    heads, device = (model.num_heads, model.num_kv_heads), torch.device("cuda")
    one = partial(measure_attention, card=card, device=device, heads=heads, head_dim=model.head_dim, context=args.context)
    kinds = [(name, kind) for name in args.backends for kind in (KV_CACHE_DTYPES if name == "triton" else ("auto",))]
    cases = ((batch, *kind) for batch in args.batches for kind in kinds)
    attention = [one(name, batch=n, block_size=16, repeats=args.steps, kv_cache_dtype=kind) for n, name, kind in cases]
    rows = [[t.backend, t.kv_cache_dtype, t.batch, f"{t.seconds * 1e6:.1f}", f"{t.bandwidth_share:.0%}"] for t in attention]
    show_table(f"Attention of one layer, context {args.context}", ["backend", "KV cache", "batch", "µs", "of bandwidth"], rows)
    results: dict[str, Any] = {"attention": [asdict(t) for t in attention]}
    for i, name in enumerate(args.backends):
        results[name] = measure_model(args, args.models[0], card, i == 0, i == 0, attention_backend=name)
    return results


def measure(args: Flags, model: ModelConfig) -> dict[str, Any]:
    """Everything that is not computed; `model` is the first of --models."""
    on_gpu, card = args.device == "cuda", measure_card(torch.device(args.device))
    print(f"{card.name}: moves {card.bandwidth / 1e9:,.0f} GB/s, multiplies {card.rate / 1e12:,.2f} TFLOP/s in bfloat16")
    results = {"card": asdict(card)} | (measure_backends(args, card, model) if on_gpu else {})
    return results | {name: measure_model(args, name, card, device=args.device) for name in args.models[on_gpu:]}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("gpu", __doc__)
    text = "aliases, folders or made-up shapes; on a GPU the first is measured with every backend"
    parser.add_flag("--models", ["llama-7b", "qwen3-0.6b", "mixtral-8x7b", "deepseek-v2-lite"], text)
    parser.add_flag("--batches", [1, 32, 64, 256], "batch sizes of the decode steps")
    parser.add_flag("--context", 1024, "tokens of each; fewer if memory is short")
    parser.add_flag("--prompts", [512, 2000], "lengths of prompts")
    text = "the first backend runs everything; the others run attention alone and the second batch"
    parser.add_flag("--backends", BACKENDS, text, choices=BACKENDS)
    parser.add_flag("--steps", 24, "measurements; the median counts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what computes (default: cuda)")
    parser.add_argument("--requests", type=int, help="so many of nano-vllm's, which has 256, for each model (default: none)")
    parser.add_flag("--longest", 1024, "tokens of such a prompt at most, and of its answer")
    args = parser.parse_args(argv)
    with one_line_errors(), torch.inference_mode():
        for name in reversed(args.models):
            with made_up(name) as place:
                model = resolve_model(place, "dummy").config
        show_floors(model, args)
        if args.device == "cuda" and not torch.cuda.is_available():
            print("no GPU here: nothing is measured. What is above is computed.")
            return
        for name in args.backends if args.device == "cuda" else ():
            make_backend(name, "cuda", torch.bfloat16, model.head_dim)  # says now what cannot run
        results = measure(args, model)
    name = re.sub(r"[^a-z0-9]+", "-", results["card"]["name"].lower()).strip("-")
    args.output_json = args.output_json or (RESULTS / f"{name}_gpu.json" if args.device == "cuda" else None)
    finish(args, "gpu", results)


if __name__ == "__main__":
    main()
