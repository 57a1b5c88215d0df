"""What the prefix cache gains on a common beginning, what it costs where nothing is shared, and what comes back from a tier
below it.

With --tier-lens only the tier is measured: prompts that are computed, that come back from host memory, and from files after a
restart. Without, the cache against none (--no-enable-prefix-caching).
"""

from __future__ import annotations

import os
import random
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..core.config import DEFAULT_MODEL
from ..core.engine import LLM
from .datasets import BenchRequest, Workload, make_requests, token_ids
from .report import Flags, Parser, finish, one_line_errors, show_table, spread

TIERS = ("computed", "host memory", "computed and written", "files on disk", "files in memory")
"""Where keys and values are, in the order of the measurements: each leaves for the next what that needs."""


def make_engine(model: str, **settings: object) -> LLM:
    """An engine with a KV cache of 512 MiB for sequences of up to 1,024 tokens. It is written once at start: with prefix
    caching a run goes through fresh blocks, without it takes the last ones again, and the system's work on memory that is used
    for the first time would count as the cache's."""
    return LLM(model, max_model_len=1024, kv_cache_memory_bytes=512 << 20, touch_kv_cache=True, **settings)


def seconds(llm: LLM, requests: list[BenchRequest]) -> float:
    """How long an engine takes for requests that are there at once."""
    start = time.perf_counter()
    llm.generate([r.prompt for r in requests], [r.params() for r in requests], use_tqdm=False)
    return time.perf_counter() - start


def shared_prefix(model: str, num_requests: int, prefix_len: int, own_len: int, seed: int) -> dict[str, float]:
    """Seconds to the first token of requests with a common beginning, one after the other: "first" computes the beginning;
    "others" is the median of the rest, and "without" the median without the cache."""
    requests = make_requests(Workload("shared-prefix", num_requests, own_len, 1, prefix_len), seed=seed)
    warm_up = make_requests(Workload("random", 1, prefix_len + own_len, 1), seed=seed + 1)
    times = []
    for caching in (True, False):
        llm = make_engine(model, enable_prefix_caching=caching)
        seconds(llm, warm_up)
        times.append([seconds(llm, [request]) for request in requests])
    (first, *others), plain = times
    return {"first": first, "others": statistics.median(others), "without": statistics.median(plain)}


def cost_without_hits(model: str, num_requests: int, input_len: int, output_len: int, repeats: int, seed: int) -> list[float]:
    """Throughput with the cache over that without it, on prompts that share nothing, a ratio for each pair of runs."""
    engines = {caching: make_engine(model, enable_prefix_caching=caching) for caching in (False, True)}
    prompts, ratios = partial(make_requests, Workload("random", num_requests, input_len, output_len)), []
    for number in range(repeats + 1):
        order = (False, True) if number % 2 else (True, False)  # whoever comes second finds a warmer machine
        times = {caching: seconds(engines[caching], prompts(seed=seed + 2 * number + caching)) for caching in order}
        ratios.append(times[False] / times[True])
    return ratios[1:]  # the first is a warm-up


def tiers(model: str, lengths: list[int], repeats: int, seed: int) -> dict[int, dict[str, Any]]:
    """Seconds to the first token of prompts of each length, by where their keys and values are (`TIERS`), in engines that have
    memory for one of the longest prompts. Before "files on disk" the system writes what it holds of them, and forgets it."""
    rng, longest, found = random.Random(seed), max(lengths), {length: {} for length in lengths}
    prompts = {length: [BenchRequest(token_ids(rng, length), 1) for _ in range(repeats)] for length in lengths}
    with TemporaryDirectory() as folder:
        for where in TIERS:
            for path in Path(folder).rglob("*.kv") if where == "files on disk" else ():
                with path.open("rb") as file:
                    os.fsync(file)
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            tier = {"computed": None, "host memory": "host"}.get(where, folder)
            llm = LLM(model, max_model_len=longest + 16, num_gpu_blocks_override=longest // 16 + 4, kv_offload=tier)
            for requests in prompts.values() if where == "host memory" else ():
                seconds(llm, requests)
            seconds(llm, [BenchRequest(token_ids(rng, longest), 1)])  # a warm-up, and the prefix cache has nothing else then
            for length in lengths:
                found[length][where] = spread(seconds(llm, [request]) for request in prompts[length])
            llm.llm_engine.close()
    return found


def show(args: Flags, results: dict[str, Any]) -> None:
    names = {"first": "first of those with a common beginning", "others": "the others, median"}
    names["without"] = "without the cache, median"
    times = results["shared_prefix"]
    rows = [[text, f"{times[name] * 1e3:.1f}", f"{times['first'] / times[name]:.1f}x"] for name, text in names.items()]
    rows[0][2] = ""
    title = f"{args.num_requests} requests with {args.prefix_len} common tokens and {args.own_len} of their own, one by one"
    show_table(title, ["time to first token", "ms", "faster than the first"], rows)
    ratios = results["ratios_without_hits"]
    rows = [[f"{ratios['median']:.3f}", f"{ratios['min']:.3f} to {ratios['max']:.3f}"]]
    show_table("Throughput with the cache over that without, nothing shared", ["median of pairs", "range"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("prefix_cache", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "alias or folder")
    parser.add_flag("--num-requests", 32, "requests with a common beginning, and as many without")
    parser.add_flag("--prefix-len", 512, "tokens of the common beginning")
    parser.add_flag("--own-len", 16, "tokens after the common beginning")
    parser.add_argument("--tier-lens", type=int, nargs="+", help="measure --kv-offload on prompts of so many tokens")
    parser.add_flag("--repeats", 7, "pairs of runs on prompts that share nothing")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the prompts (default: 0)")
    args = parser.parse_args(argv)
    if args.num_requests < 2:
        parser.error(f"--num-requests must be at least 2, got {args.num_requests}")
    if args.prefix_len + args.own_len > 1000:
        parser.error("--prefix-len and --own-len may be 1,000 tokens together at most")
    with one_line_errors():
        if args.tier_lens:
            results = tiers(args.model, sorted(args.tier_lens), args.repeats, args.data_seed)
            rows = [[length, *(f"{t['median'] * 1e3:.1f}" for t in times.values())] for length, times in results.items()]
            show_table("Milliseconds to the first token of a prompt", ["tokens", *TIERS], rows)
        else:
            ratios = cost_without_hits(args.model, args.num_requests, 128, 32, args.repeats, args.data_seed)
            times = shared_prefix(args.model, args.num_requests, args.prefix_len, args.own_len, args.data_seed)
            show(args, results := {"shared_prefix": times, "ratios_without_hits": spread(ratios)})
    finish(args, "prefix_cache", results)


if __name__ == "__main__":
    main()
