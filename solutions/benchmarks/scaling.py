"""A model on one device and on several, in lock step: what more ranks bring, and what their sums cost.

On a CPU a device is one core. Every size runs in a process of its own, which is bound to as many cores as it has ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.config import EngineConfig
from ..core.engine import LLMEngine
from ..core.platform.machine import available_cores
from ..parallelism.communication import Communicator, ring_all_reduce
from ..parallelism.distributed import run_ranks
from ..parallelism.shared_memory import SharedMemoryCommunicator
from .gpu import measure_decode, measure_prefill
from .kernels import read_bandwidth
from .roofline import Card, num_product_weights

SHAPE_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""TinyLlama-1.1B's shape: large enough for its weights to matter, small enough for a laptop."""


@dataclass(frozen=True, slots=True)
class RankTime:
    """One kind of step on some number of ranks.

    Attributes:
        ranks: devices. what, batch, context: as in `StepTime`. seconds: median of a step.
        communication: share of the time that rank 0 spends in collectives, waiting for others and the prompts before decode
            steps included; None where it cannot be told (a GPU's collectives run beside the host).
        weight_bandwidth: bytes a second at which all ranks together read weights, counting each weight once a step.
        read_bandwidth: bytes a second that so many cores can read, measured just before; None on GPUs.
    """

    ranks: int
    what: str
    batch: int
    context: float
    seconds: float
    communication: float | None
    weight_bandwidth: float
    read_bandwidth: float | None


@dataclass(frozen=True, slots=True)
class CollectiveTime:
    """A sum of `bytes` over `ranks` by `method`.

    Attributes:
        seconds: the median time of a call, of the slowest rank. sent: bytes that a rank sends, the mean over ranks, as counted.
    """

    method: str
    ranks: int
    bytes: int
    seconds: float
    sent: float


def write_shape(folder: Path, **changes: int) -> Path:
    """A folder in Hugging Face's format that has the shape of a model of 1.1 billion weights, and no weights.

    Args:
        changes: to the shape, such as ``num_hidden_layers=4``.
    """
    (folder / "config.json").write_text(json.dumps(SHAPE_1B | changes))
    return folder


def possible_ranks(sizes: list[int]) -> list[int]:
    """Those of `sizes` for which this machine has the GPUs, or without any the cores."""
    devices = torch.cuda.device_count() or available_cores()
    return [size for size in sizes if size <= devices]


def measure_ranks(
    model: str, size: int, batches: list[int], context: int, prompt_len: int, steps: int, cpu_kernels: bool = True
) -> list[RankTime]:
    """Decode steps of each batch and one prompt, on `size` devices, in a process of their own."""
    context_ = multiprocessing.get_context("spawn")
    ours, theirs = context_.Pipe()
    arguments = (theirs, model, size, batches, context, prompt_len, steps, cpu_kernels)
    process = context_.Process(target=_measure, args=arguments)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measurement on {size} ranks ended with exit code {process.exitcode}; see above") from None
    finally:
        process.join()


def medians(runs: list[RankTime]) -> list[RankTime]:
    """One entry for each kind of step and number of ranks: the median of each figure over repeated runs."""
    kinds = dict.fromkeys((t.ranks, t.what, t.batch) for t in runs)
    return [_median([t for t in runs if (t.ranks, t.what, t.batch) == kind]) for kind in kinds]


def _median(runs: list[RankTime]) -> RankTime:
    def middle(name: str) -> float | None:
        values = [getattr(t, name) for t in runs]
        return None if None in values else statistics.median(values)

    return replace(
        runs[0], **{name: middle(name) for name in ("seconds", "communication", "weight_bandwidth", "read_bandwidth")}
    )


def _measure(
    results: Any, model: str, size: int, batches: list[int], context: int, prompt_len: int, steps: int, cpu_kernels: bool
) -> None:
    on_gpu = torch.cuda.is_available()
    if not on_gpu and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:size])
    torch.set_num_threads(size)
    reads = None if on_gpu else read_bandwidth(repeats=9)
    tokens = max(max(batches) * (context + 16), prompt_len + 16)
    config = EngineConfig(
        model=model, load_format="dummy", dtype="bfloat16", tensor_parallel_size=size, enable_prefix_caching=False,
        max_model_len=max(context, prompt_len) + 16, max_num_batched_tokens=max(512, prompt_len),
        num_gpu_blocks_override=None if on_gpu else -(-tokens // 16) + 2 * max(batches), enable_cpu_kernels=cpu_kernels,
    )  # fmt: skip
    engine = LLMEngine(config)
    nothing = Card("", float("inf"), float("inf"), 0)  # no floors here
    weights = num_product_weights(engine.model_config) * engine.executor.dtype.itemsize
    measure_decode(engine, nothing, max(batches), context, 2)  # all memory is touched, all steps are recorded
    times = []
    for what, batch in [("decode", batch) for batch in batches] + [("prefill", 1)]:
        before, start = _communication(engine), time.perf_counter()
        if what == "decode":
            step = measure_decode(engine, nothing, batch, context, steps)
        else:
            step = measure_prefill(engine, nothing, prompt_len, max(3, steps // 8))
        share = None if before is None else (_communication(engine) - before) / (time.perf_counter() - start)
        times.append(RankTime(size, what, batch, step.context, step.seconds, share, weights / step.seconds, reads))
    engine.close()
    results.send(times)


def _communication(engine: LLMEngine) -> float | None:
    """Seconds that rank 0 has spent in collectives so far."""
    communicator = engine.executor.worker.parallel.communicator
    if communicator is None:
        return 0.0
    if isinstance(communicator, SharedMemoryCommunicator):
        return communicator.seconds_in_kernels
    return None if engine.executor.device.type == "cuda" else sum(t.seconds for t in communicator.traffic.values())


def measure_collectives(ranks: int, sizes: list[int], repeats: int, memory: Path) -> list[CollectiveTime]:
    """Sums of these many bytes of float32 by the ring of this course, gloo and shared memory, one core a rank.

    Args:
        memory: an empty file, for the ranks to share; best on a file system in memory.
    """
    everyone = run_ranks(_time_collectives, ranks, sizes, repeats, memory, timeout=600.0)
    return [
        CollectiveTime(
            method,
            ranks,
            size,
            max(rank[method, size][0] for rank in everyone),
            statistics.fmean(rank[method, size][1] for rank in everyone),
        )
        for method in ("ring", "gloo", "shared memory")
        for size in sizes
    ]


def _time_collectives(
    comm: Communicator, sizes: list[int], repeats: int, memory: Path
) -> dict[tuple[str, int], tuple[float, float]]:
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, [cores[comm.rank % len(cores)]])
    shared = SharedMemoryCommunicator(os.open(memory, os.O_RDWR), threads=1)
    methods = {
        "ring": (comm, lambda x: ring_all_reduce(x, comm)),
        "gloo": (comm, comm.all_reduce),
        "shared memory": (shared, shared.all_reduce),
    }
    found = {}
    for size in sizes:
        x = torch.zeros(max(1, size // 4))
        for method, (communicator, run) in methods.items():
            times, sent = [], []
            for _ in range(repeats + 3):
                shared.all_reduce(torch.zeros(1))  # all start together
                communicator.traffic.clear()
                start = time.perf_counter()
                run(x)
                times.append(time.perf_counter() - start)
                sent.append(sum(traffic.bytes_sent for traffic in communicator.traffic.values()))
            found[method, size] = statistics.median(times[3:]), statistics.fmean(sent)
    return found
