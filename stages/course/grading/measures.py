"""Measures an engine, the learner's or the reference's as `STAGES` says: ``python -m stages.course.grading.measures NAME``.

The last line that it prints is the value, of which more is better. `stages/performance.toml` says what each is worth.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

CAPACITY, BLOCK_SIZE = 16_384, 16
SEQUENCES, STEPS, ROUNDS = 64, 24, 5
PROMPTS, PROMPT_LEN, OUTPUT_LEN, REPEATS = 8, 64, 16, 3
GROUPS, GROUP_SIZE, PREFIX_LEN, OWN_LEN = 6, 8, 160, 24


def memory() -> float:
    """Percentage of a full KV memory whose slots hold a token, averaged over the steps of a simulation."""
    from stages.benchmarks.datasets import draw_lengths
    from stages.benchmarks.memory import simulate_paged

    lengths = draw_lengths(400, random.Random(0))
    return 100 * simulate_paged("graded", CAPACITY, lengths, BLOCK_SIZE).tokens


def overhead() -> float:
    """Decode steps a second of a full batch, of which a fake model takes no part: the best of some rounds."""
    from stages.batching.sampling_params import RequestOutputKind
    from stages.benchmarks.overhead import measure

    result = measure(SEQUENCES, True, RequestOutputKind.DELTA, rounds=ROUNDS, steps=STEPS)
    return 1e6 / (result.lowest * SEQUENCES)


def throughput() -> float:
    """Output tokens a second of the default model on a few prompts of one length: the best of some runs."""
    from stages.benchmarks.datasets import Workload, make_requests
    from stages.benchmarks.throughput import run_engine, warm_up_requests
    from stages.core.config import DEFAULT_MODEL
    from stages.core.engine import LLM

    llm = LLM(DEFAULT_MODEL, max_model_len=256, kv_cache_memory_bytes=256 << 20)
    requests = make_requests(Workload("random", PROMPTS, PROMPT_LEN, OUTPUT_LEN))
    run_engine(llm, warm_up_requests(requests))
    return max(run_engine(llm, requests).output_tokens_per_second for _ in range(REPEATS))


def prefix_hits() -> float:
    """Percentage of the prompts' tokens that come from the cache, when groups with a common beginning arrive in turns in a
    memory that cannot hold all beginnings. The model is a fake: only the cache counts."""
    from stages.batching.sampling_params import SamplingParams
    from stages.benchmarks.overhead import make_engine

    engine = make_engine(2, (PREFIX_LEN + OWN_LEN) * GROUPS // 3, True, "smollm2-135m")
    numbers = random.Random(0)
    prefixes = [[numbers.randint(1000, 40_000) for _ in range(PREFIX_LEN)] for _ in range(GROUPS)]
    for index in range(GROUPS * GROUP_SIZE):
        own = [numbers.randint(1000, 40_000) for _ in range(OWN_LEN)]
        prompt = prefixes[numbers.randrange(GROUPS)] + own
        engine.add_request(str(index), {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=1))
    while engine.has_unfinished_requests():
        engine.step()
    stats = engine.stats()
    return 100 * stats.prefix_cache_hits / stats.prefix_cache_queries


MEASURES: dict[str, Callable[[], float]] = {
    "memory": memory, "overhead": overhead, "throughput": throughput, "prefix_hits": prefix_hits,
}  # fmt: skip


if __name__ == "__main__":
    print(MEASURES[sys.argv[1]]())
