"""What the prefix cache gains on a common beginning and a chat, what it costs where nothing is shared, and who goes first.

Four small measurements, with and without the cache (--no-enable-prefix-caching) where time is compared.
"""

from __future__ import annotations

import random
import statistics
import time
from functools import partial
from typing import Any

from ..core.config import DEFAULT_MODEL
from ..core.engine import LLM
from .datasets import BenchRequest, Workload, make_requests, token_ids
from .report import Flags, Parser, finish, one_line_errors, show_table, spread


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


def chat(model: str, num_turns: int, message_len: int, answer_len: int, seed: int) -> list[dict[str, int]]:
    """Hold a conversation: each turn's prompt is all that was said before and a new message. Tokens of each turn: its "prompt",
    what of it was "cached", and its "new" message."""
    rng = random.Random(seed)
    llm, said, turns = make_engine(model), [], []
    for _ in range(num_turns):
        request = BenchRequest(said + token_ids(rng, message_len), answer_len)
        (output,) = llm.generate(request.prompt, request.params(), use_tqdm=False)
        said = request.prompt_token_ids + output.outputs[0].token_ids
        turns.append({"prompt": len(request.prompt_token_ids), "cached": output.num_cached_tokens, "new": message_len})
    return turns


def cost_without_hits(model: str, num_requests: int, input_len: int, output_len: int, repeats: int, seed: int) -> list[float]:
    """Throughput with the cache over that without it, on prompts that share nothing, a ratio for each pair of runs."""
    engines = {caching: make_engine(model, enable_prefix_caching=caching) for caching in (False, True)}
    prompts, ratios = partial(make_requests, Workload("random", num_requests, input_len, output_len)), []
    for number in range(repeats + 1):
        order = (False, True) if number % 2 else (True, False)  # whoever comes second finds a warmer machine
        times = {caching: seconds(engines[caching], prompts(seed=seed + 2 * number + caching)) for caching in order}
        ratios.append(times[False] / times[True])
    return ratios[1:]  # the first is a warm-up


def hits_by_policy(model: str, num_groups: int, group_size: int, prefix_len: int, own_len: int, seed: int) -> dict[str, float]:
    """Share of the prompts' tokens that the cache has when groups with a common beginning arrive in turns, in a cache that
    holds a third of these beginnings; by scheduling policy."""
    rng, longest = random.Random(seed), prefix_len + own_len + 2
    prefixes = [token_ids(rng, prefix_len) for _ in range(num_groups)]
    requests = [BenchRequest(prefix + token_ids(rng, own_len), 1) for prefix in prefixes * group_size]
    blocks = max(longest // 16 + 2, num_groups * prefix_len // 16 // 3)
    shares = {}
    for policy in ("fcfs", "lpm"):
        llm = LLM(model, max_model_len=longest, num_gpu_blocks_override=blocks, max_num_seqs=2, scheduling_policy=policy)
        seconds(llm, requests)
        stats = llm.llm_engine.stats()
        shares[policy] = stats.prefix_cache_hits / stats.prefix_cache_queries
    return shares


def show(args: Flags, results: dict[str, Any]) -> None:
    names = {"first": "first of those with a common beginning", "others": "the others, median"}
    names["without"] = "without the cache, median"
    times = results["shared_prefix"]
    rows = [[text, f"{times[name] * 1e3:.1f}", f"{times['first'] / times[name]:.1f}x"] for name, text in names.items()]
    rows[0][2] = ""
    title = f"{args.num_requests} requests with {args.prefix_len} common tokens and {args.own_len} of their own, one by one"
    show_table(title, ["time to first token", "ms", "faster than the first"], rows)
    rows = [[i, t["prompt"], t["cached"], t["prompt"] - t["cached"], t["new"]] for i, t in enumerate(results["chat"], 1)]
    show_table("A chat", ["turn", "tokens so far", "cached", "computed", "of them new"], rows, "answers have 32 tokens")
    ratios = results["ratios_without_hits"]
    rows = [[f"{ratios['median']:.3f}", f"{ratios['min']:.3f} to {ratios['max']:.3f}"]]
    show_table("Throughput with the cache over that without, nothing shared", ["median of pairs", "range"], rows)
    rows = [[name, f"{share:.0%}"] for name, share in results["cached_by_policy"].items()]
    show_table("Prompt tokens cached when 6 groups come in turns and 2 beginnings fit", ["policy", "cached"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("prefix_cache", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "alias or folder")
    parser.add_flag("--num-requests", 32, "requests with a common beginning, and as many without")
    parser.add_flag("--prefix-len", 512, "tokens of the common beginning")
    parser.add_flag("--own-len", 16, "tokens after the common beginning")
    parser.add_flag("--turns", 6, "turns of the chat")
    parser.add_flag("--repeats", 7, "pairs of runs on prompts that share nothing")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the prompts (default: 0)")
    args = parser.parse_args(argv)
    if args.num_requests < 2:
        parser.error(f"--num-requests must be at least 2, got {args.num_requests}")
    if args.prefix_len + args.own_len > 1000:
        parser.error("--prefix-len and --own-len may be 1,000 tokens together at most")
    with one_line_errors():
        ratios = cost_without_hits(args.model, args.num_requests, 128, 32, args.repeats, args.data_seed)
        results = {
            "shared_prefix": shared_prefix(args.model, args.num_requests, args.prefix_len, args.own_len, args.data_seed),
            "chat": chat(args.model, args.turns, 48, 32, args.data_seed),
            "ratios_without_hits": spread(ratios),
            "cached_by_policy": hits_by_policy(args.model, 6, 4, args.prefix_len, args.own_len, args.data_seed),
        }
    show(args, results)
    finish(args, "prefix_cache", results)


if __name__ == "__main__":
    main()
