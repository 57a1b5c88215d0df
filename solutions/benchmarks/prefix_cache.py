"""What the prefix cache gains on a common beginning and a chat, what it costs where nothing is shared, and who goes first.

Four small measurements, with and without the cache (--no-enable-prefix-caching) where time is compared.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict, dataclass
from typing import Any

from ..batching.sampling_params import SamplingParams
from ..core.config import DEFAULT_MODEL
from ..core.engine import LLM
from .datasets import TOKEN_IDS
from .report import Parser, finish, one_line_errors, show_table, spread


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Requests with a common beginning, one after the other, in seconds to the first token.

    Attributes:
        first: the one that computes the beginning. others: the median of the rest. without: the median without the cache.
    """

    first: float
    others: float
    without: float


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of a conversation.

    Attributes:
        prompt: tokens of the conversation so far. cached: of them, found. new: tokens of this turn's message.
    """

    prompt: int
    cached: int
    new: int


def make_engine(model: str, **settings: object) -> LLM:
    """An engine with a KV cache of 512 MiB for sequences of up to 1,024 tokens.

    The cache is written once at start: with prefix caching a run goes through fresh blocks, without it takes the last ones
    again, and the system's work on memory that is used for the first time would count as the cache's.
    """
    return LLM(model, max_model_len=1024, kv_cache_memory_bytes=512 << 20, touch_kv_cache=True, **settings)


def tokens(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(*TOKEN_IDS) for _ in range(count)]


def seconds_to_first_token(llm: LLM, prompt: list[int]) -> float:
    start = time.perf_counter()
    llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    return time.perf_counter() - start


def shared_prefix(model: str, num_requests: int, prefix_len: int, own_len: int, seed: int) -> SharedPrefix:
    """Time `num_requests` prompts with the same first `prefix_len` tokens, with and without the cache."""
    generator = random.Random(seed)
    prefix = tokens(generator, prefix_len)
    prompts = [prefix + tokens(generator, own_len) for _ in range(num_requests)]
    times = []
    for caching in (True, False):
        llm = make_engine(model, enable_prefix_caching=caching)
        seconds_to_first_token(llm, tokens(generator, prefix_len + own_len))  # warm-up
        times.append([seconds_to_first_token(llm, prompt) for prompt in prompts])
    cached, plain = times
    return SharedPrefix(cached[0], sorted(cached[1:])[len(cached) // 2 - 1], sorted(plain)[len(plain) // 2])


def chat(model: str, num_turns: int, message_len: int, answer_len: int, seed: int) -> list[ChatTurn]:
    """Hold a conversation: each turn's prompt is all that was said before and a new message."""
    generator = random.Random(seed)
    llm, said, turns = make_engine(model), [], []
    params = SamplingParams(temperature=0, max_tokens=answer_len, ignore_eos=True)
    for _ in range(num_turns):
        said += tokens(generator, message_len)
        (output,) = llm.generate({"prompt_token_ids": said}, params, use_tqdm=False)
        turns.append(ChatTurn(len(said), output.num_cached_tokens, message_len))
        said = said + output.outputs[0].token_ids
    return turns


def cost_without_hits(model: str, num_requests: int, input_len: int, output_len: int, repeats: int, seed: int) -> list[float]:
    """Throughput with the cache over that without it, on prompts that share nothing, a ratio for each pair of runs."""
    generator = random.Random(seed)
    engines = {caching: make_engine(model, enable_prefix_caching=caching) for caching in (True, False)}
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)

    def seconds(llm: LLM) -> float:
        prompts = [{"prompt_token_ids": tokens(generator, input_len)} for _ in range(num_requests)]
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    for llm in engines.values():
        seconds(llm)
    ratios = []
    for number in range(repeats):
        order = (True, False) if number % 2 else (False, True)  # whoever comes second finds a warmer machine
        times = {caching: seconds(engines[caching]) for caching in order}
        ratios.append(times[False] / times[True])
    return ratios


