"""One model on 1, 2, 4 and 8 devices in lock step, and what sums over ranks cost by each way to make them.

How much faster a model runs when its matrices are cut over more devices (--tensor-parallel-size), each rank on a GPU of its own
or, without any, on one core. Weights are random, so nothing is downloaded. Sizes for which there are no devices are left out.
Every size runs in a process of its own, which is bound to as many cores as it has ranks. Beside it on a CPU: the time of one
sum over two ranks by the ring of the course, by gloo and through shared memory.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.config import EngineConfig
from ..core.engine import LLMEngine
from ..core.platform import native
from ..core.platform.machine import available_cores
from ..models.costs.roofline import Card, num_product_weights
from ..models.loader import resolve_model
from ..parallelism.communication import Communicator, ring_all_reduce
from ..parallelism.distributed import run_ranks
from ..parallelism.shared_memory import SharedMemoryCommunicator
from . import timing
from .gpu import measure_decode, measure_prefill
from .kernels import read_bandwidth
from .report import Flags, Parser, finish, one_line_errors, show_table, tracked
from .timing import in_new_process, median_seconds, pin_to_cores

WAYS = ("ring", "gloo", "shared memory")
"""Ways to make a sum over ranks."""
COLLECTIVE_SIZES, COLLECTIVE_REPEATS = [1 << n for n in range(8, 25, 2)], 50


@dataclass(frozen=True, slots=True)
class RankTime:
    """One kind of step on so many devices, as in `StepTime`.

    Attributes:
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


def possible_ranks(sizes: list[int]) -> list[int]:
    """Those of `sizes` for which this machine has the GPUs, or without any the cores."""
    devices = torch.cuda.device_count() or available_cores()
    return [size for size in sizes if size <= devices]


