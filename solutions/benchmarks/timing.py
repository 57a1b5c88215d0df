"""What measurements of time share: a clock over repeated calls, medians, cores and processes of their own, made-up models."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SHAPE_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""TinyLlama-1.1B's shape: large enough for its weights to matter, small enough for a laptop."""


MADE_UP: dict[str, dict[str, Any]] = {
    "1b": {},
    "moe-1b": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": 16,
               "intermediate_size": 1024, "num_local_experts": 32, "num_experts_per_tok": 8},
}  # fmt: skip
"""Models that nobody has trained, by name: what they change in `SHAPE_1B`."""


def write_shape(folder: Path, **changes: Any) -> Path:
    """A folder in Hugging Face's format with `SHAPE_1B`, changed where told, and no weights."""
    (folder / "config.json").write_text(json.dumps(SHAPE_1B | changes))
    return folder


@contextmanager
def made_up(name: str) -> Iterator[str]:
    """What an engine takes for a model: a folder, while this lasts, if it is one of `MADE_UP`, else the name."""
    with tempfile.TemporaryDirectory() as folder:
        yield str(write_shape(Path(folder), **MADE_UP[name])) if name in MADE_UP else name


def median_seconds(
    run: Callable[[], object], repeats: int, warm_up: int = 0, before: Callable[[], object] = lambda: None
) -> float:
    """Median time of a call and of what it gives a GPU; `warm_up` calls do not count, and `before` is outside the clock."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(warm_up + repeats):
        before()
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def grouped(runs: Iterable[Any], names: Sequence[str]) -> dict[tuple[Any, ...], list[Any]]:
    """Repeated runs by what they were runs of: the values that these names have in them."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, name) for name in names), []).append(run)
    return groups


def medians(runs: Sequence[Any], names: Iterable[str]) -> dict[str, float | None]:
    """The median of each named figure over repeated runs; None for one that a run does not have."""
    columns = {name: [getattr(run, name) for run in runs] for name in names}
    return {name: None if None in values else statistics.median(values) for name, values in columns.items()}


def pin_to_cores(which: slice) -> None:
    """Keep this process on some of the cores that it may use, in their order, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[which])


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function gives in a process that is started for it, with nothing of this one's memory. Raises
    RuntimeError if the process ended before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()
