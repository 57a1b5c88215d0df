"""What LoRA adapters cost: the same steps with none, with one, and with eight of them in turns from row to row.

Each number is a step's time: decoding one sequence and 32, and a prompt's 512 tokens (with 8 adapters, 8 prompts of 64).
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..core.config import DEFAULT_MODEL, EngineConfig
from ..core.engine import LLMEngine
from ..models.config.model_config import ModelConfig
from .datasets import BenchRequest
from .report import Parser, finish, one_line_errors, show_table, spread
from .timing import median_seconds

COUNTS = (0, 1, 8)
WORKLOADS = {"decode, batch 1": (1, 1), "decode, batch 32": (32, 1), "prompts, 512 tokens": (1, 512)}
"""Sequences, and tokens of each in a measured step."""


def save_adapter(folder: Path, model: ModelConfig, rank: int, seed: int) -> None:
    """Save a random adapter of all linear layers of a LLaMA."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = model.hidden_size, model.intermediate_size
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden), "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    tensors = {}
    for layer in range(model.num_layers):
        for name, (rows, columns) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{name}.lora_"
            tensors[f"{stem}A.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
            tensors[f"{stem}B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))


def step_seconds(engine: LLMEngine, sequences: int, tokens: int, adapters: int, steps: int, rng: random.Random) -> float:
    """The median time of `steps` steps, each of which computes so many tokens of so many sequences."""
    if tokens > 1 and adapters > 1:
        sequences, tokens = adapters, tokens // adapters

    def submit(length: int, answer: int) -> None:
        for number in range(sequences):
            asked = BenchRequest(rng.choices(range(engine.model_config.vocab_size), k=length), answer)
            request = engine.prepare(str(number), asked.prompt, asked.params())
            request.adapter = str(number % adapters) if adapters else None
            engine.submit(request)

    if tokens > 1:
        return median_seconds(engine.step, steps, before=lambda: submit(tokens, 1))
    submit(8, steps + 1)
    engine.step()  # the prompts
    return median_seconds(engine.step, steps)


def measure(model: str, rank: int, repeats: int, steps: int, seed: int) -> dict[str, dict[str, Any]]:
    """Seconds of a step, by workload and number of adapters; those of one workload are measured in turns."""
    cache = {"kv_cache_memory_bytes": 256 << 20, "touch_kv_cache": True, "enable_prefix_caching": False}
    adapters = {"enable_lora": True, "max_loras": max(COUNTS), "max_lora_rank": rank}
    engine = LLMEngine(EngineConfig(model, max_model_len=1024, max_num_batched_tokens=512, **cache, **adapters))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder), engine.model_config, rank, seed)
        adapter = engine.adapters.read(Path(folder))
        for number in range(max(COUNTS)):
            engine.adapters.add(str(number), Path(folder), adapter)
    rng, results = random.Random(seed), {}
    for name, (sequences, tokens) in WORKLOADS.items():
        counts = [count for count in COUNTS if count <= max(sequences, tokens)]
        rounds = steps if tokens == 1 else max(1, steps // 8)
        run = partial(step_seconds, engine, sequences, tokens, steps=rounds, rng=rng)
        runs = [{count: run(adapters=count) for count in counts} for _ in range(repeats + 1)]
        results[name] = {str(count): spread(times[count] for times in runs[1:]) for count in counts}  # the first is a warm-up
    return results


def main(argv: list[str] | None = None) -> None:
    parser = Parser("lora", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "alias or folder of a LLaMA")
    parser.add_flag("--rank", 16, "of the adapters, which change all linear layers")
    parser.add_flag("--repeats", 3, "medians of so many runs in turns")
    parser.add_flag("--steps", 16, "decode steps of a run; of prompts it has an eighth")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of prompts and adapters (default: 0)")
    args = parser.parse_args(argv)
    with one_line_errors():
        results = measure(args.model, args.rank, args.repeats, args.steps, args.data_seed)
    rows = []
    for name, found in results.items():
        base = found["0"]["median"]
        more = {count: "" if count == "0" else f" ({of['median'] / base:.2f}x)" for count, of in found.items()}
        cells = {count: f"{1e3 * of['median']:.2f}{more[count]}" for count, of in found.items()}
        rows.append([name, *(cells.get(str(count), "") for count in COUNTS)])
    show_table(f"Adapters of rank {args.rank}, ms a step", ["adapters", *map(str, COUNTS)], rows)
    finish(args, "lora", results)


if __name__ == "__main__":
    main()