def measure_ranks(args: Flags, model: str, size: int) -> list[RankTime]:
    """Decode steps of each batch and one prompt, on `size` devices; on a CPU, this process then keeps to as many cores."""
    batches, on_gpu = args.batches, torch.cuda.is_available()
    if not on_gpu:
        pin_to_cores(slice(size))
    torch.set_num_threads(size)
    reads = None if on_gpu else read_bandwidth(repeats=9)
    tokens = max(max(batches) * (args.context + 16), args.prompt + 16)
    config = EngineConfig(
        model=model, load_format="dummy", dtype="bfloat16", tensor_parallel_size=size, enable_prefix_caching=False,
        max_model_len=max(args.context, args.prompt) + 16, max_num_batched_tokens=max(512, args.prompt),
        num_gpu_blocks_override=None if on_gpu else -(-tokens // 16) + 2 * max(batches),
        enable_cpu_kernels=not args.disable_cpu_kernels,
    )  # fmt: skip
    engine = LLMEngine(config)
    nothing = [lambda: Card("", float("inf"), float("inf"), 0)]  # no floors here
    weights = num_product_weights(engine.model_config) * engine.executor.dtype.itemsize
    measure_decode(engine, nothing, max(batches), args.context, 2)  # all memory is touched, all steps are recorded
    todo = [partial(measure_decode, engine, nothing, batch, args.context, args.steps) for batch in batches]
    todo.append(partial(measure_prefill, engine, nothing, args.prompt, max(3, args.steps // 8)))
    times = []
    for run in todo:
        before, start = _communication(engine), time.perf_counter()
        step = run()
        share = None if before is None else (_communication(engine) - before) / (time.perf_counter() - start)
        speed = weights / step.seconds
        times.append(RankTime(size, step.what, step.batch, step.context, step.seconds, share, speed, reads))
    engine.close()
    return times


def medians(runs: list[RankTime]) -> list[RankTime]:
    """One entry for each kind of step and number of ranks: the median of each figure over repeated runs."""
    figures = ("seconds", "communication", "weight_bandwidth", "read_bandwidth")
    alike = timing.grouped(runs, ("ranks", "what", "batch")).values()
    return [replace(each[0], **timing.medians(each, figures)) for each in alike]


def _communication(engine: LLMEngine) -> float | None:
    """Seconds that rank 0 has spent in collectives so far."""
    communicator = engine.executor.worker.parallel.communicator
    if communicator is None:
        return 0.0
    if isinstance(communicator, SharedMemoryCommunicator):
        return communicator.seconds_in_kernels
    return None if engine.executor.device.type == "cuda" else sum(t.seconds for t in communicator.traffic.values())


def measure_collectives(ranks: int, sizes: list[int], repeats: int, memory: Path) -> list[dict[str, Any]]:
    """Sums of these many "bytes" of float32 by each "method": the course's ring, gloo and shared memory, one core a rank.
    "seconds" are the median of a call, of the slowest rank, "sent" the bytes that a rank sends, the mean over ranks, as
    counted. The ranks share `memory`, an empty file, best on a file system in memory."""
    everyone = run_ranks(_time_collectives, ranks, sizes, repeats, memory, timeout=600.0)
    found = []
    for method, size in itertools.product(WAYS, sizes):
        seconds, sent = zip(*(rank[method, size] for rank in everyone), strict=True)
        times = {"seconds": max(seconds), "sent": statistics.fmean(sent)}
        found.append({"method": method, "ranks": ranks, "bytes": size} | times)
    return found


def _time_collectives(
    comm: Communicator, sizes: list[int], repeats: int, memory: Path
) -> dict[tuple[str, int], tuple[float, float]]:
    """(method, bytes) → this rank's median seconds and the bytes that it sends in one sum."""
    core = comm.rank % available_cores()
    pin_to_cores(slice(core, core + 1))
    shared = SharedMemoryCommunicator(os.open(memory, os.O_RDWR), threads=1)
    methods = {
        "ring": (comm, lambda x: ring_all_reduce(x, comm)),
        "gloo": (comm, comm.all_reduce),
        "shared memory": (shared, shared.all_reduce),
    }
    found = {}
    for size, (method, (communicator, run)) in itertools.product(sizes, methods.items()):
        x = torch.zeros(max(1, size // 4))

        def start_together(communicator: Communicator = communicator) -> None:
            shared.all_reduce(torch.zeros(1))
            communicator.traffic.clear()

        seconds = median_seconds(partial(run, x), repeats, warm_up=3, before=start_together)
        found[method, size] = seconds, sum(traffic.bytes_sent for traffic in communicator.traffic.values())
    return found


def show_ranks(model: str, times: list[RankTime]) -> None:
    first = {(t.what, t.batch): t for t in reversed(times)}
    rows = []
    for t in times:
        share = "" if t.communication is None else f"{t.communication:.1%}"
        reads = "" if t.read_bandwidth is None else f"{t.read_bandwidth / 1e9:.1f}"
        faster = f"{first[t.what, t.batch].seconds / t.seconds:.2f}x"
        cells = [t.ranks, f"{t.context:.0f}", f"{t.seconds * 1e3:.2f}", f"{t.weight_bandwidth / 1e9:.1f}", reads, share, faster]
        rows.append([f"{t.what}, batch {t.batch}", *cells])
    where = "GPUs" if torch.cuda.is_available() else "cores"
    columns = ["step", where, "context", "ms", "weights, GB/s", "can read, GB/s", "in sums", "as fast"]
    show_table(f"{model} in bfloat16, random weights", columns, rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("scaling", __doc__)
    parser.add_flag("--model", "1b", "alias or folder; 1b: the shape of TinyLlama-1.1B")
    parser.add_flag("--ranks", [1, 2, 4, 8], "sizes to measure")
    parser.add_flag("--batches", [1, 8], "batch sizes of the decode steps")
    parser.add_flag("--context", 256, "tokens of each sequence")
    parser.add_flag("--prompt", 256, "tokens of the measured prompt")
    parser.add_flag("--steps", 24, "measurements; the median counts")
    parser.add_flag("--repeats", 3, "runs of each size, in turn; medians count")
    parser.add_argument("--disable-cpu-kernels", action="store_true", help="PyTorch's products, and sums through gloo")
    args = parser.parse_args(argv)
    if args.context <= 2 * args.steps:
        parser.error("--context must be more than twice --steps")
    sizes = possible_ranks(sorted(set(args.ranks)))
    if not sizes:
        parser.error(f"--ranks {' '.join(map(str, args.ranks))}: this machine has fewer devices")
    sums, runs = [], []
    shared = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    with shared as folder, timing.made_up(args.model) as model:
        with one_line_errors(RuntimeError):
            resolve_model(model, "dummy")  # says now if there is none
            for size in tracked(sizes * args.repeats, "ranks"):
                runs += in_new_process(measure_ranks, args, model, size)
        times = medians(runs)
        show_ranks(args.model, times)
        if not torch.cuda.is_available() and native.load() is not None and 2 in sizes:
            memory = Path(folder) / "memory"
            memory.touch()
            sums = measure_collectives(2, COLLECTIVE_SIZES, COLLECTIVE_REPEATS, memory)
            rows = [[f"{n:,}", *(f"{1e6 * t['seconds']:,.1f}" for t in sums if t["bytes"] == n)] for n in COLLECTIVE_SIZES]
            show_table("One sum over 2 ranks of one core each, µs", ["bytes", *WAYS], rows)
    results = {"steps": [asdict(t) for t in times], "runs": [asdict(t) for t in runs]}
    results |= {"collectives": sums} if sums else {}
    finish(args, "scaling", results)


if __name__ == "__main__":
    main()
