"""What the prefix cache gains and costs: a common beginning, a chat, prompts that share nothing, and whose turn it is."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from ..batching.sequence import SamplingParams
from ..core.engine import LLM

TOKEN_IDS = (1000, 40_000)


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