def hits_by_policy(model: str, num_groups: int, group_size: int, prefix_len: int, own_len: int, seed: int) -> dict[str, float]:
    """Share of the prompts' tokens that the cache has when groups with a common beginning arrive in turns, in a cache that
    holds a third of these beginnings; by scheduling policy."""
    generator = random.Random(seed)
    prefixes = [tokens(generator, prefix_len) for _ in range(num_groups)]
    prompts = [
        {"prompt_token_ids": prefixes[i % num_groups] + tokens(generator, own_len)} for i in range(num_groups * group_size)
    ]
    blocks = max((prefix_len + own_len + 2) // 16 + 2, num_groups * prefix_len // 16 // 3)
    shares = {}
    for policy in ("fcfs", "lpm"):
        llm = LLM(
            model,
            max_model_len=prefix_len + own_len + 2,
            num_gpu_blocks_override=blocks,
            max_num_seqs=2,
            scheduling_policy=policy,
        )
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        stats = llm.llm_engine.stats()
        shares[policy] = stats.prefix_cache_hits / stats.prefix_cache_queries
    return shares


# The command


def show(
    args: argparse.Namespace, shared: SharedPrefix, turns: list[ChatTurn], ratios: dict[str, Any], policies: dict[str, float]
) -> None:
    """Print a table for each measurement."""
    rows = [
        ["first of those with a common beginning", f"{shared.first * 1e3:.1f}", ""],
        ["the others, median", f"{shared.others * 1e3:.1f}", f"{shared.first / shared.others:.1f}x"],
        ["without the cache, median", f"{shared.without * 1e3:.1f}", f"{shared.first / shared.without:.1f}x"],
    ]
    title = f"{args.num_requests} requests with {args.prefix_len} common tokens and {args.own_len} of their own, one by one"
    show_table(title, ["time to first token", "ms", "faster than the first"], rows)
    rows = [[str(i), str(t.prompt), str(t.cached), str(t.prompt - t.cached), str(t.new)] for i, t in enumerate(turns, 1)]
    show_table("A chat", ["turn", "tokens so far", "cached", "computed", "of them new"], rows, "answers have 32 tokens")
    cost = [[f"{ratios['median']:.3f}", f"{ratios['min']:.3f} to {ratios['max']:.3f}"]]
    show_table("Throughput with the cache over that without, nothing shared", ["median of pairs", "range"], cost)
    rows = [[name, f"{share:.0%}"] for name, share in policies.items()]
    show_table("Prompt tokens cached when 6 groups come in turns and 2 beginnings fit", ["policy", "cached"], rows)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write; exits with one line on a problem."""
    parser = Parser("prefix_cache", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "alias or folder")
    parser.add_flag("--num-requests", 32, "requests with a common beginning, and as many without")
    parser.add_flag("--prefix-len", 512, "tokens of the common beginning")
    parser.add_flag("--own-len", 16, "tokens after the common beginning")
    parser.add_flag("--turns", 6, "turns of the chat")
    parser.add_flag("--repeats", 7, "pairs of runs on prompts that share nothing")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the prompts (default: 0)")
    parser.output_flags()
    args = parser.parse_args(argv)
    if args.num_requests < 2:
        parser.error(f"--num-requests must be at least 2, got {args.num_requests}")
    if args.prefix_len + args.own_len > 1000:
        parser.error("--prefix-len and --own-len may be 1,000 tokens together at most")
    with one_line_errors():
        shared = shared_prefix(args.model, args.num_requests, args.prefix_len, args.own_len, args.data_seed)
        turns = chat(args.model, args.turns, 48, 32, args.data_seed)
        ratios = spread(cost_without_hits(args.model, args.num_requests, 128, 32, args.repeats, args.data_seed))
        policies = hits_by_policy(args.model, 6, 4, args.prefix_len, args.own_len, args.data_seed)
    show(args, shared, turns, ratios, policies)
    results = {"shared_prefix": asdict(shared), "chat": [asdict(t) for t in turns], "ratios_without_hits": ratios,
               "cached_by_policy": policies}  # fmt: skip
    finish(args, "prefix_cache", results)


if __name__ == "__main__":
    main()
